"""Span corruption (Raffel et al. 2020, section 3.1.4): spans become sentinels in the input, the target is sentinels and spans."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of span corruption."""

    name: ClassVar[str] = "span_corruption"

    rate: float = field(0.15, low=0.0, high=1.0, doc="Share of tokens that are corrupted.")
    mean_span: float = field(3.0, low=1.0, unit="tokens", doc="Mean length of a corrupted span.")
    input_length: int = field(512, low=4, unit="tokens", doc="Length of the encoder's row.")
    visits: int | None = field(None, low=1, unit="epochs", doc="Different corruptions of a document; None = fresh each epoch.")
    z_loss: float = field(0.0, low=0.0, doc="Coefficient of the squared log-normaliser.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row: decoder L, encoder I."""
        return {"L": length, "I": self.input_length}

    def check(self, where: str) -> None:
        if self.rate in (0.0, 1.0):
            raise ConfigError(f"{where}.rate={self.rate} leaves nothing to {'predict' if self.rate == 0 else 'predict from'}; allowed: between 0 and 1.")

    def spans(self, num_tokens: int) -> tuple[int, int]:
        """(corrupted tokens, corrupted spans) of a piece of text, rounded as published."""
        noise = min(max(round(num_tokens * self.rate), 1), num_tokens - 1)
        return noise, min(max(round(noise / self.mean_span), 1), num_tokens - noise)

    def example_lengths(self, num_tokens: int) -> tuple[int, int]:
        """Lengths of (input, target) that a piece of `num_tokens` gives, with one end token each."""
        noise, spans = self.spans(num_tokens)
        return num_tokens - noise + spans + 1, noise + spans + 1

    def raw_length(self, length: int) -> int:
        """The longest piece of text whose input fits the encoder's row and whose target fits the decoder's."""
        fits = [n for n in range(2, self.input_length + length) if self.example_lengths(n)[0] <= self.input_length and self.example_lengths(n)[1] <= length]
        if not fits:
            raise ConfigError(f"no text fits objective.input_length={self.input_length} and data.length={length}; make them longer.")
        return fits[-1]


def random_spans(num_tokens: int, num_noise: int, num_spans: int, rng: np.random.Generator) -> np.ndarray:
    """Boolean mask [num_tokens] of `num_noise` corrupted tokens in `num_spans` spans, each after at least one clean token.

    All ways to cut the corrupted and the clean tokens into spans are equally likely.
    """

    def cut(total: int) -> np.ndarray:
        ends = np.sort(rng.permutation(total - 1)[: num_spans - 1]) + 1
        return np.diff(np.concatenate([[0], ends, [total]]))

    lengths = np.stack([cut(num_tokens - num_noise), cut(num_noise)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * num_spans) % 2 == 1, lengths)


def corrupt(tokens_L: np.ndarray, noise_L: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """`tokens_L` with each run of noise replaced by the next sentinel."""
    starts = noise_L & ~np.concatenate([[False], noise_L[:-1]])
    replaced = np.where(starts, sentinels[np.maximum(np.cumsum(starts) - 1, 0)], tokens_L)
    return replaced[~noise_L | starts].astype(np.int32)


class SpanCorruption(TokenObjective):
    """sentinels in -> sentinel targets; the decoder reads its targets shifted by one, after the padding token."""

    kinds = ("encoder_decoder",)
    mask = "causal"
    heads = ("lm",)

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if packing in ("window", "concat"):
            raise ConfigError(f"data.packing={packing} does not keep inputs beside their targets; allowed with span_corruption: default, first_fit, none.")
        super().__init__(z_loss=config.z_loss, token_bytes=tokenizer.token_bytes)
        self.config, self.tokenizer = config, tokenizer
        self.packing = "first_fit" if packing == "default" else packing
        self.lengths = config.lengths(length)
        self.raw_length = config.raw_length(length)
        needed = max(config.spans(n)[1] for n in range(2, self.raw_length + 1))
        if len(tokenizer.sentinels) < needed or tokenizer.eos_id is None or tokenizer.pad_id is None:
            raise ConfigError(
                f"objective span_corruption needs a tokenizer with pad, eos and {needed} sentinels; this one has "
                f"pad={tokenizer.pad_id}, eos={tokenizer.eos_id}, {len(tokenizer.sentinels)} sentinels. Set --config.tokenizer.sentinels={needed} or more."
            )
        tokens = Field(is_tokens=True, pad=tokenizer.pad_id)
        self.fields = {"inputs_BI": tokens, "tokens_BL": tokens, "targets_BL": tokens, "weights_BL": Field(np.float32, 0.0)}
        self.visits = config.visits
        self.target_positions = length
        self._sentinels = np.asarray(tokenizer.sentinels, np.int32)

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        num_tokens = len(doc.tokens_L)
        if num_tokens < 2:
            return
        noise_L = random_spans(num_tokens, *self.config.spans(num_tokens), rng)
        end = [self.tokenizer.eos_id]
        # A piece begins with a clean span; in the target its sentinel is the one that stands for the first corrupted span in the input.
        targets_L = np.concatenate([corrupt(doc.tokens_L, ~noise_L, self._sentinels), end]).astype(np.int32)
        yield {
            "inputs_BI": np.concatenate([corrupt(doc.tokens_L, noise_L, self._sentinels), end]).astype(np.int32),
            "tokens_BL": np.concatenate([[self.tokenizer.pad_id], targets_L[:-1]]).astype(np.int32),
            "targets_BL": targets_L,
            "weights_BL": np.ones(len(targets_L), np.float32),
        }
