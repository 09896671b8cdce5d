"""Permutation language modelling (Yang et al. 2019): tokens predicted in a random order, with memory of the rows before."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field, keyed_rng
from ptm.fields import ConfigError, field
from ptm.models import Model
from ptm.nn.stack import Output
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.selected import SelectedObjective, take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of permutation language modelling."""

    name: ClassVar[str] = "permutation"
    heads: ClassVar[tuple[str, ...]] = ("lm",)

    partial: int = field(6, low=2, doc="K: one of so many tokens is predicted, those that come last in the order (section 2.3).")
    unit: str = field("span", choices=("span", "token"), doc="What is chosen at once: spans, or tokens anywhere (section 3.4: without span-based prediction).")
    span_max: int = field(5, low=1, unit="tokens", doc="Longest span; its length is n with a probability in proportion to 1/n (published code).")
    memory_length: int = field(0, low=0, unit="tokens", doc="Positions of the rows before that a row may see; 0 = none. Needs data.streams = train.batch_size.")
    bidirectional: bool = field(
        True, doc="Read half of the documents from their end, so that memory lies on both sides (section 3.1); without memory it changes nothing."
    )  # fmt: skip
    visits: int | None = field(None, low=1, unit="epochs", doc="Different orders of a document: 1 = static, None = a new one in each epoch.")
    z_loss: float = field(0.0, low=0.0, doc="Coefficient of the squared log-normaliser.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row; S leaves room for a quarter more than the expected number of targets, M is what is remembered."""
        return {"L": length, "S": max(1, math.ceil(1.25 * length / self.partial)), "M": self.memory_length}


def choose(num_tokens: int, *, config: Config, rng: np.random.Generator) -> np.ndarray:
    """Indices of the tokens to predict, ascending: one of K on average, and at least one token is none of them.

    Spans: a length n is drawn, and a span of n tokens is placed at random within the next K * n tokens (section 3.1).
    """
    if config.unit == "token":
        count = min(num_tokens - 1, int(num_tokens / config.partial + rng.random()))  # rounded at random, so that the share is exact on average
        return np.sort(rng.permutation(num_tokens)[: max(count, 0)])
    shares = np.cumsum(1 / np.arange(1, config.span_max + 1))
    chosen: list[int] = []
    start = 0
    while start < num_tokens:
        size = 1 + int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
        room = min(config.partial * size, num_tokens - start)
        size = min(size, room, num_tokens - 1)
        # The last tokens may be too few for a whole context: then the span is there as often as makes its share that of the others.
        if size and rng.random() * config.partial * size < room:
            first = start + int(rng.integers(room - size + 1))
            chosen += range(first, first + size)
        start += room
    return np.array(chosen, int)


class Permutation(SelectedObjective):
    """x -> x at the tokens that come last in a random order of their segment; the query stream predicts each from those before it.

    rank_BL is 0 for the context, which all see, and 1, 2, ... for targets, each of which the later ones see. A document ends with the tokenizer's
    sep and cls, which are context always. Orders depend on a segment alone, not on the row that it lies in.

    With memory the states of the last M positions of every row are carried to the next batch, where the same row goes on; they are visible to
    the segment that continues their document, which start_B = 1 says there is none of. Half of the documents then are read from their
    end, with the signs of their distances turned. Evaluation runs without memory: its rows do not continue each other from batch to batch.
    """

    kinds = ("encoder",)
    mask = "permutation"
    heads = Config.heads
    raw_length = None  # rows are cut, so that memory reaches through documents of any length

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if packing == "window":
            raise ConfigError("data.packing=window is for causal objectives; allowed with permutation: default, concat, first_fit, none.")
        super().__init__(z_loss=config.z_loss, token_bytes=tokenizer.token_bytes)
        self.config, self.tokenizer, self.visits = config, tokenizer, config.visits
        self.packing = "concat" if packing == "default" else packing
        self.lengths = config.lengths(length)
        self.target_positions = self.lengths["S"]
        self.fields = {"tokens_BL": Field(is_tokens=True), "noise_BL": Field()}
        if config.memory_length:
            self.fields |= {"start_BL": Field(), "reversed_BL": Field()}
        self._last = np.array([token for token in (tokenizer.sep_id, tokenizer.cls_id) if token is not None], np.int32)

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        if not len(doc.tokens_L):
            return
        backwards = bool(self.config.memory_length and self.config.bidirectional and rng.random() < 0.5)
        tokens_L = np.concatenate([doc.tokens_L[::-1] if backwards else doc.tokens_L, self._last]).astype(np.int32)
        example = {"tokens_BL": tokens_L, "noise_BL": rng.integers(2**31, size=len(tokens_L), dtype=np.int32)}  # orders are drawn where rows are cut
        if self.config.memory_length:
            example["start_BL"] = (np.arange(len(tokens_L)) == 0).astype(np.int32)
            example["reversed_BL"] = np.full(len(tokens_L), backwards, np.int32)
        yield example

    def finish(self, row: Example) -> Example:
        """Adds rank_BL, targets and weights, and what tells the rows of a memory apart; then as all objectives with selected positions."""
        row = dict(row)
        tokens_L, noise_L, segments_L = row["tokens_BL"], row.pop("noise_BL"), row["segments_BL"]
        rank_L = np.zeros_like(tokens_L)
        for segment in range(1, int(segments_L.max()) + 1):
            index = np.flatnonzero(segments_L == segment)
            rng = keyed_rng("order", tokens_L[index].tobytes().hex(), noise_L[index].tobytes().hex())
            index = index[~np.isin(tokens_L[index], self._last)]
            chosen = choose(len(index), config=self.config, rng=rng)
            rank_L[index[chosen]] = 1 + rng.permutation(len(chosen))
        if "start_BL" in row:
            row["start_B"] = row.pop("start_BL")[0]
        return super().finish({**row, "targets_BL": tokens_L, "rank_BL": rank_L, "weights_BL": (rank_L > 0).astype(np.float32)})

    def select(self, hidden_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As for all objectives, of hidden states that are those of the selected positions already."""
        index_BS = batch["target_index_BS"]
        return hidden_BSD, take(batch["targets_BL"], index_BS), take(batch["weights_BL"], index_BS)

    def token_terms(self, model: Model, params: Any, batch: Batch, out: Output) -> tuple[dict[str, jax.Array], Aux]:
        return super().token_terms(model, params, batch, out.replace(hidden_BLD=out.query_BSD))

    def init_carry(self, model: Model, batch_size: int) -> Any:
        return model.empty_cache(rows=batch_size, length=self.config.memory_length) if self.config.memory_length else None

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        if carry is not None:
            carry = {**carry, "valid_BM": carry["valid_BM"] * (1 - batch["start_B"])[:, None]}
        out = model.hidden(params, batch, mask=self.mask, cache=carry, train=train, rng=rng)
        return *self.token_terms(model, params, batch, out), out.cache
