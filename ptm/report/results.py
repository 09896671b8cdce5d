"""The numbers of a study: values by arm and seed, what is missing, comparisons with the base, verdicts on the orderings that were claimed."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptm import statistics
from ptm.fields import ConfigError
from ptm.report import reading
from ptm.statistics import ALPHA, Comparison, Summary
from ptm.study import folder

DAMAGED = "damaged"
NOT_STARTED = {"ready": "was not started", "waiting": "was not started, it waits for the stage before it"}
TOLD = {
    "running": "is running", "cut": "was cut off", "failed": "failed", "stopped": "was stopped early, by halving", "stale": "has another config than the study now",
    DAMAGED: "has files that cannot be read",
}  # fmt: skip
REPRODUCED, REVERSED, NOT_DISTINGUISHABLE, NOT_TESTED = "reproduced", "reversed", "not distinguishable", "not tested"
DIFFERS, NO_DIFFERENCE = "a difference was found", "no difference was found"


@dataclasses.dataclass(frozen=True)
class Hole:
    """A run, or a metric of a finished run, that the tables have to do without."""

    run: str
    arms: tuple[str, ...]
    seed: int
    stage: str
    state: str
    told: str


@dataclasses.dataclass(frozen=True)
class Contrast:
    """An arm against the base by one metric: differences arm - base paired by seed; p corrected over all comparisons of the study."""

    found: Comparison | None
    corrected: float | None
    same: bool  # whether both are the same runs
    better: bool | None  # whether the arm's mean is the better one

    @property
    def told(self) -> str:
        """The comparison in words."""
        if self.same:
            return "the same runs as the base"
        if self.found is None:
            return "not compared: no seed has both"
        if self.corrected is None:
            return f"not tested: {self.found.why}"
        return "not distinguishable from base" if self.corrected >= ALPHA else f"{'better' if self.better else 'worse'} than base"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What our runs say of an ordering that the paper claims; `found` is of the differences better - worse, positive where the claim holds."""

    ordering: Any
    found: Comparison | None
    corrected: float | None
    margin: float | None
    same: bool  # whether both arms are the same runs
    word: str

    @property
    def told(self) -> str:
        """What a reader has to know besides the word."""
        if self.same:
            return "both arms are the same runs"
        if self.word == NOT_TESTED:
            return self.found.why if self.found else "no seed has both arms"
        if self.word == NOT_DISTINGUISHABLE:
            lost = f"p = {self.found.p:.3f} does not outlast the correction, and " if self.found.p < ALPHA else ""
            return f"{lost}{self.found.difference.n} seeds do not tell these arms apart, which does not show them to be equal"
        if self.word == NO_DIFFERENCE and self.margin is not None:
            return f"that is not equivalence, for which a margin must be chosen beforehand; one of {self.margin:.3g} or more would have shown it here (two one-sided t-tests)"
        return ""


