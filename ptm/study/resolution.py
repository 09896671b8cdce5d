"""From a study file to study.json: every arm's stages resolved and checked before anything runs.

Of each arm and stage one config is made, under the first seed; it is held to the declared differences, and the seeds are put in last. Runs get their names
here: those of one identity are one run, and a folder that was begun keeps its own.
"""

import dataclasses
import json
import os
import random
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptm import adopt, describe, fields, labels, recipe, registry
from ptm import config as config_lib
from ptm import run as run_lib
from ptm.config import Config
from ptm.data import pipeline
from ptm.fields import ConfigError
from ptm.study import checks, folder, identity
from ptm.study.folder import PLACE, ArmRecord, Record, RunRecord, SearchRecord, StageRecord
from ptm.study.language import Arm, Stage, Study, split_key

SHOWN = 12  # keys of a message
Templates = dict[tuple[str, str], Config]  # (arm, stage) -> its config under the first seed


def load(spec: str) -> Study:
    """The study of `FILE.py[:ARGUMENT]`, by calling the file's `get_study(argument)`. Raises ConfigError for whatever can be seen without its recipes."""
    return checks.check(recipe.call(spec, function="get_study", what="study"), file=spec.partition(":")[0])


def prepare(
    spec: str, *, workdir: str | os.PathLike, overrides: Mapping[str, str], write: bool = True, asked: Mapping[int, Mapping[str, Any]] | None = None
) -> Record:
    """The record of a study in its folder, new or with what was added to it; see `ptm.study.prepare`. `asked` are the trials of its search, by default those so far."""
    study, root = load(spec), Path(workdir)
    old = folder.read(root) if (root / folder.FILE).is_file() else None
    if old is None and (root / "config.json").is_file():
        raise ConfigError(f"{root} is the workdir of one run; give a study a folder of its own, DIR/ARM/seedK/STAGE will be below it.")
    if asked is None:
        asked = old.search.asked if old is not None and old.search is not None else {}
    record = resolve(study, spec=spec, overrides=overrides, root=root, old=old, asked=asked, data=write)
    if write and (old is None or _content(record) != _content(old)):
        folder.write(root, record)
    return record


def _content(record: Record) -> dict[str, Any]:
    return {key: value for key, value in folder.stored(record).items() if key not in ("made", "git")}


def resolve(
    study: Study, *, spec: str, overrides: Mapping[str, str], root: Path, old: Record | None, asked: Mapping[int, Mapping[str, Any]], data: bool
) -> Record:
    """The record of a checked study. With `data` the data must be there; without it a note tells where it is not."""
    file, _, argument = spec.partition(":")
    name = Path(file).stem
    begun = [run for run in old.runs if (root / run / "config.json").is_file()] if old is not None else []
    if begun and (old.name, old.argument) != (name, argument):
        raise ConfigError(
            f"{root} holds the study {old.name}{f':{old.argument}' if old.argument else ''}, not {name}{f':{argument}' if argument else ''}; use a new --workdir."
        )
    trials = [Arm(folder.trial_name(number), dict(values)) for number, values in asked.items()] if study.search is not None else []
    study = dataclasses.replace(study, arms=(*study.arms, *trials))
    by_stage = _by_stage(overrides, study)
    templates = _templates(study, file=file, overrides=by_stage)
    probe = _probe(study)
    probes = _templates(dataclasses.replace(study, arms=probe), file=file, overrides=by_stage)
    differences = _differences(study, templates | probes, arms=(*study.arms, *probe), file=file)
    for (arm, stage), config in (templates | probes).items():
        _check_stage(study, config, arm=arm, stage=stage, file=file)
    known, notes = _Data(), []
    fingerprints = {}
    for place, config in templates.items():
        try:
            templates[place], fingerprints[place] = known.of(config)
        except ConfigError as error:
            told = f"arm '{place[0]}', stage '{place[1]}': {error}"
            if data:
                raise ConfigError(f"study '{file}', {told}") from None
            fingerprints[place] = {"data": None, "tokenizer": None}
            notes.append(f"{told} So its fingerprint and labels stay open here, and the study cannot be run here.")
    arms, runs = _runs(study, templates, fingerprints, root=root, old=old, begun=begun)
    notes = [*notes[:1], *_same_arms(arms), *_left_behind(runs, begun)]
    search = study.search and SearchRecord(
        metric=study.search.metric, trials=study.search.trials, space={key: str(entry) for key, entry in study.search.space.items()},
        asked={number: dict(values) for number, values in asked.items()},
    )  # fmt: skip
    record = Record(
        name=name, file=file, argument=argument, claim=study.claim, paper=study.paper, base=study.base, differs=study.differs, seeds=study.seeds,
        stages=tuple(StageRecord(stage.name, stage.recipe, stage.after) for stage in study.stages), metrics=study.metrics, published=study.published,
        orderings=study.orderings, halving=study.halving, search=search,
        arms=tuple(ArmRecord(arm.name, differences[arm.name], arms[arm.name]) for arm in study.arms), runs=runs,
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"), git=describe.git_state(), overrides=dict(overrides), notes=tuple(notes),
    )  # fmt: skip
    return folder.record_of(json.loads(json.dumps(folder.stored(record))))  # as it will be read


