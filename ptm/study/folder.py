"""What the folder of a study says: study.json, and the states and figures of its runs. Reports and launchers read studies through this module alone.

    DIR/study.json               the study, resolved
    DIR/ARM/seedK/STAGE/         the workdir of a run; run.json (ptm/study/attempts.py) beside what every run writes
    DIR/halving.json             the rungs that were decided, where the study has some
    DIR/search.log               Optuna's storage, where the study searches

A run is named by its path below DIR. Its config is stored with `$STUDY` for DIR, so that a folder can be moved.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm import atomic, fields, lock, log, saved, untrusted
from ptm import config as config_lib
from ptm.fields import ConfigError
from ptm.study import attempts as attempts_lib
from ptm.study.language import Halving, Metric, Ordering, Published

FILE, HALVING, JOURNAL = "study.json", "halving.json", "search.log"
OWN = (FILE, HALVING, JOURNAL, "study.lock", "launch", "report.html", "report.md", "report.tex")  # what stands beside the folders of arms
FORMAT = 1
PLACE = "$STUDY"  # in stored configs: the study's folder
FINISHED, STOPPED = "finished", "stopped"


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A stage: its recipe, and the stage whose final checkpoint it starts from."""

    name: str
    recipe: str
    after: str | None


@dataclasses.dataclass(frozen=True)
class ArmRecord:
    """An arm: "STAGE:KEY" -> [value of the base, own value], and its runs, seed -> stage -> run."""

    name: str
    difference: dict[str, list[Any]]
    runs: dict[int, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run: what it is made from (`config` flat, fingerprints), the run that it needs, its length in steps and in tokens (padding included)."""

    stage: str
    seed: int
    identity: str
    needs: str | None
    steps: int
    tokens: int
    config: dict[str, Any]
    fingerprints: dict[str, str | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SearchRecord:
    """A search: number of trials, metric, the space as a reader sees it, and the trials so far, number -> overrides."""

    metric: str
    trials: int
    space: dict[str, str]
    asked: dict[int, dict[str, Any]]


def trial_name(number: int) -> str:
    """The name of the arm of a search's trial."""
    return f"trial {number}"


@dataclasses.dataclass(frozen=True)
class Record:
    """study.json."""

    name: str
    file: str
    argument: str
    claim: str
    paper: str
    base: str
    differs: tuple[str, ...]
    seeds: tuple[int, ...]
    stages: tuple[StageRecord, ...]
    metrics: tuple[Metric, ...]
    published: tuple[Published, ...]
    orderings: tuple[Ordering, ...]
    halving: Halving | None
    search: SearchRecord | None
    arms: tuple[ArmRecord, ...]
    runs: dict[str, RunRecord]  # in the order in which they are run
    made: str
    git: dict[str, Any]
    overrides: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader should know before the runs

    @functools.cached_property
    def users(self) -> dict[str, tuple[str, ...]]:
        """Run -> the arms that it belongs to."""
        found: dict[str, dict[str, None]] = {run: {} for run in self.runs}
        for arm in self.arms:
            for stages in arm.runs.values():
                for run in stages.values():
                    found[run][arm.name] = None
        return {run: tuple(arms) for run, arms in found.items()}


@dataclasses.dataclass(frozen=True)
class State:
    """How far a run is.

    `name`: waiting (the run that it needs is not finished), ready, running, cut (interrupted or killed; goes on), failed, finished, stopped (by halving),
    stale (its workdir holds another config). `step`: the last one that metrics.jsonl tells of. `error`: of the last attempt, if that failed.
    """

    name: str
    step: int | None
    attempts: list[dict[str, Any]]
    error: str | None


def read(folder: str | os.PathLike) -> Record:
    """The record of a study's folder. Raises ConfigError for a folder that is none, or a damaged study.json."""
    path = Path(folder) / FILE
    try:
        about = path.stat()
    except OSError:
        raise ConfigError(f"{folder} is no study: it has no {FILE}. Give the --workdir of a `ptm study`.") from None
    return _read(str(path), about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=8)  # it is asked for at every look at a run's state
def _read(path: str, *_: int) -> Record:
    try:
        return record_of(untrusted.read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{path}: {error}") from None
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); move it away and start the same `ptm study` again: it is made anew, and the runs that are there go on."
        ) from None