class Results:
    """A study folder, read once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.study = folder.read(self.path)
        self.rungs = folder.rungs(self.path) if self.study.halving is not None else []
        self.files: dict[str, reading.Files] = {}  # of the runs that have begun
        self.states = {run: self._read(run) for run in self.study.runs}
        self._finals = {run: folder.final_metrics(self.path, run) for run, state in self.states.items() if state.name == "finished"}

    def _read(self, run: str) -> folder.State:
        """The state of a run; files that cannot be read cost this run alone."""
        try:
            if (self.path / run / "config.json").is_file():
                self.files[run] = reading.read(self.path / run)
            return folder.state(self.path, run)
        except ConfigError as error:
            return folder.State(DAMAGED, None, [], str(error))

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """The study's metrics by name, each with a label."""
        return {metric.name: dataclasses.replace(metric, label=metric.label or metric.name) for metric in self.study.metrics}

    @functools.cached_property
    def arms(self) -> dict[str, Any]:
        """The study's arms by name, the base first."""
        return {arm.name: arm for arm in sorted(self.study.arms, key=lambda arm: arm.name != self.study.base)}

    @functools.cached_property
    def values(self) -> dict[str, dict[str, dict[int, float]]]:
        """Metric -> arm -> seed -> its final value, in the units of the tables; of finished runs, finite ones alone."""
        return {name: {arm: self._values(arm, metric) for arm in self.arms} for name, metric in self.metrics.items()}

    def _values(self, arm: str, metric: Any) -> dict[int, float]:
        stage, _, key = metric.name.partition(":")
        found = {}
        for seed, runs in self.arms[arm].runs.items():
            if stage in runs and runs[stage] in self._finals and key in (finals := self._finals[runs[stage]]) and math.isfinite(finals[key]):
                found[seed] = metric.scale * finals[key]
        return found

    @functools.cached_property
    def summaries(self) -> dict[str, dict[str, Summary | None]]:
        """Metric -> arm -> the summary over its seeds; None where there is no value."""
        return {
            name: {arm: statistics.summary(list(values.values())) if values else None for arm, values in by_arm.items()} for name, by_arm in self.values.items()
        }

    @functools.cached_property
    def holes(self) -> list[Hole]:
        """Everything that a complete study would have and this one has not."""
        found = []
        for run, about in self.study.runs.items():
            state = self.states[run]
            where = (run, self.study.users[run], about.seed, about.stage)
            if state.name in NOT_STARTED:
                told = f"waits at step {state.step:,} of {about.steps:,}" if state.step else NOT_STARTED[state.name]
                found.append(Hole(*where, "missing", told))
            elif state.name != "finished":
                told = TOLD[state.name] if state.name in ("stale", DAMAGED) else f"{TOLD[state.name]} at step {state.step or 0:,} of {about.steps:,}"
                attempts = f", {len(state.attempts)} attempts" if len(state.attempts) > 1 else ""
                found.append(Hole(*where, state.name, told + attempts + (f": {state.error}" if state.error else "")))
            else:
                found += [Hole(*where, "finished", told) for told in self._lacks(run, about.stage)]
        return found

    def _lacks(self, run: str, stage: str) -> list[str]:
        keys = [name.partition(":")[2] for name in self.metrics if name.partition(":")[0] == stage]
        finals = self._finals[run]
        lost = [f"finished without {key}" for key in keys if key not in finals]
        return lost + [f"ended with {key} = {finals[key]}" for key in keys if key in finals and not math.isfinite(finals[key])]

    def _paired(self, metric: str, first: str, second: str) -> list[float]:
        """Differences first - second of the seeds that have both."""
        one, two = self.values[metric][first], self.values[metric][second]
        return [one[seed] - two[seed] for seed in one if seed in two]

    def _same(self, metric: str, first: str, second: str) -> bool:
        stage = metric.partition(":")[0]
        return [runs[stage] for runs in self.arms[first].runs.values()] == [runs[stage] for runs in self.arms[second].runs.values()]

    @functools.cached_property
    def contrasts(self) -> dict[str, dict[str, Contrast]]:
        """Metric -> arm -> its comparison with the base."""
        base, out = self.study.base, {}
        pairs = [(name, arm) for name in self.metrics for arm in self.arms if arm != base]
        same = {pair: self._same(*pair, base) for pair in pairs}
        found = {pair: None if same[pair] else statistics.paired(self._paired(*pair, base)) for pair in pairs}
        corrected = _corrected(found)
        for name, metric in self.metrics.items():
            out[name] = {}
            for arm in self.arms:
                if arm != base:
                    pair = (name, arm)
                    better = (found[pair].difference.mean > 0) == metric.higher if found[pair] else None
                    out[name][arm] = Contrast(found[pair], corrected[pair], same[pair], better)
        return out

    @functools.cached_property
    def comparisons(self) -> int:
        """How many comparisons with the base were tested, over which p values are corrected."""
        return sum(contrast.corrected is not None for by_arm in self.contrasts.values() for contrast in by_arm.values())

    @functools.cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each ordering that is claimed; p values are corrected over the orderings."""
        orderings = dict(enumerate(self.study.orderings))
        same = {n: self._same(ordering.metric, ordering.better, ordering.worse) for n, ordering in orderings.items()}
        differences = {n: [] if same[n] else self._in_favour(ordering) for n, ordering in orderings.items()}
        found = {n: statistics.paired(values) for n, values in differences.items()}
        corrected = _corrected(found)
        return [
            Verdict(ordering, found[n], corrected[n], statistics.equivalence_margin(differences[n]), same[n], _word(ordering.relation, found[n], corrected[n]))
            for n, ordering in orderings.items()
        ]

    def _in_favour(self, ordering: Any) -> list[float]:
        sign = 1 if self.metrics[ordering.metric].higher else -1
        return [sign * difference for difference in self._paired(ordering.metric, ordering.better, ordering.worse)]

    def published(self, arm: str, metric: str) -> Any:
        """The published number of an arm, or None."""
        return next((entry for entry in self.study.published if (entry.arm, entry.metric) == (arm, metric)), None)

    @functools.cached_property
    def code(self) -> dict[tuple[str, bool], list[str]]:
        """Version of the code -> the runs in the tables that were made with it, wholly or in part."""
        found: dict[tuple[str, bool], list[str]] = {}
        for run in self._finals:
            for version in reading.code([*self.states[run].attempts, *(self.files[run].history if run in self.files else ())]):
                found.setdefault(version, []).append(run)
        return found

    def curve(self, arm: str, stage: str, key: str, *, scale: float = 1.0) -> tuple[list[tuple[float, float, float | None, float | None]], int]:
        """Mean over seeds of a metric by step, and one standard deviation to both sides; and the number of seeds.

        Of finished runs, or where none is finished of those that have begun; at the steps at which all of them have finite values.
        """
        runs = list(dict.fromkeys(runs[stage] for runs in self.arms[arm].runs.values() if stage in runs))
        chosen = [run for run in runs if run in self._finals] or [run for run in runs if run in self.files]
        curves = [{step: scale * value for step, value in folder.curve(self.path, run, key) if math.isfinite(value)} for run in chosen]
        curves = [curve for curve in curves if curve]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        points = []
        for step in steps:
            found = statistics.summary([curve[step] for curve in curves])
            points.append((step, found.mean, *((None, None) if found.sd is None else (found.mean - found.sd, found.mean + found.sd))))
        return points, len(curves)


def _corrected(found: Mapping[Any, Comparison | None]) -> dict[Any, float | None]:
    """p values by Holm over those that were tested."""
    tested = [key for key, comparison in found.items() if comparison is not None and comparison.p is not None]
    return dict.fromkeys(found) | dict(zip(tested, statistics.holm([found[key].p for key in tested])))


def _word(relation: str, found: Comparison | None, corrected: float | None) -> str:
    if corrected is None:
        return NOT_TESTED
    if relation == "~":
        return DIFFERS if corrected < ALPHA else NO_DIFFERENCE
    if corrected >= ALPHA:
        return NOT_DISTINGUISHABLE
    return REPRODUCED if found.difference.mean > 0 else REVERSED


def counted(verdicts: Sequence[Verdict]) -> str:
    """How many orderings got which verdict."""
    counts = {
        word: sum(verdict.word == word for verdict in verdicts) for word in (REPRODUCED, REVERSED, NOT_DISTINGUISHABLE, NO_DIFFERENCE, DIFFERS, NOT_TESTED)
    }
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
