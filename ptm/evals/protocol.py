"""What an eval is: a module with `Config`, `require(options, run)` and `evaluate(options, run, params)`; and what their configs share.

`run` is a ptm.run.Run, which lies above this package: evals use its config, tokenizer, model, objective and steps. `require` refuses before the training
what `evaluate` could not measure.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from ptm import atomic
from ptm import config as config_lib
from ptm.fields import ConfigError, field, unparse


@dataclasses.dataclass(frozen=True)
class Measured:
    """Values by name, and what was answered record by record, ready for JSON; None for evals that answer nothing."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When to evaluate, and on what: the validation split of the run, or records of other files."""

    of_objective: ClassVar[bool] = False  # whether it measures an objective, each part of a mixture on its own, or the model

    every: int = field(500, low=1, unit="steps", doc="Evaluate each time so many steps are done, and after the last.")
    batch_size: int | None = field(None, low=1, unit="rows", doc="Rows of a batch; None = train.batch_size.")
    source: tuple[str, ...] = field((), doc="FORMAT:PATH, ... of the records, all of them; empty = the run's validation split.")
    columns: tuple[str, ...] = field((), doc="Map of fields to columns, as data.columns; empty = the run's data.columns.")
    document: str | None = field(None, choices=("line", "paragraph", "file"), doc="What one document of a text source is; None = as data.document.")

    def check(self, where: str) -> None:
        for entry in self.source:
            if ":" not in entry:
                raise ConfigError(f"{where}.source={unparse(self.source)}: '{entry}' is not of the form FORMAT:PATH, such as jsonl:test.jsonl.")
        config_lib.column_entries(self.columns, where=where)

    def data(self, data: config_lib.Data) -> config_lib.Data:
        """The run's `data` with the records of this eval as its validation split."""
        return dataclasses.replace(
            data, validation_source=self.source or data.validation_source, columns=self.columns or data.columns, document=self.document or data.document
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordsConfig(EvalConfig):
    """The same for evals that go through records one by one."""

    examples: int | None = field(None, low=1, unit="records", doc="Records of each file that are measured at most; None = all.")


def rows_of(options: EvalConfig, run: Any) -> int:
    """Rows of a batch of an eval."""
    return options.batch_size or run.config.train.batch_size


def file_of(id: str) -> str:
    """The name of the file that a record comes from, without its ending: 'causative' of '3/causative.jsonl:12'."""
    name = id.rpartition(":")[0] or id
    number, slash, rest = name.partition("/")
    return str(PurePosixPath(rest if slash and number.isdecimal() else name).with_suffix(""))


def predictions_path(workdir: Path, name: str, step: int, *, which: str = "") -> Path:
    """Where predictions of an eval at a step lie; `which` parameters, such as @ema, unless those of the training."""
    return workdir / "predictions" / f"{name}-{step}{which}.jsonl"


def write(path: Path, predictions: Iterable[dict[str, Any]]) -> None:
    """Writes predictions as JSON lines, all or nothing. Raises ConfigError where the folder cannot be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    except OSError as error:
        raise ConfigError(f"predictions cannot be written to {path} ({error.strerror}); give another place with --predictions=FILE.") from None
