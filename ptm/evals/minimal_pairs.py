"""Minimal pairs (BLiMP: Warstadt et al. 2020): is the acceptable sentence more likely than the one that differs from it in one point?"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from ptm.evals import scoring
from ptm.evals.protocol import Measured, RecordsConfig, file_of, rows_of
from ptm.fields import ConfigError, field

BAD = "bad"  # the field with the sentence that is not acceptable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecordsConfig):
    """On which pairs, and how models that fill blanks score them."""

    name: ClassVar[str] = "minimal_pairs"

    columns: tuple[str, ...] = field(
        ("text=sentence_good", f"{BAD}=sentence_bad"), doc=f"Map of fields to columns: text is the acceptable sentence, {BAD} the other; the default is BLiMP's."
    )
    by_word: bool = field(False, doc="Of a model that fills blanks: mask the tokens that follow in the same word too (Kauf and Ivanova 2023, PLL-word-l2r).")


def require(options: Config, *, run: Any) -> None:
    """Refuses models that score no text, and data without pairs."""
    scorer = scoring.scorer_of(run, name="the eval minimal_pairs", by_word=options.by_word)
    if isinstance(scorer, scoring.Paired):
        raise ConfigError(f"the eval minimal_pairs scores sentences alone, and model {run.model.config.name} scores only what follows a context; take a decoder or an encoder.")
    _sentences(next(run.records(options.data(run.config.data), limit=1)))


def _sentences(record: Any) -> tuple[str, str]:
    if BAD not in record.columns or not isinstance(record.columns[BAD], str):
        raise ConfigError(f"record {record.id} is no minimal pair: it has no text in the field '{BAD}'. Map it in the columns of the eval, as text=COLUMN,{BAD}=COLUMN.")
    return record.text, record.columns[BAD]


def evaluate(options: Config, *, run: Any, params: Any) -> Measured:
    """{accuracy, records} over all pairs, and of several files FILE/accuracy and `paradigms`, their mean; equal scores are misses.

    Sentences are compared by the sum over their tokens ("full sentence", section 4), a pseudo-log-likelihood where the model fills blanks.
    """
    scorer = scoring.scorer_of(run, name="the eval minimal_pairs", by_word=options.by_word)

    def requests() -> Iterator[scoring.Request]:
        for record in run.records(options.data(run.config.data), limit=options.examples):
            for sentence in _sentences(record):
                yield scoring.request_of(run.tokenizer, sentence, about=record.id)

    found = scoring.score(run, params, requests(), scorer=scorer, batch_size=rows_of(options, run))
    predictions, files = [], {}
    for (request, good), (_, bad) in zip(found, found):
        right = good.total > bad.total
        files.setdefault(file_of(request.about), []).append(right)
        predictions.append({"id": request.about, "prediction": right, "good": good.total, "bad": bad.total})
    values = {"accuracy": sum(map(sum, files.values())) / len(predictions)}
    if len(files) > 1:
        shares = {f"{name}/accuracy": sum(hits) / len(hits) for name, hits in sorted(files.items())}
        values |= {"paradigms": sum(shares.values()) / len(shares), **shares}
    return Measured({**values, "records": float(len(predictions))}, predictions)
