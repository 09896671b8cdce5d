"""Words of a text and hashes of their n-grams: what repetition, near duplicates and contamination are measured by.

A word is a run of letters and digits; of scripts that put no spaces between words (Chinese, Japanese, Thai, ...) each character is one.
"""

import functools
import hashlib
import re
import sys
import unicodedata

import numpy as np

from ptm.prepare.options import SCRIPTS

# Ranges of the Unicode blocks in which a script's letters lie.
RANGES = {
    "arabic": "\u0600-\u06ff\u0750-\u077f\u0870-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "armenian": "\u0530-\u058f\ufb13-\ufb17",
    "bengali": "\u0980-\u09ff",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "devanagari": "\u0900-\u097f\ua8e0-\ua8ff",
    "ethiopic": "\u1200-\u139f\u2d80-\u2ddf\uab00-\uab2f",
    "georgian": "\u10a0-\u10ff\u1c90-\u1cbf\u2d00-\u2d2f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "gujarati": "\u0a80-\u0aff",
    "gurmukhi": "\u0a00-\u0a7f",
    "han": "\u2e80-\u2fdf\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "hangul": "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff",
    "hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "kana": "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f",
    "kannada": "\u0c80-\u0cff",
    "khmer": "\u1780-\u17ff\u19e0-\u19ff",
    "lao": "\u0e80-\u0eff",
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff\uab30-\uab6f\ufb00-\ufb06\uff21-\uff3a\uff41-\uff5a",
    "malayalam": "\u0d00-\u0d7f",
    "myanmar": "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f",
    "sinhala": "\u0d80-\u0dff",
    "tamil": "\u0b80-\u0bff",
    "telugu": "\u0c00-\u0c7f",
    "thai": "\u0e00-\u0e7f",
    "tibetan": "\u0f00-\u0fff",
}
assert tuple(RANGES) == SCRIPTS
UNSPACED = "".join(RANGES[name] for name in ("han", "kana", "khmer", "lao", "myanmar", "thai", "tibetan"))
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_SPACED_WORD = re.compile(rf"[^\W_{UNSPACED}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(33), np.uint64(0xFF51AFD7ED558CCD)), (np.uint64(33), np.uint64(0xC4CEB9FE1A85EC53)))


@functools.lru_cache(maxsize=1)  # several rules look at a text, one after the other
def words(text: str) -> tuple[str, ...]:
    """The words of a text, in order, case folded."""
    return tuple(_WORD.findall(text.casefold()))


def spaced(text: str) -> list[str]:
    """The words of a text that are written with spaces between them."""
    return _SPACED_WORD.findall(text)


@functools.lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=1)
def hashes(text: str) -> np.ndarray:
    """A hash of each word of a text, uint64 [words], the same on every machine. Not to be written to."""
    found = words(text)
    return np.fromiter(map(_hash, found), np.uint64, len(found))


def ngrams(hashes_W: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of `n` words, uint64 [words - n + 1]; empty for fewer words."""
    count = len(hashes_W) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    found = hashes_W[:count].copy()
    for shift in range(1, n):
        found *= _MULTIPLIER
        found += hashes_W[shift : shift + count]
    for bits, factor in _MIX:
        found ^= found >> bits
        found *= factor
    return found ^ (found >> np.uint64(33))


@functools.lru_cache(maxsize=1)
def codes(text: str) -> np.ndarray:
    """The code points of a text, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


@functools.cache
def _scripts() -> np.ndarray:
    """For each code point the number of its script in SCRIPTS, from 1; 0 for others."""
    table = np.zeros(sys.maxunicode + 1, np.uint8)
    for number, ranges in enumerate(RANGES.values(), 1):
        for low, high in re.findall(r"(.)(?:-(.))?", ranges):
            table[ord(low) : ord(high or low) + 1] = number
    return table


def script_counts(text: str) -> dict[str, int]:
    """Letters of each script in a text, of those that it has any of."""
    counts = np.bincount(_scripts()[codes(text)], minlength=len(SCRIPTS) + 1)[1:].tolist()
    return {name: count for name, count in zip(SCRIPTS, counts) if count}


@functools.cache
def _kinds() -> np.ndarray:
    """For each code point 1 if it is a letter or a mark, 2 if it is white space, else 0."""
    categories = (unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    table = np.fromiter((category in "LM" for category in categories), np.uint8, sys.maxunicode + 1)
    table[[code for code in range(0x3001) if chr(code).isspace()]] = 2
    return table


def letter_share(text: str) -> float:
    """The share of letters and marks among the characters that are seen; 0 where none is."""
    other, letters, _ = np.bincount(_kinds()[codes(text)], minlength=3).tolist()
    return letters / (letters + other) if letters else 0.0


def script(text: str) -> str:
    """The script of most letters of a text: an entry of SCRIPTS, or 'none'. Of Japanese, whose Han characters may be more, it is kana."""
    counts = script_counts(text)
    if "kana" in counts and "han" in counts and counts["kana"] * 10 > counts["han"]:
        return "kana"
    return max(counts, key=lambda name: (counts[name], name)) if counts else "none"
