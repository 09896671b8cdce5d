"""Perplexity of whole texts under a model that reads from left to right: windows slide over each text, so that no token is scored with little before it."""

import dataclasses
import math
from typing import Any, ClassVar

from ptm.evals import scoring
from ptm.evals.protocol import Measured, RecordsConfig
from ptm.evals.texts import measured
from ptm.fields import ConfigError, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecordsConfig):
    """On what, and how far a token sees."""

    name: ClassVar[str] = "perplexity"

    length: int | None = field(None, low=1, unit="tokens", doc="Longest window: a token sees fewer before it; None = as in training.")
    stride: int | None = field(None, low=1, unit="tokens", doc="Tokens that each window but the first one scores; all see length - stride before them; None = half of length.")
    count_lines: bool = field(False, doc="Count each line end as a word, as the published word counts of WikiText do.")


def _scorer(options: Config, run: Any) -> scoring.Scorer:
    scorer = scoring.scorer_of(run, name="the eval perplexity", length=options.length, stride=options.stride)
    if not isinstance(scorer, scoring.LeftToRight):
        raise ConfigError(f"the eval perplexity needs a model that reads from left to right, which {run.model.config.name} is not; for one that fills blanks use pseudo_perplexity.")
    return scorer


def require(options: Config, *, run: Any) -> None:
    """Refuses models of another kind, and data without records."""
    _scorer(options, run)
    run.records(options.data(run.config.data), limit=1)


def evaluate(options: Config, *, run: Any, params: Any) -> Measured:
    """{loss (nats a token), perplexity (of a token), bits_per_byte, word_perplexity, tokens, words, bytes}; every token is scored once.

    Words stand between white space and bytes are those of UTF-8, so that both figures compare models of different tokenizers; a first token that no token stands
    before is not scored, and its bytes do not count. Predictions are each record's sums.
    """
    sums, predictions = measured(options, run=run, params=params, scorer=_scorer(options, run), count_lines=options.count_lines)
    return Measured({**sums.measures(), "word_perplexity": math.exp(min(sums.nats / max(sums.words, 1), 700.0)), **sums.counts()}, predictions)
