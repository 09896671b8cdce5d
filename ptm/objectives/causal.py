"""Causal language modelling (Radford et al. 2018, section 3.1): predict each token from those before it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import field
from ptm.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of causal language modelling."""

    name: ClassVar[str] = "causal"

    boundaries: bool = field(
        True, doc="Begin documents with the tokenizer's bos (or eos), end them with its eos, if it has them; data.packing=window adds none."
    )
    z_loss: float = field(0.0, low=0.0, doc="Coefficient of the squared log-normaliser.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row."""
        return {"L": length}


class Causal(TokenObjective):
    """x -> x shifted by one; every real target counts."""

    kinds = ("decoder", "encoder")  # an encoder under the causal mask is BERT's left-to-right ablation
    mask = "causal"
    visits = None

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        super().__init__(z_loss=config.z_loss, token_bytes=tokenizer.token_bytes)
        self.packing = "concat" if packing == "default" else packing
        self.lengths = config.lengths(length)
        self.fields = {"tokens_BL": Field(is_tokens=True), "targets_BL": Field(is_tokens=True), "weights_BL": Field(np.float32, 0.0)}
        self.heads = ("lm",) if model_config.kind == "decoder" else ("mlm",)
        self.target_positions = length
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        # A random window seldom begins or ends where its document does.
        self._start, self._end = (start, tokenizer.eos_id) if config.boundaries and self.packing != "window" else (None, None)
        added = (self._start is not None) + (self._end is not None)
        self.raw_length = None if self.packing in ("concat", "window") else length + 1 - added

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        start, end = ([] if token is None else [token] for token in (self._start, self._end))
        x = np.concatenate([start, doc.tokens_L, end]).astype(np.int32)
        if len(x) > 1:
            yield {"tokens_BL": x[:-1], "targets_BL": x[1:], "weights_BL": np.ones(len(x) - 1, np.float32)}
