"""Prefix language modelling (Liu et al. 2018, section 4.2.3; Raffel et al. 2020, section 3.2.1): the first part of a text is given, the rest is predicted."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ptm.fields import field
from ptm.objectives.conditional import Conditional, ConditionalConfig, OneRowConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ConditionalConfig, OneRowConfig):
    """Options of prefix language modelling."""

    name: ClassVar[str] = "prefix"

    share: float | None = field(None, low=0.0, high=1.0, doc="Share of a piece of text that is its prefix; None = every split is equally likely.")
    boundaries: bool = field(True, doc="In one row: begin texts with the tokenizer's bos (or eos), end them with its eos, if it has them.")

    def example_lengths(self, num_tokens: int) -> tuple[int, int]:
        return split_lengths(num_tokens, share=self.share)

    def total_length(self, num_tokens: int) -> int:
        return num_tokens + 2


def split_at(num_tokens: int, *, share: float) -> int:
    """Tokens of the prefix; at least one token stands on either side."""
    return min(max(round(num_tokens * share), 1), num_tokens - 1)


def split_lengths(num_tokens: int, *, share: float | None) -> tuple[int, int]:
    """Largest lengths of (prefix, rest), with one end token each."""
    if share is None:
        return num_tokens, num_tokens
    first = split_at(num_tokens, share=share)
    return first + 1, num_tokens - first + 1


def split(tokens_L: np.ndarray, *, share: float | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(prefix, rest) of a text of two tokens or more; without a `share` all splits are equally likely."""
    at = int(rng.integers(1, len(tokens_L))) if share is None else split_at(len(tokens_L), share=share)
    return tokens_L[:at], tokens_L[at:]


class Prefix(Conditional):
    """prefix -> rest, in the two rows of an encoder-decoder; or x -> x shifted by one in one row, where the prefix is visible to all of it."""

    kinds = ("decoder", "encoder", "encoder_decoder")
    config: Config

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        one_row = model_config.kind != "encoder_decoder"
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        super().__init__(
            config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config, mask=config.mask, counted=config.counted,
            before=(start,) if one_row and config.boundaries and start is not None else (), separated=False, ended=not one_row or config.boundaries,
        )  # fmt: skip

    def pair(self, tokens_L: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return split(tokens_L, share=self.config.share, rng=rng)
