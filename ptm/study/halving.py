"""Successive halving: after each rung the better part of the arms goes on (Jamieson and Talwalkar 2016, section 3).

All runs of an arm that is still in go to the rung, in all seeds; arms are ranked by the mean of the metric there, those last that have no finite value under
one of the seeds: what diverges is not ranked by the seeds that were lucky. What was decided is written to halving.json, and is not decided again. Claims about an arm that was stopped are not tested: the report names it.
"""

import json
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ptm import atomic
from ptm.saved import owed, steps_in
from ptm.study import folder
from ptm.study.folder import Record


def rung(root: Path, record: Record) -> int | None:
    """The next rung that is not decided; None where there is none."""
    if record.halving is None:
        return None
    decided = len(folder.rungs(root))
    return record.halving.rungs[decided] if decided < len(record.halving.rungs) else None


def limit(root: Path, record: Record, run: str) -> int | None:
    """The step at which a run has to wait for the others; None where it may go to its end."""
    return rung(root, record) if record.halving is not None and record.runs[run].stage == _stage(record) else None


def at_limit(root: Path, record: Record, run: str) -> bool:
    """Whether a run waits at a rung, or for one: the stages after that of the rungs wait until all are decided."""
    step = rung(root, record)
    if step is None:
        return False
    stage = record.runs[run].stage
    if stage == _stage(record):
        last = max(steps_in(root / run / "ckpt"), default=0)
        return last >= step and not owed(root / run / "ckpt", last)
    return stage in folder.stages_after(record, _stage(record))


def decide(root: Path, record: Record, *, lost: Collection[str]) -> dict[str, Any] | None:
    """Decides the next rung once all runs that are still in have come to it; `lost` are those that never will. None if there is nothing to decide yet."""
    step = rung(root, record)
    if step is None:
        return None
    before = {arm for entry in folder.rungs(root) for arm in entry["stopped"]}
    arms = {arm.name: [runs[_stage(record)] for runs in arm.runs.values()] for arm in record.arms if arm.name not in before}
    if any(run not in lost and not at_limit(root, record, run) for runs in arms.values() for run in runs):
        return None
    values = {arm: _mean(root, record, runs, step) for arm, runs in arms.items()}
    kept = _best(values, higher=_higher(record), count=math.ceil(len(arms) * record.halving.keep)) | {record.base}
    entry = {"step": step, "values": values, "kept": [arm for arm in arms if arm in kept], "stopped": [arm for arm in arms if arm not in kept]}
    atomic.write(root / folder.HALVING, json.dumps([*folder.rungs(root), entry], indent=1) + "\n")
    return entry


def _stage(record: Record) -> str:
    return record.halving.metric.partition(":")[0]


def _higher(record: Record) -> bool:
    return next(metric.higher for metric in record.metrics if metric.name == record.halving.metric)


def _mean(root: Path, record: Record, runs: list[str], step: int) -> float | None:
    metric = record.halving.metric.partition(":")[2]
    values = [folder.value_at(root, run, metric, step) for run in runs]
    return None if None in values else statistics.fmean(values)


def _best(values: dict[str, float | None], *, higher: bool, count: int) -> set[str]:
    """The best arms; of equal ones the earlier, and those without a value last."""
    ranked = sorted(values, key=lambda arm: (values[arm] is None, 0 if values[arm] is None else -values[arm] if higher else values[arm]))
    return set(ranked[:count])