# Configs.


def _by_stage(overrides: Mapping[str, str], study: Study) -> dict[str, dict[str, str]]:
    """Stage -> key -> text of the overrides STAGE.SECTION.KEY of the command line."""
    found: dict[str, dict[str, str]] = {stage.name: {} for stage in study.stages}
    for key, text in overrides.items():
        stage, _, own = key.partition(".")
        if stage not in found or not own:
            hint = fields.nearest(stage, found)
            raise ConfigError(f"--config.{key}: overrides of a study begin with a stage, --config.STAGE.SECTION.KEY=VALUE; stages: {', '.join(found)}.{hint}")
        if own == "seed":
            raise ConfigError(f"--config.{key}: the seeds of a study are those of its file; change them there.")
        found[stage][own] = text
    return found


def _templates(study: Study, *, file: str, overrides: Mapping[str, Mapping[str, str]]) -> Templates:
    made: Templates = {}
    for stage in study.stages:
        for arm in study.arms:
            parent = made[arm.name, stage.after] if stage.after else None
            try:
                config = _config(study, arm, stage, parent=parent, file=file, given=overrides[stage.name])
            except ConfigError as error:
                raise ConfigError(f"study '{file}', arm '{arm.name}', stage '{stage.name}': {error}") from None
            made[arm.name, stage.name] = dataclasses.replace(config, seed=study.seeds[0])
    return made


def _config(study: Study, arm: Arm, stage: Stage, *, parent: Config | None, file: str, given: Mapping[str, str]) -> Config:
    """The config of an arm's stage: the recipe, what the stage overrides, then the command line, then what the arm does."""
    config = recipe.load(_found(arm.recipes[stage.name] if stage.name in arm.recipes else stage.recipe, file))
    own = {key: value for (where, key), value in ((split_key(key, study), value) for key, value in arm.overrides.items()) if where == stage.name}
    changes = {key: fields.unparse(value) for key, value in {**stage.overrides, **given, **own}.items()}

    def override(key: str, text: str) -> None:
        try:
            config_lib.override(config, key, text, registry.REGISTRIES)
        except ConfigError as error:
            raise ConfigError(str(error).replace("--config.", f"--config.{stage.name}." if key in given and key not in own else "")) from None

    if parent is not None:
        if "init" in changes:
            raise ConfigError(f"init={changes['init']}, but the stage starts from the final checkpoint of '{stage.after}'; leave it out.")
        config.init = "scratch"
        config_lib.set_section(config, "model", parent.model)
        config_lib.set_section(config, "tokenizer", dataclasses.replace(parent.tokenizer, path=PLACE, extra=None))
        config_lib.set_section(config, "mup", parent.mup)
    elif "init" in changes:
        override("init", changes.pop("init"))
    adopt.adopt(config)
    for key, text in changes.items():
        override(key, text)
    return registry.resolve(config)


def _found(spec: str, file: str) -> str:
    """A recipe's spec as it can be loaded: from the working directory, else from the folder that the study file's folder lies in."""
    path = spec.partition(":")[0]
    beside = Path(file).resolve().parent.parent / path
    return str(beside) + spec[len(path) :] if not os.path.isfile(path) and beside.is_file() else spec


def _probe(study: Study) -> tuple[Arm, ...]:
    """An arm as the search may ask for one, to be refused before it starts."""
    if study.search is None:
        return ()
    return (Arm("of the search", {key: entry.draw(random.Random(0)) for key, entry in study.search.space.items()}),)


def _check_stage(study: Study, config: Config, *, arm: str, stage: str, file: str) -> None:
    """Refuses metrics of evals that a config has not, and rungs at which nothing is evaluated."""
    for number, metric in enumerate(study.metrics):
        where, _, key = metric.name.partition(":")
        name = key.partition("/")[0]
        if where == stage and name not in config.evals:
            raise ConfigError(
                f"study '{file}': metrics[{number}].name='{metric.name}', but arm '{arm}' has no eval '{name}' in stage '{stage}'; its evals: "
                f"{', '.join(config.evals) or 'none'}.{fields.nearest(name, config.evals)}"
            )
        if study.halving is not None and metric.name == study.halving.metric and where == stage:
            every, steps = config.evals[name].every, config.train.steps
            if bad := [rung for rung in study.halving.rungs if rung % every or rung >= steps]:
                raise ConfigError(
                    f"study '{file}': halving.rungs has {bad[0]}, but arm '{arm}' is evaluated by '{name}' every {every} steps and ends at step {steps}; allowed: "
                    f"multiples of {every} below {steps}."
                )