def record_of(content: Mapping[str, Any]) -> Record:
    """The record that a parsed study.json holds. Raises ConfigError for one of another format."""
    given = dict(content)
    if (version := given.pop("format")) != FORMAT:
        raise ConfigError(f"study.json has format {version}; this version reads {FORMAT}.")
    search = given["search"]
    _check_places(given)
    return Record(**given | {
        "differs": tuple(given["differs"]), "seeds": tuple(given["seeds"]), "stages": tuple(StageRecord(**entry) for entry in given["stages"]),
        "metrics": tuple(Metric(**entry) for entry in given["metrics"]), "published": tuple(Published(**entry) for entry in given["published"]),
        "orderings": tuple(Ordering(**entry) for entry in given["orderings"]), "halving": given["halving"] and Halving(**given["halving"] | {"rungs": tuple(given["halving"]["rungs"])}),
        "search": search and SearchRecord(**{**search, "asked": {int(number): values for number, values in search["asked"].items()}}),
        "arms": tuple(ArmRecord(**{**entry, "runs": {int(seed): runs for seed, runs in entry["runs"].items()}}) for entry in given["arms"]),
        "runs": {name: RunRecord(**entry) for name, entry in given["runs"].items()}, "notes": tuple(given["notes"]) if "notes" in given else (),
    })  # fmt: skip


def _check_places(content: Mapping[str, Any]) -> None:
    """Runs, and what arms and runs name of them, are places below the study's folder that study.json lists."""
    runs = content["runs"]
    for name in runs:
        if not untrusted.is_place(name):
            raise ConfigError(f"it names the run {name!r}; allowed: ARM/seedK/STAGE, places in the study's own folder.")
    named = [run for arm in content["arms"] for stages in arm["runs"].values() for run in stages.values()]
    if lost := sorted({*named, *(about["needs"] for about in runs.values() if about["needs"] is not None)} - set(runs)):
        raise ConfigError(f"it names the run {lost[0]!r}, which is not among its runs; it is damaged.")


def write(folder: str | os.PathLike, record: Record) -> None:
    """Writes study.json, whole or not at all."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(stored(record), indent=1) + "\n")


def stored(record: Record) -> dict[str, Any]:
    """study.json of a record."""
    return {"format": FORMAT, **dataclasses.asdict(record)}


def run_of(folder: str | os.PathLike, run: str) -> RunRecord:
    """What study.json says of a run. Raises ConfigError for a name that is no run of the study."""
    runs = read(folder).runs
    if run not in runs:
        hint = fields.nearest(run, runs) or f" One of them is '{next(iter(runs))}'."
        raise ConfigError(f"the study in {folder} has no run '{run}'; its {len(runs)} runs are named ARM/seedK/STAGE.{hint}")
    return runs[run]


def is_finished(folder: str | os.PathLike, run: str) -> bool:
    """Whether the final checkpoint of a run is there, and all that is measured of it."""
    return saved.settled(Path(folder) / run / "ckpt", run_of(folder, run).steps)


def state(folder: str | os.PathLike, run: str) -> State:
    """How far a run of a study is, by its files alone. Raises ConfigError for a name that is no run of it."""
    about, path = run_of(folder, run), Path(folder) / run
    found = attempts_lib.read(path)["attempts"]
    last_failed = bool(found) and attempts_lib.failed(found[-1])
    return State(_name(folder, run, about, found), log.last_step(str(path / log.METRICS)), found, found[-1]["error"] if last_failed else None)


def _name(folder: str | os.PathLike, run: str, about: RunRecord, found: list[dict[str, Any]]) -> str:
    path = Path(folder) / run
    if changes(folder, run):
        return "stale"
    if is_finished(folder, run):
        return FINISHED
    if lock.held(path):
        return "running"
    if run in stopped(folder):
        return STOPPED
    if about.needs and not is_finished(folder, about.needs):
        return "waiting"
    if found and attempts_lib.failed(found[-1]):
        return "failed"
    if found and found[-1]["exit_code"] == 0:
        return "ready"  # at a rung
    return "cut" if found or (path / "config.json").is_file() else "ready"


def changes(folder: str | os.PathLike, run: str) -> dict[str, tuple[Any, Any]]:
    """Keys in which the config that a run's workdir holds differs from the study's, with (workdir's, study's); empty before it has begun. So is `data`, its fingerprint.

    Keys that only one of them knows were declared since the other was written, so that they stand at their defaults; but entries that are not there differ.
    """
    path, about = Path(folder) / run / "config.json", run_of(folder, run)
    held = _held(path)
    if held is None:
        return {}
    data = (_data_of(path.with_name("env.json")), about.fingerprints["data"] if "data" in about.fingerprints else None)
    return different(held, about.config) | ({} if None in data or data[0] == data[1] else {"data": data})


def _held(path: Path) -> dict[str, Any] | None:
    """The flat config.json of a workdir; None before it was begun."""
    try:
        return config_lib.flatten(dict(untrusted.read_json(path)))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); a checkpoint's meta/meta.json holds the config too, under the key config.") from None


def _data_of(path: Path) -> str | None:
    """The fingerprint of the data that a run was begun on, where its env.json tells it."""
    try:
        return untrusted.read_json(path)["fingerprints"]["data"]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def different(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What `changes` tells of two flat configs."""
    found = {key: (held[key], value) for key, value in wanted.items() if key in held and not _same(held[key], value)}
    lost = [key for key in {**held, **wanted} if key.endswith(".name") and (key in held) != (key in wanted)]
    return found | {key: (held.get(key), wanted.get(key)) for key in lost}


