"""UL2 (Tay et al. 2022, section 3.1): a mixture of denoisers, short and extreme span corruption and prefix language modelling, told apart by mode tokens."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from ptm.fields import ConfigError, field, unparse
from ptm.objectives import denoising
from ptm.objectives.conditional import ConditionalConfig, OneRowConfig
from ptm.objectives.denoising import Denoising
from ptm.objectives.mixture import Blend, Part

MODES = {"r": "[NLU]", "s": "[S2S]", "x": "[NLG]"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ConditionalConfig, OneRowConfig):
    """Options of UL2: spans and rates of its table 1, and weights that give each mode about a third.

    Item n of `mean_spans`, `rates` and `weights` is span corruption number n.
    """

    name: ClassVar[str] = "ul2"

    mean_spans: tuple[float, ...] = field((3.0, 8.0, 3.0, 8.0, 64.0, 64.0), low=1.0, unit="tokens", doc="Mean length of a corrupted span.")
    rates: tuple[float, ...] = field((0.15, 0.15, 0.5, 0.5, 0.15, 0.5), low=0.0, high=1.0, doc="Share of tokens that are corrupted.")
    weights: tuple[float, ...] = field((0.165, 0.165, 0.0825, 0.0825, 0.0825, 0.0825), low=0.0, doc="Share of drawn examples, before packing.")
    prefix_weight: float = field(0.34, low=0.0, doc="Share of drawn examples that are split into prefix and rest.")
    prefix_share: float | None = field(0.75, low=0.0, high=1.0, doc="Share of a text that is its prefix; None = every split is equally likely.")
    extreme_span: float = field(12.0, low=1.0, unit="tokens", doc="Span corruption of this mean span or longer is extreme (mode X, else R).")
    extreme_rate: float = field(0.3, low=0.0, high=1.0, doc="Span corruption of this rate or higher is extreme (mode X, else R).")
    mode_tokens: bool = field(True, doc="Begin inputs with the token of their mode: pieces [NLU] (R), [NLG] (X), [S2S] (S), else the last three sentinels.")

    def check(self, where: str) -> None:
        super().check(where)
        sizes = {key: len(getattr(self, key)) for key in ("mean_spans", "rates", "weights")}
        if len(set(sizes.values())) > 1:
            given = ", ".join(f"{where}.{key} has {size}" for key, size in sizes.items())
            raise ConfigError(f"{given} items; they must have the same number, one for each span corruption.")
        if not sum(self.weights) + self.prefix_weight:
            raise ConfigError(f"{where}.weights={unparse(self.weights)} and {where}.prefix_weight=0 leave no denoiser; raise one of them.")
        for _, _, denoiser in self.denoisers():
            denoiser.check(where)

    def denoisers(self) -> Iterator[tuple[str, float, denoising.Config]]:
        """(mode, weight, config) of all denoisers that have a weight."""
        shared = {"input_length": self.input_length, "visits": self.visits, "z_loss": self.z_loss, "mask": self.mask, "counted": self.counted}
        for mean_span, rate, weight in zip(self.mean_spans, self.rates, self.weights):
            if weight:
                mode = "x" if mean_span >= self.extreme_span or rate >= self.extreme_rate else "r"
                yield mode, weight, denoising.Config(variant="replace_spans", mean_span=mean_span, rate=rate, **shared)
        if self.prefix_weight:
            yield "s", self.prefix_weight, denoising.Config(variant="prefix_lm", prefix_share=self.prefix_share, **shared)

    def raw_length(self, length: int, *, paired: bool = True) -> int:
        """The shortest of the denoisers' raw lengths: each cuts its own. Raises ConfigError where nothing fits."""
        return min(denoiser.raw_length(length, paired=paired, extra=int(self.mode_tokens)) for _, _, denoiser in self.denoisers())


def mode_tokens(tokenizer: Any) -> tuple[dict[str, int], int]:
    """({mode: id}, sentinels that they take): the pieces of MODES where the vocabulary has them all, else its last sentinels, in the order of MODES."""
    ids = {piece: number for number, piece in enumerate(tokenizer.pieces(np.arange(tokenizer.vocab_size)))}
    if all(piece in ids for piece in MODES.values()):
        return {mode: ids[piece] for mode, piece in MODES.items()}, 0
    if len(tokenizer.sentinels) < len(MODES):
        raise ConfigError(
            f"objective ul2 marks its modes by the pieces {', '.join(MODES.values())} or by the last {len(MODES)} sentinels; this tokenizer has "
            f"{len(tokenizer.sentinels)}. Set --config.tokenizer.sentinels to {len(MODES)} more than span corruption needs, or "
            "--config.objective.mode_tokens=false."
        )
    return dict(zip(MODES, tokenizer.sentinels[-len(MODES) :])), len(MODES)


class UL2(Blend):
    """Each piece of text is given to one denoiser; rows hold those of all modes."""

    kinds = ("encoder_decoder", "decoder")

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        tokens, reserved = mode_tokens(tokenizer) if config.mode_tokens else ({}, 0)
        common = {"tokenizer": tokenizer, "length": length, "packing": packing, "model_config": model_config, "reserved": reserved}
        super().__init__([
            Part(mode, Denoising(options, before=(tokens[mode],) if tokens else (), **common), weight) for mode, weight, options in config.denoisers()
        ])  # fmt: skip
