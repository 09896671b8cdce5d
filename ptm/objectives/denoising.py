"""The unsupervised objectives that T5 compares (Raffel et al. 2020, section 3.3 and table 3), each a way to make an input and a target of a text."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ptm.fields import ConfigError, field
from ptm.objectives import prefix, span_corruption
from ptm.objectives.conditional import OneRowConfig
from ptm.objectives.span_corruption import SpanCorruption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(span_corruption.Config, OneRowConfig):
    """Options of T5's unsupervised objectives."""

    name: ClassVar[str] = "denoising"

    variant: str = field(
        "replace_spans", doc="What becomes of a text.",
        choices=("prefix_lm", "bert_style", "mass_style", "deshuffling", "iid_spans", "drop_tokens", "replace_spans"),
    )  # fmt: skip
    random_share: float = field(0.1, low=0.0, high=1.0, doc="Share of corrupted tokens that bert_style replaces by a random one, not by the mask.")
    prefix_share: float | None = field(None, low=0.0, high=1.0, doc="Share of a text that is the input of prefix_lm; None = every split is equally likely.")

    def check(self, where: str) -> None:
        span_corruption.Config.check(self, where)
        OneRowConfig.check(self, where)

    def example_lengths(self, num_tokens: int) -> tuple[int, int]:
        return VARIANTS[self.variant].lengths(self, num_tokens)

    def total_length(self, num_tokens: int) -> int:
        return num_tokens + 2 if self.variant == "prefix_lm" else sum(self.example_lengths(num_tokens))

    def sentinels(self, num_tokens: int) -> int:
        if self.variant == "replace_spans":
            return self.spans(num_tokens)[1]
        return self.runs(num_tokens) if self.variant == "iid_spans" else 0

    def runs(self, num_tokens: int) -> int:
        """Most runs that tokens chosen one by one can form."""
        noise = self.noise(num_tokens)
        return min(noise, num_tokens - noise + 1)


class Denoising(SpanCorruption):
    """What the variant gives -> what it asks for; in one row an end token stands between the two, but for the continuation that prefix_lm asks for."""

    kinds = ("encoder_decoder", "decoder")
    config: Config

    def __init__(
        self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any, before: tuple[int, ...] = (), reserved: int = 0
    ) -> None:  # fmt: skip
        super().__init__(
            config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config, mask=config.mask, counted=config.counted,
            before=before, separated=config.variant != "prefix_lm", reserved=reserved,
        )  # fmt: skip
        self.mask_id = tokenizer.mask_id if tokenizer.mask_id is not None else next(iter(tokenizer.sentinels), None)
        if self.mask_id is None and config.variant in ("bert_style", "mass_style"):
            raise ConfigError(f"objective denoising, variant={config.variant}, needs a mask token or a sentinel; set --config.tokenizer.sentinels=1 or more.")
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), sorted(tokenizer.special_ids))

    def pair(self, tokens_L: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return VARIANTS[self.config.variant].make(self, tokens_L, rng)

    def chosen(self, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """Boolean mask of the tokens that are corrupted: as many as the rate says, all sets of them equally likely."""
        chosen_L = np.zeros(num_tokens, bool)
        chosen_L[rng.permutation(num_tokens)[: self.config.noise(num_tokens)]] = True
        return chosen_L


class Variant(NamedTuple):
    """`lengths(config, tokens)`: largest (input, target), with one end token each. `make(objective, tokens_L, rng)`: (input, target) without them."""

    lengths: Callable[[Config, int], tuple[int, int]]
    make: Callable[[Denoising, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _masked(objective: Denoising, tokens_L: np.ndarray, rng: np.random.Generator, *, random_share: float) -> tuple[np.ndarray, np.ndarray]:
    chosen_L, inputs = objective.chosen(len(tokens_L), rng), tokens_L.copy()
    inputs[chosen_L] = objective.mask_id
    if random_share:
        random_L = chosen_L & (rng.random(len(tokens_L)) < random_share)
        inputs[random_L] = rng.choice(objective.ordinary, random_L.sum())
    return inputs, tokens_L


def _iid_spans(objective: Denoising, tokens_L: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return span_corruption.replace(tokens_L, objective.chosen(len(tokens_L), rng), objective.sentinels)


def _drop_tokens(objective: Denoising, tokens_L: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    chosen_L = objective.chosen(len(tokens_L), rng)
    return tokens_L[~chosen_L], tokens_L[chosen_L]


def _whole(config: Config, num_tokens: int) -> tuple[int, int]:
    return num_tokens + 1, num_tokens + 1


# Table 3 of the paper, and below it the three of section 3.3.2 and 3.3.4. The masks of mass_style are those of bert_style, as T5 simplifies MASS.
VARIANTS: dict[str, Variant] = {
    "prefix_lm": Variant(
        lambda c, n: prefix.split_lengths(n, share=c.prefix_share), lambda o, tokens_L, rng: prefix.split(tokens_L, share=o.config.prefix_share, rng=rng)
    ),
    "bert_style": Variant(_whole, lambda o, tokens_L, rng: _masked(o, tokens_L, rng, random_share=o.config.random_share)),
    "mass_style": Variant(_whole, lambda o, tokens_L, rng: _masked(o, tokens_L, rng, random_share=0.0)),
    "deshuffling": Variant(_whole, lambda o, tokens_L, rng: (rng.permutation(tokens_L), tokens_L)),
    "iid_spans": Variant(lambda c, n: (n - c.noise(n) + c.runs(n) + 1, c.noise(n) + c.runs(n) + 1), _iid_spans),
    "drop_tokens": Variant(lambda c, n: (n - c.noise(n) + 1, c.noise(n) + 1), _drop_tokens),
    "replace_spans": Variant(span_corruption.Config.example_lengths, SpanCorruption.pair),
}
