"""Regression on a text or a pair of texts, such as their similarity (Devlin et al. 2019, section 4.1, STS-B): one output, mean squared error."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.objectives.protocol import Batch, Ratio
from ptm.objectives.rows import SummaryConfig, SummaryTask

LABEL = "label"  # the column with the number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SummaryConfig):
    """Options of regression. The number of a record is its field `label`, a second text its field `pair`: data.columns=text=A,pair=B,label=C."""

    name: ClassVar[str] = "regress"

    low: float | None = field(None, doc="Smallest answer; with `high` the output is squashed into the range by a sigmoid. None = any number.")
    high: float | None = field(None, doc="Largest answer.")

    def check(self, where: str) -> None:
        if (self.low is None) != (self.high is None) or self.low is not None and self.low >= self.high:
            raise ConfigError(f"{where}.low={self.low} and {where}.high={self.high}; allowed: two numbers, low below high, or None for both.")


class Regress(SummaryTask):
    """Mean squared error of the head `classify` with one output."""

    usual_metrics = ("pearson", "spearman")
    config: Config

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        super().__init__(
            config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config, outputs=1,
            marked={"label": Field(np.float32, math.nan)},
        )  # fmt: skip

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        value = self.reference(doc)
        yield self.example(self.texts(doc), doc, room=self.lengths["L"], label=math.nan if value is None else value)

    def reference(self, doc: Document) -> float | None:
        """The number of a record; None if it has none. Raises ConfigError for what is no number or beyond `low` and `high`."""
        value = doc.columns[LABEL] if LABEL in doc.columns else None
        if value is None or value == "":
            return None
        low, high = self.config.low, self.config.high
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) <= np.finfo(np.float32).max:  # nan neither
            raise ConfigError(f"record {doc.id} has the label {str(value)[:40]!r}; allowed with objective regress: numbers. See data.columns.")
        if low is not None and not low <= number <= high:
            raise ConfigError(f"record {doc.id} has the label {number}; allowed by objective.low and objective.high: {low} to {high}.")
        return number

    def label_weights(self, batch: Batch) -> jax.Array:
        return (~jnp.isnan(batch["label_BS"])).astype(jnp.float32)

    def _values(self, logits: jax.Array) -> jax.Array:
        low, high = self.config.low, self.config.high
        return logits if low is None else low + (high - low) * jax.nn.sigmoid(logits)

    def label_terms(self, logits_BSN: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, Ratio]]:
        weights_BS = self.label_weights(batch)
        error_BS = (self._values(logits_BSN[..., 0]) - jnp.nan_to_num(batch["label_BS"])) * weights_BS
        return jnp.square(error_BS), {"absolute_error": (jnp.sum(jnp.abs(error_BS)), jnp.sum(weights_BS))}

    def answer(self, doc: Document, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The number, in the range that was asked for."""
        return {"prediction": float(self._values(jnp.float32(outputs[0]["logits"][0, 0])))}
