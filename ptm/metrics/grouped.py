"""Metrics of records that belong together, fractions from 0 to 1: `groups` names the group of each record (`together` of the eval task)."""

from collections.abc import Sequence
from typing import Any

from ptm.metrics import labels


def _by_group(values: Sequence[Any], groups: Sequence[Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for group, value in zip(groups, values):
        found.setdefault(group, []).append(value)
    return found


def multirc(predictions: Sequence[Any], references: Sequence[Any], *, groups: Sequence[Any], option: str | None = None) -> dict[str, float]:
    """{f1a, exact_match} of MultiRC (Khashabi et al. 2018, section 4.1): F1 of the right answers over all, share of questions whose answers are all judged right.

    A record is an answer, a group a question; `option` is the label of right answers, '1' if none is given.
    """
    hits = _by_group([p == r for p, r in zip(predictions, references)], groups)
    f1a = labels.f1_binary(predictions, references, option=option or "1")["f1"]
    return {"f1a": f1a, "exact_match": sum(all(group) for group in hits.values()) / len(hits)}


def parity(predictions: Sequence[Any], references: Sequence[Any], *, groups: Sequence[Any]) -> dict[str, float]:
    """{parity}: share of groups whose records get one and the same answer, right or wrong (gender parity: Rudinger et al. 2018; Wang et al. 2019)."""
    answers = _by_group(predictions, groups)
    return {"parity": sum(len(set(group)) == 1 for group in answers.values()) / len(answers)}
