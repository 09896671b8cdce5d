"""Pseudo-perplexity of whole texts under a model that fills blanks (Salazar et al. 2020, section 2.2): each token is masked in turn, a row for each."""

import dataclasses
from typing import Any, ClassVar

from ptm.evals import scoring
from ptm.evals.protocol import Measured, RecordsConfig
from ptm.evals.texts import measured
from ptm.fields import ConfigError, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecordsConfig):
    """On what, and what is masked with a token."""

    name: ClassVar[str] = "pseudo_perplexity"

    length: int | None = field(None, low=8, unit="tokens", doc="Longest row; texts are cut into pieces of it; None = as in training.")
    by_word: bool = field(False, doc="Mask the tokens that follow in the same word too, which give it away (Kauf and Ivanova 2023, PLL-word-l2r).")


def _scorer(options: Config, run: Any) -> scoring.Scorer:
    scorer = scoring.scorer_of(run, name="the eval pseudo_perplexity", length=options.length, by_word=options.by_word)
    if not isinstance(scorer, scoring.OneMasked):
        raise ConfigError(f"the eval pseudo_perplexity needs a model that fills blanks, which {run.model.config.name} is not here; for one that reads from left to right use perplexity.")
    return scorer


def require(options: Config, *, run: Any) -> None:
    """Refuses models of another kind, and data without records."""
    _scorer(options, run)
    run.records(options.data(run.config.data), limit=1)


def evaluate(options: Config, *, run: Any, params: Any) -> Measured:
    """{loss (nats a token), perplexity, bits_per_byte, tokens, words, bytes} of pseudo-log-likelihoods; predictions are each record's sums."""
    sums, predictions = measured(options, run=run, params=params, scorer=_scorer(options, run))
    return Measured({**sums.measures(), **sums.counts()}, predictions)
