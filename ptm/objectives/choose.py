"""Multiple choice (Radford et al. 2018, section 3.3; Devlin et al. 2019, section 4.4): each candidate is read with the context and scored."""

import dataclasses
import string
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.objectives.protocol import Batch, Ratio
from ptm.objectives.rows import PAIR, SHORTEST, UNKNOWN, SummaryConfig, SummaryTask, levelled

CHOICES, LABEL = "choices", "label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SummaryConfig):
    """Options of multiple choice. A record has the context as `text`, a list `choices`, a question as `pair` if there is one, and the right choice as
    `label`: its number, its text, or its letter (A is the first)."""

    name: ClassVar[str] = "choose"

    max_choices: int = field(4, low=2, doc="The most choices that a record has; all of them lie in one row.")
    first_number: int = field(0, choices=(0, 1), doc="The number that labels give the first choice.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row; a row holds one record for each 8 positions and choice at most."""
        return {"L": length, "S": self.max_choices * max(1, length // (SHORTEST * self.max_choices))}


class Choose(SummaryTask):
    """Softmax over the scores of a record's candidates, each the head `classify` with one output on the context and question + choice.

    A record is one example, so that its candidates stay together; `finish` makes a segment of each, with positions of its own.
    """

    usual_metrics = ("accuracy",)
    columns = (CHOICES, LABEL)
    config: Config

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        super().__init__(
            config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config, outputs=1,
            marked={"right": Field(np.int32, UNKNOWN)},
        )  # fmt: skip
        shortest = config.max_choices * (self.frame.overhead(2) + 2)
        if length < shortest:
            raise ConfigError(
                f"data.length={length} leaves no room for {config.max_choices} choices in a row; allowed: {shortest} or more, "
                "or a smaller objective.max_choices."
            )
        self.max_segments = self.lengths["S"] // config.max_choices
        self.fields = {**self.fields, "choice_BL": Field()}

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        choices, right = self._choices(doc), self.reference(doc)
        question = doc.columns[PAIR] if PAIR in doc.columns else None
        before = "" if question in (None, "") else f"{question} "
        texts = [[doc.tokens_L, self.encoded(f"{before}{choice}")] for choice in choices]
        rooms = levelled([sum(map(len, pair)) + self.frame.overhead(2) for pair in texts], self.lengths["L"])
        parts = []
        for n, (pair, room) in enumerate(zip(texts, rooms)):
            part = self.example(pair, doc, room=room, right=UNKNOWN if right is None else int(n == right))
            parts.append(part | {"choice_BL": np.full(len(part["tokens_BL"]), n, np.int32)})
        yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _choices(self, doc: Document) -> list[str]:
        choices = doc.columns[CHOICES] if CHOICES in doc.columns else None
        if not isinstance(choices, list | tuple | np.ndarray) or not all(isinstance(choice, str) for choice in choices):
            raise ConfigError(f"record {doc.id} has {str(choices)[:40]} as its field {CHOICES}; allowed: a list of texts. Map it with --config.data.columns.")
        if not 2 <= len(choices) <= self.config.max_choices:
            raise ConfigError(f"record {doc.id} has {len(choices)} choices; allowed: 2 to objective.max_choices={self.config.max_choices}.")
        return list(choices)

    def reference(self, doc: Document) -> int | None:
        """The place of the right choice, from 0; None if a record does not tell. A text that is one of the choices is that one, whatever else it may be."""
        choices, label = self._choices(doc), doc.columns[LABEL] if LABEL in doc.columns else None
        if label is None or label == "":
            return None
        if isinstance(label, str) and choices.count(label) == 1:
            return choices.index(label)
        number = None
        if isinstance(label, str) and label in string.ascii_uppercase:
            number = string.ascii_uppercase.index(label)
        elif isinstance(label, int) or isinstance(label, float) and label.is_integer() or isinstance(label, str) and label.strip().isdecimal():
            number = int(label) - self.config.first_number
        if number is None or not 0 <= number < len(choices):
            first = self.config.first_number
            raise ConfigError(
                f"record {doc.id} has the label {str(label)[:40]!r}; allowed: a number from {first} to {first + len(choices) - 1} (the first choice is "
                f"objective.first_number={first}), a letter from A on, or the text of one of its {len(choices)} choices."
            )
        return number

    def finish(self, row: Example) -> Example:
        """Makes a segment of each candidate; record_BS tells whose it is."""
        row = dict(row)
        record_L, choice_L = row["segments_BL"], row.pop("choice_BL")
        begins_L = np.flatnonzero((record_L > 0) & ((np.diff(record_L, prepend=0) != 0) | (np.diff(choice_L, prepend=0) != 0)))
        sizes = np.diff(np.append(begins_L, np.count_nonzero(record_L)))
        segments_L, positions_L = np.zeros_like(record_L), np.zeros_like(row["positions_BL"])
        for n, (begin, size) in enumerate(zip(begins_L, sizes)):
            segments_L[begin : begin + size], positions_L[begin : begin + size] = n + 1, np.arange(size)
        row = super().finish({**row, "segments_BL": segments_L, "positions_BL": positions_L})
        return {**row, "record_BS": np.append(record_L, 0)[row["index_BS"]]}

    def label_weights(self, batch: Batch) -> jax.Array:
        return (batch["right_BS"] == 1).astype(jnp.float32)

    def label_terms(self, logits_BSN: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, Ratio]]:
        scores_BS, record_BS, right_BS = logits_BSN[..., 0], batch["record_BS"], self.label_weights(batch)
        rivals_BSS = jnp.where(record_BS[:, :, None] == record_BS[:, None, :], scores_BS[:, None, :], -jnp.inf)
        nll_BS = jax.nn.logsumexp(rivals_BSS, axis=2) - scores_BS
        hits_BS = jnp.sum(rivals_BSS >= scores_BS[:, :, None], axis=2) == 1  # ties are misses
        return nll_BS, {"accuracy": (jnp.sum(hits_BS * right_BS), jnp.sum(right_BS))}

    def answer(self, doc: Document, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The place of the chosen text, from 0, the text, and the probability of each."""
        choices = self._choices(doc)
        scores_N = np.asarray(outputs[0]["logits"][: len(choices), 0], np.float64)
        shares_N = np.exp(scores_N - scores_N.max())
        place = int(np.argmax(scores_N))
        return {"prediction": place, "choice": choices[place], "probabilities": (shares_N / shares_N.sum()).tolist()}
