"""Metrics of extracted answers, 0 to 100 as they are published: SQuAD's exact match and F1 in words, CMRC's in characters.

A prediction is a text, empty for "no answer"; a reference is the list of its right answers, empty where the question has none.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """A text as SQuAD compares it (Rajpurkar et al. 2016, section 6.1): lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _harmonic(same: int, ours: int, theirs: int) -> float:
    return 2 * same / (ours + theirs) if same else 0.0


def word_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of normalised words; where one of them is empty, 1 if both are (Rajpurkar et al. 2018, published code)."""
    ours, theirs = normalized(prediction).split(), normalized(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _harmonic((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def _listed(references: Sequence[str | Sequence[str]]) -> list[Sequence[str]]:
    """Right answers as lists; one text alone is the only one."""
    return [[answers] if isinstance(answers, str) else answers for answers in references]


def squad(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """{exact_match, f1}: the mean over questions of the best over their answers, and with unanswerable ones each again as has_answer_ and no_answer_.

    Answers that normalisation leaves nothing of count as none, as in the published code of version 2.
    """
    kept = [[answer for answer in answers if normalized(answer)] for answers in _listed(references)]
    exact = [max(float(normalized(p) == normalized(answer)) for answer in answers or [""]) for p, answers in zip(predictions, kept)]
    f1 = [max(word_f1(p, answer) for answer in answers or [""]) for p, answers in zip(predictions, kept)]
    return _with_unanswerable(exact, f1, kept)


def _with_unanswerable(exact: list[float], f1: list[float], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    result = {"exact_match": _mean(exact), "f1": _mean(f1)}
    if all(answers):
        return result
    for name, wanted in (("has_answer", True), ("no_answer", False)):
        chosen = [n for n, texts in enumerate(answers) if bool(texts) == wanted]
        if chosen:
            result |= {f"{name}_exact_match": _mean([exact[n] for n in chosen]), f"{name}_f1": _mean([f1[n] for n in chosen])}
    return result


def _mean(values: list[float]) -> float:
    return 100 * sum(values) / len(values)


# What CMRC 2018 removes and takes for a unit of its own; ASCII's full stop, comma, quotes and brackets are not among them.
_SIGNS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
# Other words by the rules of the Penn Treebank, as NLTK has them: signs alone, commas too unless a digit follows; a full stop belongs to its word.
_WORD = re.compile(r"""[;@#$%&?!()\[\]{}<>"–—]|,(?!\d)|\.\.\.|(?:(?!,(?!\d)|\.\.\.)[^\s;@#$%&?!()\[\]{}<>"–—])+""")
_LAST_STOP = re.compile(r"(?<=[^.])\.\s*$")


def chinese_units(text: str) -> list[str]:
    """Chinese characters one by one, other words whole, without the signs that CMRC 2018 removes; in lower case (Cui et al. 2019, published code).

    The published code finds words with NLTK; this finds the same but for English contractions and kinds of quotes.
    """
    text = "".join(char for char in text.lower().strip() if char not in _SIGNS)
    parts = re.split("([\u4e00-\u9fa5])", text)
    return [unit for n, part in enumerate(parts) for unit in ([part] if n % 2 else _words(part))]


def _words(text: str) -> list[str]:
    """The words of a text without Chinese characters; the full stop at its end is one of its own."""
    stop = _LAST_STOP.search(text)
    return _WORD.findall(text) if stop is None else [*_WORD.findall(text[: stop.start()]), "."]


def longest_run(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest run of units that both have without a gap."""
    longest, before = 0, [0] * (len(theirs) + 1)
    for unit in ours:
        row = [0, *(before[n] + 1 if unit == other else 0 for n, other in enumerate(theirs))]
        longest, before = max(longest, *row), row
    return longest


def character_f1(prediction: str, answer: str) -> float:
    """F1 of the longest run of units in common, as the published code of CMRC 2018 has it (the paper speaks of overlap)."""
    ours, theirs = chinese_units(prediction), chinese_units(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    return _harmonic(longest_run(ours, theirs), len(ours), len(theirs))


def _stripped(text: str) -> str:
    return "".join(char for char in text.lower().strip() if char not in _SIGNS)


def cmrc(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """{exact_match, f1} of Chinese answers by CMRC 2018's rules: the mean over questions of the best over their answers."""

    listed = _listed(references)

    def best(score: Callable[[str, str], float]) -> list[float]:
        return [max(score(p, answer) for answer in answers or [""]) for p, answers in zip(predictions, listed)]

    return _with_unanswerable(best(lambda p, answer: float(_stripped(p) == _stripped(answer))), best(character_f1), listed)
