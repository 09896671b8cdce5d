"""`ptm train --seeds=N`: the same run under N seeds, and what their final metrics say together."""

import dataclasses
import functools
import json
import math
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ptm import atomic, hosts, labels, log, registry, statistics, train
from ptm import config as config_lib
from ptm.fields import ConfigError, StorageError
from ptm.saved import settled

SUMMARY = "seeds.json"
FAILED = 1


def run(config: Any, *, count: int, workdir: str | os.PathLike, allow_change: tuple[str, ...] = (), devices: list | None = None) -> int:
    """Runs or continues the config under its seed and the `count` - 1 after it, in WORKDIR/seedN, one after the other; finished ones are skipped.

    Writes and prints the summary of their final metrics. A seed that fails is reported, and the others run all the same. Returns the exit code: 0 all
    finished, 75 interrupted (the same command continues), 1 some failed. Raises ConfigError for a config that cannot run.
    """
    config, workdir = labels.filled(registry.resolve(config)), Path(workdir)  # labels of the data are looked for once
    if count < 1:
        raise ConfigError(f"--seeds={count}; allowed: 1 or more runs.")
    if (workdir / "config.json").is_file():
        raise ConfigError(f"{workdir} is the workdir of one run; with --seeds give the folder that is to hold one for each seed, WORKDIR/seedN.")
    if config.seed + count - 1 > 2**31 - 1:
        raise ConfigError(f"seed={config.seed} and the {count - 1} after it exceed {2**31 - 1}, the largest; lower --config.seed.")
    failures: dict[int, str] = {}
    seeds = range(config.seed, config.seed + count)
    folders = {seed: workdir / f"seed{seed}" for seed in seeds}
    for seed, folder in folders.items():
        this = dataclasses.replace(config, seed=seed)
        train.check_resume(this, folder, allow_change)
        if hosts.first(functools.partial(settled, folder / "ckpt", config.train.steps)):
            _say(f"Seed {seed} is finished: {folder}.")
            continue
        _say(f"Seed {seed}, {seed - config.seed + 1} of {count}: {folder}.")
        try:
            code = train.train(this, workdir=folder, allow_change=allow_change, devices=devices)
        except (ConfigError, KeyboardInterrupt):
            raise  # of no one seed
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, FloatingPointError):
                raise  # the other processes are still at this seed
            failures[seed] = str(error)
            if not isinstance(error, FloatingPointError | StorageError):
                traceback.print_exc()
                failures[seed] = f"{type(error).__name__}: {error}"
            _say(f"Seed {seed} failed: {failures[seed]}")
        else:
            if code != train.FINISHED:
                return code
    rows = [_row(config, seed, folder, failures) for seed, folder in folders.items()]
    summary = {"command": {"seed": config.seed, "seeds": count}, "metrics": summarize(rows), "rows": rows}
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        stored = summary | {"rows": [row | {"metrics": log.written(row["metrics"])} for row in rows]}
        atomic.write(workdir / SUMMARY, json.dumps(stored, indent=1, allow_nan=False) + "\n")
        print(table(summary), f"  written to {workdir / SUMMARY}", sep="\n", flush=True)
    return FAILED if failures else train.FINISHED


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _row(config: config_lib.Config, seed: int, folder: Path, failures: Mapping[int, str]) -> dict[str, Any]:
    row: dict[str, Any] = {"seed": seed, "workdir": str(folder)}
    if seed in failures:
        return {**row, "state": "failed", "error": failures[seed], "metrics": {}}
    return {**row, "state": "finished", "metrics": train.last_evals(config, folder)}


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metric -> n, mean, sd and ci95 (of the mean) over the rows that have a finite value; of one row alone sd and ci95 are None, of none the mean too."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {name: _summary([row["metrics"][name] for row in rows if name in row["metrics"]]) for name in names}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return {"n": 0, "mean": None, "sd": None, "ci95": None}
    found = statistics.summary(finite)
    return {"n": found.n, "mean": found.mean, "sd": found.sd, "ci95": None if found.interval is None else list(found.interval)}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a person reads it: a line a metric, with its values seed by seed."""
    rows, metrics = summary["rows"], {name: entry for name, entry in summary["metrics"].items() if name.rpartition("/")[2] not in train.COUNTS}
    lines = [["metric", "mean", "sd", "95 % interval", *(f"seed {row['seed']}" for row in rows)]]
    for name, entry in metrics.items():
        spread = ["-", "-"] if entry["sd"] is None else [_shown(entry["sd"]), f"{_shown(entry['ci95'][0])} .. {_shown(entry['ci95'][1])}"]
        lines.append(
            [
                name,
                "-" if entry["mean"] is None else _shown(entry["mean"]),
                *spread,
                *(_shown(row["metrics"][name]) if name in row["metrics"] else row["state"] for row in rows),
            ]
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    aligned = ["  " + "  ".join(cell.rjust(width) if n else cell.ljust(width) for n, (cell, width) in enumerate(zip(line, widths))) for line in lines]
    finished = sum(row["state"] == "finished" for row in rows)
    failed = [f"  seed {row['seed']} failed: {row['error']}" for row in rows if row["state"] == "failed"]
    return "\n".join(
        ["", f"{finished} of {len(rows)} seeds finished; mean, standard deviation (n - 1) and interval of the mean (Student's t).", *aligned, *failed]
    )


def _shown(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"