def _same(held: Any, wanted: Any) -> bool:
    if isinstance(wanted, str) and PLACE in wanted and isinstance(held, str):
        before, _, after = wanted.partition(PLACE)
        return held.startswith(before) and held.endswith(after)
    return held == wanted


def placed(folder: str | os.PathLike, run: str) -> dict[str, Any]:
    """The flat config of a run with the study's folder in the place of `$STUDY`; where its workdir was begun at another place, with that one's."""
    config, held = dict(run_of(folder, run).config), _held(Path(folder) / run / "config.json") or {}
    root = os.path.abspath(folder)
    for key, value in config.items():
        if isinstance(value, str) and PLACE in value:
            config[key] = held[key] if key in held else value.replace(PLACE, root)
    return config


def stopped(folder: str | os.PathLike) -> frozenset[str]:
    """The runs that halving left behind: those whose arms were all stopped, from the stage of the rungs on."""
    record = read(folder)
    if record.halving is None:
        return frozenset()
    out = {arm for rung in rungs(folder) for arm in rung["stopped"]}
    stage = record.halving.metric.partition(":")[0]
    later = stages_after(record, stage)
    return frozenset(run for run, about in record.runs.items() if about.stage in later and set(record.users[run]) <= out)


def rungs(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rungs that were decided: {"step", "values": {arm: mean or None}, "kept": [arm], "stopped": [arm]}."""
    try:
        found = untrusted.read_json(Path(folder) / HALVING)
        return [{"step": rung["step"], "values": dict(rung["values"]), "kept": list(rung["kept"]), "stopped": list(rung["stopped"])} for rung in found]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{Path(folder) / HALVING} is damaged ({error}); remove it, and the rungs are decided again.") from None


def stages_after(record: Record, stage: str) -> set[str]:
    """A stage, and all that start from its checkpoints, directly or not."""
    found = {stage}
    for entry in record.stages:
        if entry.after in found:
            found.add(entry.name)
    return found


def _rows(folder: str | os.PathLike, run: str) -> list[dict[str, Any]]:
    return log.read(str(Path(folder) / run / log.METRICS))


def final_metrics(folder: str | os.PathLike, run: str) -> dict[str, float]:
    """EVAL/METRIC -> the last value in metrics.jsonl."""
    evals = {key.split(".")[1] for key in run_of(folder, run).config if key.startswith("evals.")}
    values: dict[str, float] = {}
    for row in _rows(folder, run):
        values |= {key: value for key, value in row.items() if key.partition("/")[0] in evals and "/" in key}
    return values


def curve(folder: str | os.PathLike, run: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of each row of metrics.jsonl that has a metric, such as loss or validation/loss; a resume drops rows after its checkpoint there."""
    return [(row["step"], row[metric]) for row in _rows(folder, run) if metric in row]


def value_at(folder: str | os.PathLike, run: str, metric: str, step: int) -> float | None:
    """A metric of a run after a step, if it is there and finite."""
    return next((value for at, value in curve(folder, run, metric) if at == step and math.isfinite(value)), None)