# Differences.


def _differences(study: Study, templates: Templates, *, arms: Iterable[Arm], file: str) -> dict[str, dict[str, list[Any]]]:
    """Arm -> "STAGE:KEY" -> [value of the base, own value]. Raises ConfigError for patterns that match no key, and for differences that none declares."""
    declared = [split_key(pattern, study) for pattern in study.differs]
    for pattern, (stage, own) in zip(study.differs, declared):
        known = list(dict.fromkeys(key for (_, where), config in templates.items() if where == stage for key in config_lib.flatten(config)))
        if not any(_matches(own, key) for key in known):
            prefixes = dict.fromkeys(f"{'.'.join(parts[:n])}.*" for key in known for parts in [key.split(".")] for n in range(1, len(parts)))
            hint = fields.nearest(own, prefixes) if own.endswith("*") else config_lib.nearest_key(own, known)
            raise ConfigError(
                f"study '{file}': differs has '{pattern}', which no key of stage '{stage}' matches; allowed: keys, or prefixes such as objective.*.{hint}"
            )
    found: dict[str, dict[str, list[Any]]] = {}
    wrong: list[str] = []
    for arm in arms:
        found[arm.name] = {}
        for stage in study.stages:
            for key, (base, own) in _difference(templates, stage, arm.name, study.base).items():
                found[arm.name][f"{stage.name}:{key}"] = [base, own]
                if not any(where == stage.name and _matches(pattern, key) for where, pattern in declared):
                    wrong.append(f"  arm '{arm.name}', {stage.name}:{key}: {fields.unparse(base)} -> {fields.unparse(own)}")
    if wrong:
        more = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise ConfigError(
            f"study '{file}': arms differ from the base '{study.base}' in keys that differs={study.differs!r} does not declare; declare them, or make the arms "
            "equal in them:\n" + "\n".join(wrong[:SHOWN] + more)
        )
    return json.loads(json.dumps(found))


def _matches(pattern: str, key: str) -> bool:
    return pattern in (key, "*") or pattern.endswith(".*") and key.startswith(pattern[:-1])


def _difference(templates: Templates, stage: Stage, arm: str, base: str) -> dict[str, tuple[Any, Any]]:
    """What differs in a stage, but for the model and tokenizer that both have from the stage before it."""
    changes = config_lib.diff(templates[base, stage.name], templates[arm, stage.name])
    if stage.after is None:
        return changes
    before = config_lib.diff(templates[base, stage.after], templates[arm, stage.after])
    return {key: pair for key, pair in changes.items() if not (key.startswith(("model.", "tokenizer.")) and key in before and before[key] == pair)}


# Data.


class _Data:
    """What the data says of configs, each asked once: labels that are left to it, fingerprints."""

    def __init__(self) -> None:
        self._labels: dict[str, Any] = {}
        self._found: dict[str, dict[str, str | None]] = {}

    def of(self, config: Config) -> tuple[Config, dict[str, str | None]]:
        """The config with its labels, and the fingerprints of its data and of a tokenizer that is not made of it. Raises ConfigError where data is missing."""
        asked = config_lib.fingerprint({"objective": config_lib.to_dict(config.objective), "data": config_lib.to_dict(config.data)})
        if asked not in self._labels:
            self._labels[asked] = labels.filled(config).objective
        sections = {"data": config_lib.to_dict(config.data), "tokenizer": config_lib.to_dict(config.tokenizer), "init": config.init}
        named = config_lib.fingerprint(sections)
        if named not in self._found:
            self._found[named] = {"data": pipeline.fingerprint(config.data), "tokenizer": tokenizer_fingerprint(config)}
        return dataclasses.replace(config, objective=self._labels[asked]), self._found[named]


def tokenizer_fingerprint(config: Config) -> str | None:
    """The fingerprint of a tokenizer that is read from files; None for one that follows from the config and the data, or from the stage before."""
    given = config.tokenizer.path is not None or config.init.startswith(("hf:", "hub:"))
    return run_lib.make_tokenizer(config, None, abstract=True).fingerprint if given and config.tokenizer.path != PLACE else None


# Runs.


