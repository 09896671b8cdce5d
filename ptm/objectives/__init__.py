"""The objectives: each one file with the features of its examples and its loss."""

from typing import Any, NamedTuple

from ptm.objectives import (
    causal,
    choose,
    classify,
    denoising,
    distillation,
    mixture,
    mlm,
    pairs,
    permutation,
    prefix,
    regress,
    rtd,
    seq2seq,
    span_corruption,
    span_qa,
    tag,
    ul2,
)  # fmt: skip
from ptm.objectives.mixture import Mixture
from ptm.objectives.protocol import Objective


class Entry(NamedTuple):
    """A row of OBJECTIVES: the config dataclass and the objective that it configures."""

    config: type
    build: Any


OBJECTIVES: dict[str, Entry] = {
    "causal": Entry(causal.Config, causal.Causal),
    "prefix": Entry(prefix.Config, prefix.Prefix),
    "mlm": Entry(mlm.Config, mlm.MLM),
    "pairs": Entry(pairs.Config, pairs.Pairs),
    "permutation": Entry(permutation.Config, permutation.Permutation),
    "rtd": Entry(rtd.Config, rtd.RTD),
    "span_corruption": Entry(span_corruption.Config, span_corruption.SpanCorruption),
    "denoising": Entry(denoising.Config, denoising.Denoising),
    "ul2": Entry(ul2.Config, ul2.UL2),
    "classify": Entry(classify.Config, classify.Classify),
    "regress": Entry(regress.Config, regress.Regress),
    "choose": Entry(choose.Config, choose.Choose),
    "tag": Entry(tag.Config, tag.Tag),
    "span_qa": Entry(span_qa.Config, span_qa.SpanQA),
    "seq2seq": Entry(seq2seq.Config, seq2seq.Seq2Seq),
    "mixture": Entry(mixture.Config, Mixture),
    "distillation": Entry(distillation.Config, distillation.Distillation),
}


def make(config: Any, **given: Any) -> Objective | Mixture:
    """The objective of a config, built from tokenizer, length, packing and model_config; of a mixture with those of its parts."""
    if isinstance(config, mixture.Config):
        return OBJECTIVES[config.name].build(config, objectives={name: make(part, **given) for name, part in config.parts.items()})
    return OBJECTIVES[config.name].build(config, **given)
