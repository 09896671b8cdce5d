"""Span corruption (Raffel et al. 2020, section 3.1.4): spans become sentinels in the input, the target is sentinels and spans."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ptm.fields import ConfigError, field
from ptm.objectives.conditional import Conditional, ConditionalConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ConditionalConfig):
    """Options of span corruption."""

    name: ClassVar[str] = "span_corruption"

    rate: float = field(0.15, low=0.0, high=1.0, doc="Share of tokens that are corrupted.")
    mean_span: float = field(3.0, low=1.0, unit="tokens", doc="Mean length of a corrupted span.")

    def check(self, where: str) -> None:
        if self.rate in (0.0, 1.0):
            raise ConfigError(f"{where}.rate={self.rate} leaves nothing to {'predict' if self.rate == 0 else 'predict from'}; allowed: between 0 and 1.")

    def noise(self, num_tokens: int) -> int:
        """Corrupted tokens of a piece of text, rounded as published."""
        return min(max(round(num_tokens * self.rate), 1), num_tokens - 1)

    def spans(self, num_tokens: int) -> tuple[int, int]:
        """(corrupted tokens, corrupted spans) of a piece of text."""
        noise = self.noise(num_tokens)
        return noise, min(max(round(noise / self.mean_span), 1), num_tokens - noise)

    def example_lengths(self, num_tokens: int) -> tuple[int, int]:
        noise, spans = self.spans(num_tokens)
        return num_tokens - noise + spans + 1, noise + spans + 1

    def sentinels(self, num_tokens: int) -> int:
        """Sentinels that a piece of text may need."""
        return self.spans(num_tokens)[1]


def random_spans(num_tokens: int, num_noise: int, num_spans: int, rng: np.random.Generator) -> np.ndarray:
    """Boolean mask [num_tokens] of `num_noise` corrupted tokens in `num_spans` spans, each after at least one clean token.

    All ways to cut the corrupted and the clean tokens into spans are equally likely.
    """

    def cut(total: int) -> np.ndarray:
        ends = np.sort(rng.permutation(total - 1)[: num_spans - 1]) + 1
        return np.diff(np.concatenate([[0], ends, [total]]))

    lengths = np.stack([cut(num_tokens - num_noise), cut(num_noise)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * num_spans) % 2 == 1, lengths)


def replace(tokens_L: np.ndarray, noise_L: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(input, target): each run of noise becomes the next sentinel in the input; the target is the sentinels with their runs."""
    starts = noise_L & ~np.concatenate([[False], noise_L[:-1]])
    used = sentinels[: starts.sum()]
    inputs = tokens_L.copy()
    inputs[starts] = used
    return inputs[~noise_L | starts], np.insert(tokens_L[noise_L], np.flatnonzero(starts[noise_L]), used)


class SpanCorruption(Conditional):
    """sentinels in -> sentinel targets; the decoder reads its targets shifted by one, after the padding token."""

    kinds = ("encoder_decoder",)
    config: Config

    def __init__(
        self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any, reserved: int = 0, **options: Any
    ) -> None:  # fmt: skip
        """The last `reserved` sentinels have another meaning."""
        super().__init__(config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config, **options)
        self.sentinels = np.asarray(tokenizer.sentinels[: len(tokenizer.sentinels) - reserved], np.int32)
        needed = max(config.sentinels(n) for n in range(2, self.raw_length + 1))
        if len(self.sentinels) < needed or tokenizer.eos_id is None:
            raise ConfigError(
                f"objective {config.name} needs a tokenizer with pad, eos and {needed + reserved} sentinels; this one has pad={tokenizer.pad_id}, "
                f"eos={tokenizer.eos_id}, {len(tokenizer.sentinels)} sentinels. Set --config.tokenizer.sentinels={needed + reserved} or more."
            )

    def pair(self, tokens_L: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return replace(tokens_L, random_spans(len(tokens_L), *self.config.spans(len(tokens_L)), rng), self.sentinels)
