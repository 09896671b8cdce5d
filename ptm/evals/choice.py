"""Multiple choice by likelihood (Brown et al. 2020, section 2.4): the continuation of a text that a language model finds likeliest, without fine-tuning."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from ptm.evals import scoring
from ptm.evals.protocol import Measured, RecordsConfig, rows_of
from ptm.fields import ConfigError, field

CHOICES, LABEL, PAIR = "choices", "label", "pair"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecordsConfig):
    """Records have the fields text, choices (a list) and label (a number from 0, or one of the choices), and perhaps pair: a second text behind the first."""

    name: ClassVar[str] = "choice"

    separator: str = field(" ", doc="What stands between the text and a choice, and before a pair.")
    unconditional: str | None = field(None, doc="A text that asks nothing, such as Answer:, for choices by how much the question makes them likelier.")


@dataclasses.dataclass(frozen=True)
class _Question:
    """A record as it is asked: its context, its choices and the number of the right one, None if it does not tell."""

    id: str
    context: str
    choices: list[str]
    label: int | None


def _question(record: Any, separator: str) -> _Question:
    columns = record.columns
    choices = columns[CHOICES] if CHOICES in columns else None
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise ConfigError(f"record {record.id} has {str(choices)[:40]!r} as field '{CHOICES}'; allowed: a list of two texts or more. Map it in the columns of the eval.")
    label = columns[LABEL] if LABEL in columns else None
    if label is not None:
        number = choices.index(label) if label in choices else int(label) if str(label).isdecimal() else -1
        if not 0 <= number < len(choices):
            raise ConfigError(f"record {record.id} has the label {label!r}; allowed: 0 to {len(choices) - 1}, or one of its choices.")
        label = number
    context = record.text + (separator + str(columns[PAIR]) if PAIR in columns and columns[PAIR] is not None else "")
    return _Question(record.id, context, choices, label)


def require(options: Config, *, run: Any) -> None:
    """Refuses models that score no text, and data without questions."""
    scoring.scorer_of(run, name="the eval choice")
    _question(next(run.records(options.data(run.config.data), limit=1)), options.separator)


def evaluate(options: Config, *, run: Any, params: Any) -> Measured:
    """{accuracy, accuracy_per_token, accuracy_per_byte, records}, and with a text that asks nothing accuracy_unconditional.

    Choices are compared by their log-likelihood, by its mean over tokens or over bytes of UTF-8, or by its difference from that after `unconditional`.
    Predictions hold the number that each of these chooses, `prediction` being the first one's, and the log-likelihoods. Records without a label count for
    nothing.
    """
    scorer = scoring.scorer_of(run, name="the eval choice")

    def requests() -> Iterator[scoring.Request]:
        for record in run.records(options.data(run.config.data), limit=options.examples):
            question = _question(record, options.separator)
            contexts = [question.context, *([] if options.unconditional is None else [options.unconditional])]
            for number, (context, choice) in enumerate((context, choice) for context in contexts for choice in question.choices):
                last = number == len(contexts) * len(question.choices) - 1
                yield scoring.request_of(run.tokenizer, (context, options.separator + choice), about=question if last else None)

    found, predictions, hits = [], [], []
    for request, scored in scoring.score(run, params, requests(), scorer=scorer, batch_size=rows_of(options, run)):
        found.append((scored.total, len(scored.tokens)))
        if request.about is not None:
            row = _chosen(request.about, np.array(found), unconditional=options.unconditional is not None)
            predictions.append(row)
            if request.about.label is not None:
                hits.append({name: number == request.about.label for name, number in row["chosen"].items()})
            found = []
    values = {name: sum(row[name] for row in hits) / len(hits) for name in hits[0]} if hits else {}
    return Measured({**values, "records": float(len(hits))}, predictions)


def _chosen(question: _Question, found: np.ndarray, *, unconditional: bool) -> dict[str, Any]:
    """What each way to compare chooses; `found` holds (log-likelihood, tokens) of every choice after the question, then after the text that asks nothing."""
    count = len(question.choices)
    totals, tokens = found[:count].T
    scores = {
        "accuracy": totals,
        "accuracy_per_token": totals / np.maximum(tokens, 1),
        "accuracy_per_byte": totals / np.array([len(choice.encode()) for choice in question.choices]),
    }
    if unconditional:
        scores["accuracy_unconditional"] = totals - found[count:, 0]
    chosen = {name: int(np.argmax(values)) for name, values in scores.items()}
    return {"id": question.id, "prediction": chosen["accuracy"], "reference": question.label, "log_likelihoods": totals.tolist(), "chosen": chosen}
