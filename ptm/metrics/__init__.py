"""The metrics of answers: functions of predictions and references, host side, no JAX.

Shares, F1 and correlations of labels, numbers and entities are fractions from 0 (or -1) to 1; what is published from 0 to 100 is so here: exact match
and F1 of extracted answers (squad, cmrc), BLEU, chrF and ROUGE. A metric is named NAME or NAME:OPTION, as in f1_binary:yes and bleu:zh.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ptm import fields
from ptm.fields import ConfigError
from ptm.metrics import entities, grouped, labels, spans, written

Metric = Callable[..., dict[str, float]]

METRICS: dict[str, Metric] = {
    "accuracy": labels.accuracy,
    "exact_match": labels.exact_match,
    "f1_binary": labels.f1_binary,
    "f1_macro": labels.f1_macro,
    "f1_micro": labels.f1_micro,
    "matthews": labels.matthews,
    "pearson": labels.pearson,
    "spearman": labels.spearman,
    "mean_squared_error": labels.mean_squared_error,
    "entity_f1": entities.entity_f1,
    "squad": spans.squad,
    "cmrc": spans.cmrc,
    "bleu": written.bleu,
    "chrf": written.chrf,
    "rouge": written.rouge,
    "multirc": grouped.multirc,
    "parity": grouped.parity,
}


def metric_of(name: str) -> Metric:
    """The function (predictions, references) -> {name: value} that NAME or NAME:OPTION stands for. Raises ConfigError for an unknown one, and one whose library is missing."""
    name, colon, option = name.partition(":")
    metric = fields.lookup(METRICS, name, "metric")
    written.require(name)
    if not colon:
        return metric
    if "option" not in inspect.signature(metric).parameters:
        raise ConfigError(f"metric {name}:{option}: {name} has no option; write {name}.")
    return functools.partial(metric, option=option)


def needs_groups(name: str) -> bool:
    """Whether a metric is one of records that belong together."""
    return "groups" in inspect.signature(metric_of(name)).parameters


def measure(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any], *, groups: Sequence[Any] | None = None) -> dict[str, float]:
    """All values of the metrics of `names`; predictions and references belong together pair by pair, and there is one at least.

    `groups` names the group of each record, for the metrics that need them. Raises ConfigError where they need them and there are none.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references; metrics need as many of each, one at least.")
    values: dict[str, float] = {}
    for name in names:
        if needs_groups(name) and groups is None:
            raise ConfigError(f"the metric {name} is one of records that belong together: say by which field, with --config.evals.EVAL.together=FIELD.")
        values |= metric_of(name)(predictions, references, **({"groups": groups} if needs_groups(name) else {}))
    return values
