"""Masked language modelling (Devlin et al. 2019, section 3.1), with whole words (its published code) and spans (Joshi et al. 2020)."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field, keyed_rng
from ptm.fields import ConfigError, field
from ptm.models import Model
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of masked language modelling."""

    name: ClassVar[str] = "mlm"

    rate: float = field(0.15, low=0.0, high=1.0, doc="Share of tokens that are predicted.")
    unit: str = field("token", choices=("token", "whole_word", "span"), doc="What is chosen at once: tokens, words, or spans of words.")
    mask_share: float = field(0.8, low=0.0, high=1.0, doc="Share of chosen tokens replaced by the mask token.")
    random_share: float = field(0.1, low=0.0, high=1.0, doc="Share of chosen tokens replaced by a random one; the rest stays.")
    span_p: float = field(0.2, low=0.01, high=1.0, doc="Success probability of the geometric span length (SpanBERT, section 3.1).")
    span_max: int = field(10, low=1, unit="words", doc="Longest span; longer draws are drawn again.")
    visits: int | None = field(None, low=1, unit="epochs", doc="Different maskings of a document: 1 = static, 10 = BERT's copies, None = dynamic.")
    z_loss: float = field(0.0, low=0.0, doc="Coefficient of the squared log-normaliser.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row; S leaves room for a quarter more than the expected number of chosen tokens."""
        return {"L": length, "S": min(length, max(1, math.ceil(1.25 * self.rate * length)))}

    def check(self, where: str) -> None:
        if self.rate in (0.0, 1.0):
            raise ConfigError(f"{where}.rate={self.rate} leaves nothing to {'predict' if self.rate == 0 else 'predict from'}; allowed: between 0 and 1.")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ConfigError(f"{where}.mask_share={self.mask_share} + {where}.random_share={self.random_share} exceed 1.")


def choose(num_tokens: int, word_starts_L: np.ndarray, *, config: Config, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens to predict, ascending, and a number below num_tokens of the token, word or span that each belongs to.

    On average they are rate * num_tokens, but for at least one unit in each document.
    """
    budget = min(num_tokens, max(1, int(config.rate * num_tokens + rng.random())))  # rounded at random, so that the rate is exact on average
    if config.unit == "token":
        chosen = np.sort(rng.permutation(num_tokens)[:budget])
        return chosen, chosen
    starts = np.flatnonzero(np.concatenate([[True], word_starts_L[1:]]))
    ends = np.append(starts[1:], num_tokens)
    unit_L = np.full(num_tokens, -1)
    left = budget
    for number, first in enumerate(rng.permutation(len(starts))):
        words = 1
        if config.unit == "span":
            words = rng.geometric(config.span_p)
            while words > config.span_max:
                words = rng.geometric(config.span_p)
        for word in range(first, min(first + words, len(starts))):
            if unit_L[starts[word]] >= 0:
                break  # a span ends before another
            size = ends[word] - starts[word]
            # The last word is not cut. Taken in proportion to the room that is left for it, it exceeds the budget as much as its absence falls short.
            if left == budget or rng.random() * size < left:
                unit_L[starts[word] : ends[word]] = number
            left -= size
            if left <= 0:
                chosen = np.flatnonzero(unit_L >= 0)
                return chosen, unit_L[chosen]
    raise AssertionError("the words hold all tokens, more than the budget")


class MLM(TokenObjective):
    """corrupted -> original at the chosen positions; the vocabulary projection runs on S positions of a row."""

    kinds = ("encoder",)
    mask = "full"
    heads = ("mlm",)
    raw_length = None  # a document is masked whole, then cut

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if tokenizer.mask_id is None:
            raise ConfigError("objective mlm needs a tokenizer with a mask token; this one has none. Choose another with --config.tokenizer.*.")
        if packing == "window":
            raise ConfigError("data.packing=window is for causal objectives; allowed with mlm: default, first_fit, concat, none.")
        super().__init__(z_loss=config.z_loss, token_bytes=tokenizer.token_bytes)
        self.config, self.tokenizer = config, tokenizer
        self.packing = "first_fit" if packing == "default" else packing
        self.lengths = config.lengths(length)
        self.fields = {"tokens_BL": Field(is_tokens=True), "targets_BL": Field(is_tokens=True), "weights_BL": Field(np.float32, 0.0)}
        self.visits = config.visits
        self.target_positions = self.lengths["S"]
        self._first, self._last = ([] if token is None else [token] for token in (tokenizer.cls_id, tokenizer.sep_id))
        self._room = length - len(self._first) - len(self._last)
        if self._room < 1:
            raise ConfigError(f"data.length={length} leaves no room between the tokenizer's cls and sep; allowed with mlm: {length - self._room + 1} or more.")
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), sorted(tokenizer.special_ids))

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        targets_L = doc.tokens_L.astype(np.int32)
        if not len(targets_L):
            return
        chosen, unit = choose(len(targets_L), self.tokenizer.word_starts(targets_L), config=self.config, rng=rng)
        # A span is replaced as a whole (SpanBERT, section 3.1), a word token by token (Devlin et al. 2019, published code).
        fate = rng.random(len(targets_L))[unit if self.config.unit == "span" else chosen]
        tokens_L, weights_L = targets_L.copy(), np.zeros(len(targets_L), np.float32)
        weights_L[chosen] = 1.0
        tokens_L[chosen[fate < self.config.mask_share]] = self.tokenizer.mask_id
        random = chosen[(fate >= self.config.mask_share) & (fate < self.config.mask_share + self.config.random_share)]
        tokens_L[random] = rng.choice(self._ordinary, len(random))
        for start in range(0, len(targets_L), self._room):
            part = slice(start, start + self._room)
            yield {
                "tokens_BL": self._framed(tokens_L[part], self._first, self._last),
                "targets_BL": self._framed(targets_L[part], self._first, self._last),
                "weights_BL": self._framed(weights_L[part], [0] * len(self._first), [0] * len(self._last)),
            }

    @staticmethod
    def _framed(x_L: np.ndarray, before: list[int], after: list[int]) -> np.ndarray:
        return np.concatenate([before, x_L, after]).astype(x_L.dtype)

    def finish(self, row: Example) -> Example:
        """Adds target_index_BS, the chosen positions (L where there is none); what overflows S is dropped at random, its weight set to 0."""
        length, room = self.lengths["L"], self.lengths["S"]
        chosen = np.flatnonzero(row["weights_BL"])
        dropped = np.float32(max(0, len(chosen) - room))
        weights_L = row["weights_BL"]
        if dropped:
            kept = np.sort(keyed_rng("overflow", row["tokens_BL"].tobytes().hex()).permutation(chosen)[:room])
            weights_L = np.zeros_like(weights_L)
            weights_L[kept] = row["weights_BL"][kept]
            chosen = kept
        index_S = np.full(room, length, np.int32)
        index_S[: len(chosen)] = chosen
        return {**row, "weights_BL": weights_L, "target_index_BS": index_S, "dropped_B": dropped}

    def select(self, hidden_BLD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        index_BS = batch["target_index_BS"]

        def take(x: jax.Array, index: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)

        return take(hidden_BLD, index_BS[..., None]), take(batch["targets_BL"], index_BS), take(batch["weights_BL"], index_BS)

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        totals, aux, carry = super().loss(model, params, batch, rng=rng, carry=carry, train=train)
        dropped = jnp.sum(batch["dropped_B"])
        ratios = {**aux.ratios, "dropped_share": (dropped, dropped + jnp.sum(batch["weights_BL"]))}
        return totals, aux.replace(ratios=ratios), carry
