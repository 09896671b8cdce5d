"""Labels that a config leaves to the data: a scan of the records, without tokenizing, fills them in before a run is made.

The config that is then written to the workdir and to checkpoints has the names; a run that goes on takes them from there.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ptm import config as config_lib
from ptm import fields, untrusted
from ptm.config import Config
from ptm.data.documents import Corpus
from ptm.fields import ConfigError
from ptm.objectives import OBJECTIVES, mixture
from ptm.objectives.rows import BALANCED, LabelConfig
from ptm.objectives.tag import OUTSIDE

MOST = 1000  # more different labels are text
_log = logging.getLogger(__name__)


def filled(config: Config, workdir: Path | None = None) -> Config:
    """The config with the labels and balanced class weights that its objective, or parts of it, leave open: those of the run that the workdir
    holds, else of its data.

    Names are taken from all records of data.source, held-out ones included, numbers of examples from the training split alone. Raises ConfigError
    where no record has a label, where there is but one, or too many to be labels.
    """
    objective = config.objective
    parts = dict(objective.parts) if isinstance(objective, mixture.Config) else {"": objective}
    saved = _saved(workdir)
    found = {
        name: _filled(part, config, where=f"objective.parts.{name}" if name else "objective", saved=saved[name] if name in saved else {})
        for name, part in parts.items()
    }
    if all(found[name] is part for name, part in parts.items()):
        return config
    return dataclasses.replace(config, objective=dataclasses.replace(objective, parts=found) if isinstance(objective, mixture.Config) else found[""])


def assumed(config: Config) -> Config:
    """The config with two labels of equal weight wherever they would be taken from the data, for a plan that opens none."""

    def stood_in(part: Any) -> Any:
        if not isinstance(part, LabelConfig) or part.labels and part.class_weights != BALANCED:
            return part
        return dataclasses.replace(part, labels=part.labels or ("O", "B-1"), class_weights=() if part.class_weights == BALANCED else part.class_weights)

    objective = config.objective
    if isinstance(objective, mixture.Config):
        return dataclasses.replace(config, objective=dataclasses.replace(objective, parts={name: stood_in(part) for name, part in objective.parts.items()}))
    return dataclasses.replace(config, objective=stood_in(objective))


def check_columns(data: config_lib.Data, columns: Sequence[str], *, objective: str) -> None:
    """Raises ConfigError where `data.columns` maps no column to a field that an objective learns from."""
    entries = config_lib.column_entries(data.columns)
    for number, source in enumerate(data.source):
        mapped = [field.partition(".")[0] for place, field, _ in entries if place in (None, number)]
        if lacking := [field for field in columns if field not in mapped]:
            wanted = ",".join(f"{field}=COLUMN" for field in ("text", *columns))
            raise ConfigError(
                f"objective {objective} learns from the fields text, {', '.join(columns)}, but data.columns={fields.unparse(data.columns)} maps no "
                f"{', '.join(lacking)} for {source}; set --config.data.columns={wanted}."
            )


def _saved(workdir: Path | None) -> dict[str, dict[str, Any]]:
    """The sections of the objective and of its parts by name, '' being the objective, that a started run left in its workdir."""
    path = None if workdir is None else Path(workdir) / "config.json"
    if path is None or not path.is_file():
        return {}
    try:
        objective = untrusted.read_json(path)["objective"]
        return {"": objective, **(objective["parts"] if "parts" in objective else {})}
    except (KeyError, TypeError, ValueError):
        return {}  # a damaged file is refused where it is read as a whole


def _filled(part: Any, config: Config, *, where: str, saved: dict[str, Any]) -> Any:
    if not isinstance(part, LabelConfig) or part.labels and part.class_weights != BALANCED:
        return part
    if saved and saved["name"] == part.name:
        if not part.labels and saved["labels"]:
            part = dataclasses.replace(part, labels=tuple(saved["labels"]))
        if part.class_weights == BALANCED and saved["class_weights"]:
            part = dataclasses.replace(part, class_weights=tuple(saved["class_weights"]))
    if part.labels and part.class_weights != BALANCED:
        return part
    check_columns(config.data, OBJECTIVES[part.name].build.columns, objective=part.name)
    names, counts = _scan(part, config, where=where)
    if not part.labels:
        part = dataclasses.replace(part, labels=_ordered(names))
    if part.class_weights == BALANCED:
        # In inverse proportion to their numbers, 1 on average over the examples (King and Zeng 2001, section 4.2).
        total, known = counts.total(), [label for label in part.labels if counts[label]]
        weights = {label: total / (len(known) * counts[label]) for label in known}
        part = dataclasses.replace(part, class_weights=tuple(f"{label}={weight:.6g}" for label, weight in weights.items()))
    fields.check(part, where)
    return part


def _records(config: Config) -> Iterator[tuple[bool, str, dict[str, Any]]]:
    """(whether it is trained on, id, columns) of all records of data.source."""
    for split in ("train",) if config.data.validation_source else ("train", "validation"):
        corpus = Corpus(config.data, split=split)
        for source, size in enumerate(corpus.sizes):
            for number in range(size):
                found = corpus.record(source, number)
                if found is not None:
                    yield split == "train", corpus.id(source, number), found[1]


def _scan(part: LabelConfig, config: Config, *, where: str) -> tuple[set[str], collections.Counter]:
    """Names of all labels, and how many examples of the training split have each."""
    names, counts, unlabelled, records = set(), collections.Counter(), 0, 0
    fix = f"name them with --config.{where}.labels=A,B,..., or see --config.data.columns, which is {fields.unparse(config.data.columns)}"
    for trained, record, columns in _records(config):
        here = part.names_in(record, columns)
        records, unlabelled = records + 1, unlabelled + (not here)
        names.update(here)
        if trained:
            counts.update(here)
        if len(names) > MOST and not part.labels:
            some = ", ".join(repr(name[:30]) for name in sorted(names)[:3])
            raise ConfigError(
                f"{where}.labels: more than {MOST:,} different labels ({some}, ...); is the field of the label mapped to a column of text? Else {fix}."
            )
    if not names:
        raise ConfigError(f"{where}.labels: none of {records:,} records of {', '.join(config.data.source)} has a label; {fix}.")
    if len(names) == 1 and not part.labels:
        raise ConfigError(f"{where}.labels: all records have the one label {min(names)!r}; there is nothing to tell apart. Take other data, or {fix}.")
    if unlabelled:
        _log.warning("%d of %d records have no label: nothing is learned from them.", unlabelled, records)
    return names, counts


def _ordered(names: set[str]) -> tuple[str, ...]:
    """Numbers by their value, all else by its letters; the tag of what is no entity comes first."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        numbers = {}
    if numbers and all(map(math.isfinite, numbers.values())):
        return tuple(sorted(names, key=lambda name: (numbers[name], name)))
    return tuple(sorted(names, key=lambda name: (name != OUTSIDE, name)))
