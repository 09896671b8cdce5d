"""The report of one run, and of several beside each other."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptm import config as config_lib
from ptm import fields, log, registry, statistics, timing
from ptm.fields import ConfigError
from ptm.report import reading
from ptm.report.document import (
    NOTHING,
    Cell,
    Chart,
    Document,
    Note,
    Series,
    Table,
    chart,
    difference,
    document,
    interval,
    note,
    number,
    probability,
    table,
    thinned,
    unique,
    words,
)
from ptm.report.reading import Files

FIRST = 12  # charts that are shown at once; others are closed on the page
CLOCKS = ("tokens_per_second", "step_time", "devices_waited", "data_seconds", "host_peak_bytes", "device_peak_bytes")
RATES = {"tokens_per_second": "tokens/s", "step_time": "seconds of a step", "model_flops_per_second": "model FLOPs/s", "mfu": "MFU"}
SHARES = {"devices_waited": "share of steps that devices waited for", "data_seconds": "seconds a step waits for its batch"}


def found_runs(paths: Sequence[str]) -> list[Files]:
    """The runs that workdirs, and folders of `ptm train --seeds`, hold. Raises ConfigError for a folder without any."""
    folders: list[Path] = []
    for path in map(Path, paths):
        seeds = sorted((inner.parent for inner in path.glob("seed*/config.json")), key=lambda folder: (len(folder.name), folder.name))
        if (path / "config.json").is_file() or not seeds:
            folders.append(path)
        else:
            folders += seeds
    folders = list({os.path.realpath(folder): folder for folder in folders}.values())
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"there is no folder '{folder}'; give the workdir of a run, or the folder of a study.")
    return [reading.read(folder) for folder in folders]


def names_of(runs: Sequence[Files]) -> list[str]:
    """What tells workdirs apart: their paths without the folders that all share."""
    paths = [os.path.abspath(run.path) for run in runs]
    common = os.path.commonpath(paths) if len(set(paths)) > 1 else os.path.dirname(paths[0])
    return [os.path.relpath(path, common) for path in paths]


def report(runs: Sequence[Files]) -> Document:
    """What runs say: final metrics, curves, throughput, answers, config, parameters, environment."""
    names = names_of(runs)
    return _one(runs[0], names[0]) if len(runs) == 1 else _several(dict(zip(names, runs)))


# One run.


def _one(run: Files, name: str) -> Document:
    config = run.config
    title = f"{config['model']['name']} / {config['objective']['name']}: {name}"
    about = f"{run.state}, seed {config['seed']}, data {', '.join(config['data']['source'])}."
    return document(
        title,
        about,
        {
            "Results": [*_state(run), *_finals({name: run})],
            "Curves": _own_curves(run),
            "Throughput": [*throughput({name: run}), *_clocks({name: run})],
            "Samples": _samples(run),
            "Config": _config(run),
            "Parameters": _parameters(run),
            "Environment": environment({name: run}),
        },
    )


def _state(run: Files) -> list[Note]:
    notes = [] if run.finished else [note(f"The run is not finished: it is {run.state}.", "warning")]
    if len(versions := reading.code(run.history)) > 1:
        notes.append(note(f"The run was continued with another version of the code: {', then '.join(map(reading.code_shown, versions))}.", "warning"))
    if any(dirty for _, dirty in versions):
        notes.append(note("The run was made with code that is in no commit, or of an unknown version.", "warning"))
    skipped = sum(row["skipped"] for row in run.metrics if "skipped" in row)
    return [*notes, note(f"{skipped:.0f} steps were skipped for a loss or gradient that was not finite or stood out.", "warning")] if skipped else notes


def _finals(runs: Mapping[str, Files]) -> list[Table]:
    keys = list(dict.fromkeys(key for run in runs.values() for key in run.finals))
    rows = [(words(key), *(number(run.finals[key]) if key in run.finals else NOTHING for run in runs.values())) for key in keys]
    return [table("results", "Metrics of the last evaluation", ("metric", *runs), rows)] if rows else []


def _own_curves(run: Files) -> list[Chart]:
    """The curves of a run, those of the training beside those of evals that measure the same."""
    groups: dict[str, dict[str, Any]] = {}
    for key, points in run.curves.items():
        name, _, leaf = key.partition("/") if key.split("/")[0] in run.config["evals"] else ("training", "", key)
        groups.setdefault(leaf, {})[name] = points
    charts = []
    for n, (file, (leaf, curves)) in enumerate(zip(unique(groups), groups.items())):
        series = [Series(name, thinned(points), run.units, colour) for colour, (name, points) in enumerate(sorted(curves.items()))]
        charts.append(chart(file, leaf, series, long=n >= FIRST))
    return charts


def _samples(run: Files) -> list[Table]:
    made = []
    for file, (name, (step, rows)) in zip(unique(f"samples-{name}" for name in run.samples()), run.samples().items()):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[words(_plain(row[key])) if key in row else NOTHING for key in columns] for row in rows]
        if rows:
            made.append(table(file, f"{name}, step {step:,}: the first answers", columns, cells, long=True))
    return made


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else "none" if value is None else value


def _config(run: Files) -> list[Table]:
    defaults = _defaults(run)
    changed = [key for key, value in run.flat.items() if key not in defaults or defaults[key] != value]
    rows = [(words(key), words(fields.unparse(defaults[key])) if key in defaults else NOTHING, words(fields.unparse(run.flat[key]))) for key in changed]
    whole = [(words(key), words(fields.unparse(value), tone="strong" if key in changed else "")) for key, value in run.flat.items()]
    return [
        table("difference", "Difference from the defaults", ("key", "default", "value"), rows),
        table("config", "The whole config", ("key", "value"), whole, long=True),
    ]


def _defaults(run: Files) -> dict[str, Any]:
    resolved = config_lib.resolve(run.config, registry.REGISTRIES)
    return config_lib.flatten(config_lib.defaults_of(resolved))


def _parameters(run: Files) -> list[Table]:
    if len(run.parameters) < 2:
        return []
    header, *rows = run.parameters
    counted = [[_count(cell) if column == "size" else words(cell) for column, cell in zip(header, row)] for row in rows]
    return [table("parameters", f"Parameters: {run.size or 0:,}", header, counted, long=True)]


def _count(text: str) -> Cell:
    digits = text.replace(",", "")
    return number(int(digits)) if digits.isdigit() else words(text)


# Several runs, and what one has in common with them.


def _several(runs: Mapping[str, Files]) -> Document:
    flat = {name: run.flat for name, run in runs.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    told = [key for key in keys if len({json.dumps(values[key]) if key in values else None for values in flat.values()}) > 1]
    rows = [(words(key), *(words(fields.unparse(values[key])) if key in values else NOTHING for values in flat.values())) for key in told]
    config = [table("config", "Config keys that are not the same in all runs", ("key", *runs), rows)] if rows else [note("All runs have the same config.")]
    states = [note(f"{name} is not finished: it is {run.state}.", "warning") for name, run in runs.items() if not run.finished]
    versions = list(dict.fromkeys(version for run in runs.values() for version in reading.code(run.history)))
    if len(versions) > 1:
        states.append(note(f"The runs were made with {len(versions)} versions of the code: {', '.join(map(reading.code_shown, versions))}.", "warning"))
    finished = sum(run.finished for run in runs.values())
    return document(
        f"{len(runs)} runs: {', '.join(list(runs)[:4])}{', ...' if len(runs) > 4 else ''}",
        f"{finished} of {len(runs)} runs finished.",
        {
            "Results": [*states, *_over_seeds(runs), *_finals(runs)],
            "What differs": config,
            "Curves": together({name: run.curves for name, run in runs.items()}, runs),
            "Throughput": [*throughput(runs), *_clocks(runs)],
            "Environment": environment(runs),
        },
    )


def _settings(runs: Mapping[str, Files]) -> dict[str, dict[int, Files]]:
    """Runs that differ in their seed alone are one setting: its name, the part that all of their names begin with, and its runs by seed."""
    found: dict[str, dict[int, str]] = {}
    for name, run in runs.items():
        found.setdefault(json.dumps({key: value for key, value in run.flat.items() if key != "seed"}, sort_keys=True), {})[run.config["seed"]] = name
    names = [os.path.commonpath(list(seeds.values())) or next(iter(seeds.values())) for seeds in found.values()]
    names = names if len(set(names)) == len(names) else [next(iter(seeds.values())) for seeds in found.values()]
    return {name: {seed: runs[run] for seed, run in seeds.items()} for name, seeds in zip(names, found.values())}


def _over_seeds(runs: Mapping[str, Files]) -> list[Table]:
    """Each setting over its seeds, and how it differs from the first one, seed by seed."""
    settings = _settings(runs)
    if any(len(seeds) == 1 for seeds in settings.values()):
        return []
    rows, finals = [], {name: {seed: run.finals for seed, run in seeds.items() if run.finished} for name, seeds in settings.items()}
    for key in dict.fromkeys(key for seeds in finals.values() for values in seeds.values() for key in values):
        values = {name: {seed: own[key] for seed, own in seeds.items() if key in own and math.isfinite(own[key])} for name, seeds in finals.items()}
        base, *others = values
        paired = {name: statistics.paired([values[name][seed] - value for seed, value in values[base].items() if seed in values[name]]) for name in others}
        tested = {name: found.p for name, found in paired.items() if found is not None and found.p is not None}
        corrected = dict(zip(tested, statistics.holm(list(tested.values()))))
        for name in filter(values.__getitem__, values):
            found = statistics.summary(list(values[name].values()))
            own = (words(key), number(found.n), number(found.mean), number(found.sd), interval(found.interval))
            if len(settings) > 1:
                compared = [NOTHING] * 5 if name == base else [*difference(paired[name]), probability(corrected[name] if name in corrected else None)]
                own = (own[0], words(name), *own[1:], *compared)
            rows.append(own)
    columns = ("metric", "n", "mean", "sd", "95 % interval")
    reads = "sd (n - 1) and interval of the mean (Student's t) over the finite values (n) of the finished runs."
    if len(settings) == 1:
        reads = f"The runs differ in their seed alone: {reads}"
    else:
        columns = ("metric", "setting", *columns[1:], "pairs", "difference to the first", "95 % interval of it", "p", "p (Holm)")
        reads += " Differences are paired by seed, p is of a two-sided paired t-test, corrected where a metric has several; intervals are not corrected."
    return [table("seeds", "Over seeds", columns, rows, note=reads)] if rows else []


def together(curves: Mapping[str, Mapping[str, list[tuple[int, float]]]], runs: Mapping[str, Files], *, prefix: str = "") -> list[Chart]:
    """A chart for each metric, a curve for each run that has it."""
    keys = list(dict.fromkeys(key for values in curves.values() for key in values))
    charts = []
    for n, (file, key) in enumerate(zip(unique(prefix + key for key in keys), keys)):
        series = [Series(name, thinned(values[key]), runs[name].units, colour) for colour, (name, values) in enumerate(curves.items()) if key in values]
        charts.append(chart(file, key, series, long=n >= FIRST))
    return charts


def throughput(runs: Mapping[str, Files]) -> list[Table]:
    """Speed, waits, compilations and memory of runs."""
    rows = []
    for key, label in (RATES | SHARES).items():
        values = [run.median(key) for run in runs.values()]
        if any(value is not None for value in values):
            rows.append((words(f"{label} (median)"), *(Cell(log.count(v), v) if v is not None and 1e3 <= v < math.inf else number(v) for v in values)))
    for key, label, unit in (("compiles", "programs compiled", 1), ("compile_seconds", "seconds of compiling", 1), ("host_peak_bytes", "peak of the host, GiB", 2**30),
                             ("device_peak_bytes", "peak of a device, GiB", 2**30)):  # fmt: skip
        values = [max((value for _, value in run.timed(key)), default=None) for run in runs.values()]
        if any(value is not None for value in values):
            rows.append((words(label), *(number(None if value is None else value / unit, decimals=0 if key == "compiles" else 2) for value in values)))
    return [table("throughput", "Throughput", ("what", *runs), rows, note=timing.MFU if any(run.timed("mfu") for run in runs.values()) else "")] if rows else []


def _clocks(runs: Mapping[str, Files]) -> list[Chart]:
    curves = {name: {key: points for key in CLOCKS if len(points := run.timed(key)) > 1} for name, run in runs.items()}
    return together(curves, runs, prefix="timing-")


def environment(runs: Mapping[str, Files]) -> list[Table]:
    """Every start of runs: when, from which step, on what, with which code and versions; and the fingerprints of what they read."""
    rows = []
    for name, run in runs.items():
        for entry in run.history:
            [version] = reading.code([entry])
            mesh = " ".join(f"{axis} {size}" for axis, size in entry["mesh"].items() if size > 1) or "one device"
            packages = ", ".join(f"{package} {number}" for package, number in entry["versions"].items() if number)
            changes = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in entry["changes"].items()) if "changes" in entry else ""
            devices = f"{entry['devices']['count']} x {entry['devices']['kind']}, {entry['devices']['processes']} processes, {mesh}"
            code = words(reading.code_shown(version), tone="bad" if version[1] else "")
            rows.append(
                (words(name), words(entry["time"]), number(entry["from_step"]), code, words(devices), words(entry["python"]), words(packages), words(changes))
            )
    kinds = list(dict.fromkeys(kind for run in runs.values() for kind in run.fingerprints))
    prints = [(words(kind), *(words(run.fingerprints[kind]) if kind in run.fingerprints else NOTHING for run in runs.values())) for kind in kinds]
    columns = ("run", "start", "from step", "code", "devices", "python", "packages", "config changed")
    made = [table("environment", "Starts", columns, rows)] if rows else []
    return [*made, *([table("fingerprints", "Fingerprints of what was read", ("of", *runs), prints)] if prints else [])]
