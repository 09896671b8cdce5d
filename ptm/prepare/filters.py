"""Filters of documents. To add one: a function of (text, options) that says whether the document goes, an option, and a line in FILTERS.

Repetition and words follow Rae et al. (2021, appendix A1.1, table A1). Repeated n-grams and symbols are judged in documents of 50 words or more, which are the only
ones that the paper keeps: of a sentence its commonest pair of words is always a large part.
"""

from collections.abc import Callable

import numpy as np

from ptm.prepare import words
from ptm.prepare.options import Options

FEW_WORDS = 50


def _too_short(text: str, options: Options) -> bool:
    return len(text) < options.min_characters


def _too_long(text: str, options: Options) -> bool:
    return len(text) > options.max_characters


def _few_letters(text: str, options: Options) -> bool:
    return words.letter_share(text) < options.min_letters


def _other_scripts(text: str, options: Options) -> bool:
    counts = words.script_counts(text)
    return sum(counts.get(name, 0) for name in options.scripts) < options.min_script_share * sum(counts.values())


def _short_words(text: str, options: Options) -> bool:
    return _mean_length(text, default=options.min_word_length) < options.min_word_length


def _long_words(text: str, options: Options) -> bool:
    return _mean_length(text, default=0.0) > options.max_word_length


def _mean_length(text: str, *, default: float) -> float:
    """Mean length of words between spaces; the default where most of the text has none."""
    found = words.spaced(text)
    size = sum(map(len, found))
    return size / len(found) if size * 2 > len(text) else default


def _symbols(text: str, options: Options) -> bool:
    found = max(text.count("#"), text.count("…") + text.count("..."))
    return found > 0 and len(words.words(text)) >= FEW_WORDS and found > options.max_symbols * len(words.words(text))


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]


def _duplicate_lines(text: str, options: Options) -> bool:
    lines = _lines(text)
    return len(lines) - len(set(lines)) > options.max_duplicate_lines * len(lines)


def _duplicate_line_characters(text: str, options: Options) -> bool:
    lines = _lines(text)
    total = sum(map(len, lines))
    return total - sum(map(len, set(lines))) > options.max_duplicate_line_characters * total


def _top_ngrams(text: str, options: Options) -> bool:
    found = words.words(text)
    if len(found) < FEW_WORDS:
        return False
    hashes_W, lengths_W = words.hashes(text), np.fromiter(map(len, found), np.int64, len(found))
    for n, most in enumerate(options.max_top_ngrams, 2):
        _, first, counts = np.unique(words.ngrams(hashes_W, n), return_index=True, return_counts=True)
        repeated = counts > 1
        sizes = np.convolve(lengths_W, np.ones(n, np.int64), "valid")[first[repeated]]
        if (counts[repeated] * sizes > most * lengths_W.sum()).any():
            return True
    return False


# Option that switches a filter on, which is also the name of the rule -> whether the document goes. They are tried in this order.
FILTERS: dict[str, Callable[[str, Options], bool]] = {
    "min_characters": _too_short,
    "max_characters": _too_long,
    "min_letters": _few_letters,
    "scripts": _other_scripts,
    "min_word_length": _short_words,
    "max_word_length": _long_words,
    "max_symbols": _symbols,
    "max_duplicate_lines": _duplicate_lines,
    "max_duplicate_line_characters": _duplicate_line_characters,
    "max_top_ngrams": _top_ngrams,
}


def verdict(text: str, options: Options) -> str | None:
    """The first rule that removes a document, or None."""
    on = (name for name in FILTERS if getattr(options, name) not in (None, ()))
    return next((name for name in on if FILTERS[name](text, options)), None)
