"""Cloze tests (LAMBADA: Paperno et al. 2016): the last word of a passage, to be guessed from all that stands before it."""

import dataclasses
import math
from typing import Any, ClassVar

from ptm.evals import scoring
from ptm.evals.protocol import Measured, RecordsConfig, rows_of
from ptm.fields import ConfigError

TARGET = "target"  # a field with the word, where the text does not end in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecordsConfig):
    """On which passages."""

    name: ClassVar[str] = "cloze"


def _scorer(run: Any) -> scoring.Scorer:
    scorer = scoring.scorer_of(run, name="the eval cloze")
    if isinstance(scorer, scoring.OneMasked):
        raise ConfigError(f"the eval cloze needs a model that writes on from a text, which {run.model.config.name} is not; for one that fills blanks use pseudo_perplexity.")
    return scorer


def _parts(record: Any) -> tuple[str, str]:
    """(passage, last word with the space before it): the field `target` behind the text, or the text's own last word."""
    if TARGET in record.columns:
        return record.text, str(record.columns[TARGET])
    text = record.text.rstrip()
    context = text[: -len(text.split()[-1])].rstrip()
    if not context:
        raise ConfigError(f"record {record.id} is one word, so that nothing stands before it; a cloze test needs a passage, or a field '{TARGET}' with the word.")
    return context, text[len(context) :]


def require(options: Config, *, run: Any) -> None:
    """Refuses models of another kind, and data without passages."""
    _scorer(run)
    _parts(next(run.records(options.data(run.config.data), limit=1)))


def evaluate(options: Config, *, run: Any, params: Any) -> Measured:
    """{accuracy, perplexity, records}: the share of words whose tokens are each the likeliest, and exp of the mean negative log-likelihood of a word."""
    found = run.records(options.data(run.config.data), limit=options.examples)
    requests = (scoring.request_of(run.tokenizer, _parts(record), about=(record.id, _parts(record)[1])) for record in found)
    predictions = []
    for request, scored in scoring.score(run, params, requests, scorer=_scorer(run), batch_size=rows_of(options, run)):
        id, word = request.about
        predictions.append({"id": id, "reference": word.strip(), "prediction": bool(scored.greedy.all()), "log_likelihood": scored.total})
    count = len(predictions)
    perplexity = math.exp(min(-sum(row["log_likelihood"] for row in predictions) / count, 700.0))
    return Measured({"accuracy": sum(row["prediction"] for row in predictions) / count, "perplexity": perplexity, "records": float(count)}, predictions)