def _runs(
    study: Study,
    templates: Templates,
    fingerprints: Mapping[tuple[str, str], Mapping[str, str | None]],
    *,
    root: Path,
    old: Record | None,
    begun: Iterable[str],
) -> tuple[dict[str, dict[int, dict[str, str]]], dict[str, RunRecord]]:
    """Arm -> seed -> stage -> run, and the runs in the order in which they are to be run. Raises ConfigError where one that was begun has another config now."""
    order = [(seed, stage, arm.name) for seed in study.seeds for stage in study.stages for arm in study.arms]
    identities: dict[tuple[int, str, str], str] = {}
    for seed, stage, arm in order:
        config = _flat(templates[arm, stage.name], seed=seed, parent="" if stage.after else None)
        parent = identities[seed, stage.after, arm] if stage.after else None
        identities[seed, stage.name, arm] = identity.of(config, fingerprints[arm, stage.name], parent=parent)
    earlier = identity.recorded(old) if old is not None else {}
    wanted = set(identities.values())
    kept = {own: run for run, own in reversed(earlier.items()) if own in wanted}
    names = dict(kept)
    arms_folders = identity.folders((arm.name for arm in study.arms), taken=folder.OWN)
    arms: dict[str, dict[int, dict[str, str]]] = {arm.name: {seed: {} for seed in study.seeds} for arm in study.arms}
    runs: dict[str, RunRecord] = {}
    for seed, stage, arm in order:
        own = identities[seed, stage.name, arm]
        needs = arms[arm][seed][stage.after] if stage.after else None
        template = templates[arm, stage.name]
        config = _flat(template, seed=seed, parent=f"{needs}@{runs[needs].steps}" if needs else None)
        if own not in names:
            names[own] = _new_name(arms_folders[arm], f"seed{seed}/{stage.name}", set(names.values()))
            if names[own] in begun:
                _refuse(root, names[own], old.runs[names[own]], config, fingerprints[arm, stage.name])
        arms[arm][seed][stage.name] = run = names[own]
        if run not in runs:
            steps = template.train.steps
            runs[run] = RunRecord(
                stage=stage.name, seed=seed, identity=own, needs=needs, steps=steps, tokens=_tokens(template), config=config,
                fingerprints=dict(fingerprints[arm, stage.name]),
            )  # fmt: skip
    return arms, runs


def _flat(config: Config, *, seed: int, parent: str | None) -> dict[str, Any]:
    """The flat config of a run; `parent` is the run that it starts from, as RUN@STEP."""
    flat = config_lib.flatten(config) | {"seed": seed}
    if parent is not None:
        flat["init"] = f"ckpt:{PLACE}/{parent}"
        if flat["tokenizer.path"] == PLACE:
            flat["tokenizer.path"] = f"{PLACE}/{parent.rpartition('@')[0]}/tokenizer"
    return json.loads(json.dumps(flat))


def _new_name(arm: str, rest: str, taken: set[str]) -> str:
    """A name that no other run has, though an arm that was renamed keeps the folder of its old name."""
    number, name = 1, f"{arm}/{rest}"
    while name in taken:
        number += 1
        name = f"{arm}-{number}/{rest}"
    return name


def _refuse(root: Path, run: str, before: RunRecord, config: Mapping[str, Any], fingerprints: Mapping[str, str | None]) -> None:
    changes = folder.different(identity.current(before), config)
    changes |= {name: (old, fingerprints[name]) for name, old in before.fingerprints.items() if old != fingerprints[name]}
    told = [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in list(changes.items())[:SHOWN]] or ["  the run that it starts from"]
    raise ConfigError(
        f"{root / run} was begun, and is another run now; use a new --workdir, give the changed arm another name, or undo these changes:\n" + "\n".join(told)
    )


def _tokens(config: Config) -> int:
    """Positions of the batches of all steps, padding included; of a mixture those of its longest rows."""
    total = 0
    for phase in registry.phases(config):
        lengths = config.objective.lengths(phase.length)
        row = lengths["L"] + (lengths["I"] if "I" in lengths and config.model.kind == "encoder_decoder" else 0)
        total += phase.steps(config) * phase.batch_size * row
    return total


def _same_arms(arms: Mapping[str, Mapping[int, Mapping[str, str]]]) -> list[str]:
    """Tells of arms that have all runs in common."""
    found: dict[str, list[str]] = {}
    for arm, runs in arms.items():
        found.setdefault(json.dumps(runs, sort_keys=True), []).append(arm)
    return [f"The arms {', '.join(map(repr, same))} are the same: their runs are made once." for same in found.values() if len(same) > 1]


def _left_behind(runs: Mapping[str, RunRecord], begun: Iterable[str]) -> list[str]:
    """Tells of runs that were begun and belong to no arm any more."""
    lost = [run for run in begun if run not in runs]
    shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    return [f"{len(lost)} runs that were begun belong to the study no more, though their folders stay: {shown}."] if lost else []
