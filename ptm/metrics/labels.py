"""Metrics of one label or one number a record; sums in float64, a ratio without denominator is 0 as in scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptm.fields import ConfigError


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """{accuracy}: share of predictions that equal their reference."""
    return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}


def exact_match(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """{exact_match}: share of texts that equal their reference, or one of several, but for white space: labels that a model writes, as T5 does."""
    hits = (_words(p) in [_words(r) for r in ([reference] if isinstance(reference, str) else reference)] for p, reference in zip(predictions, references))
    return {"exact_match": sum(hits) / len(references)}


def _words(text: str) -> list[str]:
    return text.split()


def _labels(predictions: Sequence[Any], references: Sequence[Any]) -> list[Any]:
    """Every label that is predicted or true, in an order that does not change, as sums of floats do."""
    return sorted({*predictions, *references}, key=str)


def _counts(predictions: Sequence[Any], references: Sequence[Any], label: Any) -> tuple[int, int, int]:
    """(hits, times predicted, times true) of a label."""
    pairs = list(zip(predictions, references))
    return sum(p == r == label for p, r in pairs), sum(p == label for p, _ in pairs), sum(r == label for _, r in pairs)


def scores(hits: int, predicted: int, true: int) -> tuple[float, float, float]:
    """(precision, recall, F1) of counts; 0 where nothing was predicted or is true."""
    precision, recall = hits / predicted if predicted else 0.0, hits / true if true else 0.0
    return precision, recall, 2 * hits / (predicted + true) if predicted + true else 0.0


def f1_binary(predictions: Sequence[str], references: Sequence[str], *, option: str | None = None) -> dict[str, float]:
    """{precision, recall, f1} of one label: `option`, or '1' where all labels are '0' and '1'."""
    if option is None:
        labels = _labels([str(p) for p in predictions], [str(r) for r in references])
        if not set(labels) <= {"0", "1"}:
            raise ConfigError(f"the metric f1_binary needs to know which label is the positive one of {', '.join(labels[:10])}; write f1_binary:LABEL.")
        option = "1"
    precision, recall, f1 = scores(*_counts([str(p) for p in predictions], [str(r) for r in references], option))
    return {"precision": precision, "recall": recall, "f1": f1}


def f1_macro(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """{f1_macro}: the mean of the labels' F1, of all labels that are predicted or true."""
    labels = _labels(predictions, references)
    return {"f1_macro": sum(scores(*_counts(predictions, references, label))[2] for label in labels) / len(labels)}


def f1_micro(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """{f1_micro}: F1 of the counts of all labels together; with one label a record it is the accuracy, with sets of labels it is not."""
    sets = [[set(x) if isinstance(x, list | tuple | set) else {x} for x in side] for side in (predictions, references)]
    hits = sum(len(p & r) for p, r in zip(*sets))
    return {"f1_micro": scores(hits, *(sum(map(len, side)) for side in sets))[2]}


def matthews(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """{matthews}: the correlation of two or more labels with the truth (Gorodkin 2004); 0 where one side is constant."""
    numbers = {label: n for n, label in enumerate(_labels(predictions, references))}
    table = np.zeros((len(numbers), len(numbers)))
    for p, r in zip(predictions, references):
        table[numbers[r], numbers[p]] += 1
    total, right, true, predicted = table.sum(), np.trace(table), table.sum(1), table.sum(0)
    spread = np.sqrt(total**2 - predicted @ predicted) * np.sqrt(total**2 - true @ true)
    return {"matthews": float((right * total - true @ predicted) / spread) if spread else 0.0}


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two rows of numbers; 0 where one of them is constant, so that it can be compared and averaged."""
    x, y = x - x.mean(), y - y.mean()
    size = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(x @ y / size, -1, 1)) if size else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _numbers(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Both as numbers; a prediction that is written and no number counts as -1, as in the published code of T5."""
    return np.array([_number(prediction) for prediction in predictions]), np.asarray(references, np.float64)


def _number(value: Any) -> float:
    try:
        number = float(value)
    except ValueError:
        return -1.0
    return number if np.isfinite(number) else -1.0


def pearson(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """{pearson}: linear correlation."""
    return {"pearson": correlation(*_numbers(predictions, references))}


def spearman(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """{spearman}: correlation of ranks, ties shared."""
    return {"spearman": correlation(*map(ranks, _numbers(predictions, references)))}


def mean_squared_error(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """{mean_squared_error}: in the square of the numbers' unit."""
    x, y = _numbers(predictions, references)
    return {"mean_squared_error": float(np.mean(np.square(x - y)))}
