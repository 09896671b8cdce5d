"""The checks of a study that need none of its recipes: every mistake is told with the field of the study file that holds it."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptm import fields
from ptm.fields import ConfigError
from ptm.study.language import Arm, Distribution, Metric, Ordering, Published, Stage, Study, split_key

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RELATIONS = (">", "~")


def check(study: Any, *, file: str) -> Study:
    """The study with its sequences as tuples, held to what can be seen without its recipes. Raises ConfigError naming the field of the study file."""
    if not isinstance(study, Study):
        raise ConfigError(f"get_study of '{file}' returned a {type(study).__name__}; it must return a ptm.study.Study.")
    try:
        return _checked(study)
    except ConfigError as error:
        raise ConfigError(f"study '{file}': {error}") from None


def _checked(study: Study) -> Study:
    kinds = {"stages": Stage, "arms": Arm, "metrics": Metric, "published": Published, "orderings": Ordering, "differs": str, "seeds": int}
    study = dataclasses.replace(study, **{name: _entries(study, name, kind) for name, kind in kinds.items()})
    for name in ("claim", "paper", "base"):
        _require_text(getattr(study, name), name)
    for name in ("stages", "arms", "seeds", "metrics"):
        if not getattr(study, name):
            raise ConfigError(f"{name} is empty; give at least one.")
    _check_stages(study.stages)
    _check_arms(study)
    if wrong := [seed for seed in study.seeds if not 0 <= seed < 2**31]:
        raise ConfigError(f"seeds: {wrong[0]} is out of range; allowed: 0 to {2**31 - 1}.")
    _require_different(study.seeds, "seeds")
    _require_different([metric.name for metric in study.metrics], "metrics")
    for number, metric in enumerate(study.metrics):
        _check_metric(metric.name, study, f"metrics[{number}].name")
        if not isinstance(metric.higher, bool):
            raise ConfigError(f"metrics[{number}].higher={metric.higher!r}; allowed: True where more is better, False where less is.")
        if not _number(metric.scale) or metric.scale <= 0:
            raise ConfigError(f"metrics[{number}].scale={metric.scale!r}; allowed: a number above 0, such as 100.0.")
    arms, metrics = [arm.name for arm in study.arms], [metric.name for metric in study.metrics]
    for number, entry in enumerate(study.published):
        _require_known(entry.arm, arms, f"published[{number}].arm")
        _require_known(entry.metric, metrics, f"published[{number}].metric")
        if not _number(entry.value) or entry.sd is not None and not _number(entry.sd):
            raise ConfigError(f"published[{number}]: value={entry.value!r}, sd={entry.sd!r}; allowed: numbers.")
    for number, ordering in enumerate(study.orderings):
        _require_known(ordering.better, arms, f"orderings[{number}].better")
        _require_known(ordering.worse, arms, f"orderings[{number}].worse")
        _require_known(ordering.metric, metrics, f"orderings[{number}].metric")
        _require_known(ordering.relation, RELATIONS, f"orderings[{number}].relation")
        if ordering.better == ordering.worse:
            raise ConfigError(f"orderings[{number}] compares '{ordering.better}' with itself; name two arms.")
    _check_halving(study)
    _check_search(study)
    return study


def _entries(study: Study, name: str, kind: type) -> tuple[Any, ...]:
    given = getattr(study, name)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"{name}={given!r} is no list; write {name}=({given!r},).")
    made = tuple(given)
    for number, entry in enumerate(made):
        if not isinstance(entry, kind) or isinstance(entry, bool):
            raise ConfigError(f"{name}[{number}]={entry!r} is a {type(entry).__name__}; allowed: {kind.__name__}.")
    return made


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_text(value: Any, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}={value!r}; allowed: a text that is not empty.")


def _require_known(word: Any, known: Iterable[str], where: str) -> None:
    listed = list(known)
    if word not in listed:
        raise ConfigError(f"{where}={word!r} is not there; allowed: {', '.join(map(repr, listed))}.{fields.nearest(str(word), listed)}")


def _require_different(values: Iterable[Any], where: str) -> None:
    listed = list(values)
    if twice := [value for value in listed if listed.count(value) > 1]:
        raise ConfigError(f"{where} has {twice[0]!r} twice; keep one.")


def _check_stages(stages: Sequence[Stage]) -> None:
    for number, stage in enumerate(stages):
        if not isinstance(stage.name, str) or not NAME.fullmatch(stage.name):
            raise ConfigError(f"stages[{number}].name={stage.name!r}; allowed: a letter, then letters, digits, - and _.")
        _require_text(stage.recipe, f"stages[{number}].recipe")
        _check_overrides(stage.overrides, f"stages[{number}].overrides")
        if stage.after is not None:
            _require_known(stage.after, [other.name for other in stages[:number]], f"stages[{number}].after")
            if "init" in stage.overrides:
                raise ConfigError(
                    f"stages[{number}].overrides set init, but the stage starts from the final checkpoint of '{stage.after}'; leave one of both out."
                )
    _require_different([stage.name for stage in stages], "stages")


def _check_overrides(overrides: Any, where: str) -> None:
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(f"{where}={overrides!r}; allowed: a dict of dotted keys with values, such as {{'objective.rate': 0.5}}.")
    if "seed" in overrides:
        raise ConfigError(f"{where} set seed; the seeds of a study are its field `seeds`.")


def _check_arms(study: Study) -> None:
    stages = {stage.name: stage for stage in study.stages}
    for number, arm in enumerate(study.arms):
        where = f"arms[{number}]"
        _require_text(arm.name, f"{where}.name")
        _check_overrides(arm.overrides, f"{where}.overrides")
        for key in arm.overrides:
            stage, own = split_key(key, study)
            _require_known(stage, stages, f"the stage of {where}.overrides['{key}']")
            if own == "seed" or own == "init" and stages[stage].after is not None:
                raise ConfigError(f"{where}.overrides['{key}']: that is the study's to set; leave it out.")
        for stage in arm.recipes:
            _require_known(stage, stages, f"{where}.recipes")
    _require_different([arm.name for arm in study.arms], "arms (names)")
    _require_known(study.base, [arm.name for arm in study.arms], "base")
    for number, pattern in enumerate(study.differs):
        _require_known(split_key(pattern, study)[0], stages, f"the stage of differs[{number}]='{pattern}'")


def _check_metric(name: Any, study: Study, where: str) -> None:
    stage, colon, metric = str(name).partition(":")
    if not colon or not all(metric.partition("/")):
        raise ConfigError(f"{where}={name!r}; allowed: 'STAGE:EVAL/METRIC', such as '{study.stages[-1].name}:validation/loss'.")
    _require_known(stage, [entry.name for entry in study.stages], f"the stage of {where}='{name}'")


def _check_halving(study: Study) -> None:
    halving = study.halving
    if halving is None:
        return
    _require_known(halving.metric, [metric.name for metric in study.metrics], "halving.metric")
    rungs = halving.rungs
    if not isinstance(rungs, Sequence) or not rungs or not all(isinstance(step, int) and step > 0 for step in rungs) or list(rungs) != sorted(set(rungs)):
        raise ConfigError(f"halving.rungs={rungs!r}; allowed: steps in ascending order, such as (100, 300).")
    if not _number(halving.keep) or not 0 < halving.keep < 1:
        raise ConfigError(f"halving.keep={halving.keep!r}; allowed: a share between 0 and 1.")
    if study.search is not None:
        raise ConfigError("halving and search exclude each other: rungs compare a fixed set of arms. Leave one of them out.")


def _check_search(study: Study) -> None:
    search = study.search
    if search is None:
        return
    _require_known(search.metric, [metric.name for metric in study.metrics], "search.metric")
    if taken := [arm.name for arm in study.arms if re.fullmatch(r"trial \d+", arm.name)]:
        raise ConfigError(f"arms: '{taken[0]}' is what a trial of the search is called; give the arm another name.")
    if not isinstance(search.trials, int) or search.trials < 1:
        raise ConfigError(f"search.trials={search.trials!r}; allowed: 1 or more.")
    if not isinstance(search.space, Mapping) or not search.space:
        raise ConfigError("search.space is empty; give keys with distributions, as in {'optimizer.learning_rate': log_uniform(1e-4, 1e-2)}.")
    for key, distribution in search.space.items():
        if not isinstance(distribution, Distribution):
            raise ConfigError(f"search.space['{key}']={distribution!r} is no distribution; allowed: uniform, log_uniform, integers, choice.")
        _require_known(split_key(key, study)[0], [stage.name for stage in study.stages], f"the stage of search.space['{key}']")
