"""The options of `ptm predict`, which are its flags. Light: a mistake on the command line must not wait for JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ptm import fields
from ptm.fields import ConfigError, field
from ptm.generate.options import Options as GenerationOptions

BLANK = "[MASK]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(GenerationOptions):
    """Options of generation, and what is told besides the text."""

    stop: tuple[str, ...] = field((), doc=r"Texts at which a continuation ends, cut before the first one; \n in them is a line break.")
    token_ids: bool = field(False, doc="Tell the token ids and the score of each text.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillMask:
    """Options of filling blanks."""

    top_k: int = field(5, low=1, high=1000, unit="pieces", doc="Likeliest pieces that are told of each blank.")
    blank: str | None = field(None, doc=f"How a blank is written in the text; None = {BLANK}, or the tokenizer's own name for it, such as <mask>.")

    def check(self, where: str) -> None:
        if self.blank is not None and not self.blank.strip():
            raise ConfigError(f"--blank={self.blank!r} is empty; allowed: what stands for a blank in the text, such as [MASK].")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed:
    """Options of vectors of texts."""

    pooling: str = field(
        "mean",
        choices=("mean", "cls", "last"),
        doc="Mean over all positions, special ones included; or the hidden state of an encoder's cls, or of the last position.",
    )
    normalize: bool = field(False, doc="Divide vectors by their length, so that dot products are cosines.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Options of scores."""

    pieces: bool = field(False, doc="Tell the pieces that were scored and the log-probability of each.")
    by_word: bool = field(False, doc="Of encoders: mask the rest of a word together with each of its pieces (Kauf and Ivanova 2023).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A fine-tuned model answers as its objective says: no options."""


# Task: its options.
TASKS: dict[str, type] = {
    "generate": Generate, "fill-mask": FillMask, "classify": Answer, "tag": Answer, "answer": Answer, "embed": Embed, "score": Score,
}  # fmt: skip


def flags() -> dict[str, tuple[bool, str]]:
    """Name of every option -> whether it is true or false, and what it means for which tasks."""
    shown: dict[str, tuple[bool, str]] = {}
    for task, cls in TASKS.items():
        for f in dataclasses.fields(cls):
            text = f"{task}: {f.metadata['doc']} Default: {fields.unparse(f.default) or 'none'}."
            shown[f.name] = (isinstance(f.default, bool), f"{shown[f.name][1]} {text}" if f.name in shown else text)
    return shown


def parse(task: str, given: Mapping[str, str]) -> Any:
    """The options of a task from the texts of flags. Raises ConfigError for a task that is not there, and for what its options may not be."""
    cls = fields.lookup(TASKS, task, "task")
    hints = fields.annotations(cls)
    for key in given:
        if key not in hints:
            allowed = ", ".join(f"--{name}" for name in hints) or "none"
            raise ConfigError(f"--{key} is no option of --task={task}; allowed: {allowed}.{fields.nearest(key, hints)}")
    values = {key: fields.parse(text, hints[key], f"--{key}") for key, text in given.items()}
    if "stop" in values:
        values["stop"] = tuple(text.replace(r"\n", "\n") for text in values["stop"])
        if not values["stop"]:
            raise ConfigError(rf"--stop={given['stop']!r} holds no text; allowed: texts with commas between them, \n for a line break.")
    made = cls(**values)
    fields.check(made, "")
    return made
