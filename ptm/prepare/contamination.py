"""Evaluation sets that a corpus must not hold: n-grams of words of their examples, and which documents have too many of one example's.

Brown et al. (2020, appendix C) look for runs of 13 words. A run alone may be a quotation that both have; so what counts is the share of an example's runs that a document
holds, as in Chowdhery et al. (2022, section 8).
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from ptm.prepare import words


@dataclasses.dataclass(frozen=True)
class Index:
    """n-grams of the examples of all sets: `grams` (uint64, ascending) with the number of the example that each is of (`owners`), the
    distinct n-grams of each example (`sizes`) and its set (`sets`, of `names`); `short` examples have fewer words and are not looked for."""

    names: tuple[str, ...]
    ngram: int
    grams: np.ndarray
    owners: np.ndarray
    sizes: np.ndarray
    sets: np.ndarray
    short: tuple[int, ...]

    def too_short(self) -> dict[str, int]:
        """Examples of each set that are not looked for."""
        return dict(zip(self.names, self.short))

    def found(self, text: str, share: float) -> str | None:
        """The name of the first set of which the text holds at least `share` of the n-grams of an example, one at least; None where there is none."""
        if not len(self.grams):
            return None
        held = np.unique(words.ngrams(words.hashes(text), self.ngram))
        left, right = np.searchsorted(self.grams, held, "left"), np.searchsorted(self.grams, held, "right")
        counts = right - left
        if not counts.any():
            return None
        places = np.repeat(left, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        examples, matches = np.unique(self.owners[places], return_counts=True)
        hit = examples[matches >= share * self.sizes[examples]]
        return self.names[int(self.sets[hit].min())] if len(hit) else None


def build(sets: Mapping[str, Iterable[str]], *, ngram: int) -> Index:
    """The index of the texts of evaluation sets by name."""
    grams, owners, sizes, of_set, short = [], [], [], [], []
    for number, texts in enumerate(sets.values()):
        short.append(0)
        for text in texts:
            found = np.unique(words.ngrams(words.hashes(text), ngram))
            if not len(found):
                short[-1] += 1
                continue
            grams.append(found)
            owners.append(np.full(len(found), len(sizes), np.int64))
            sizes.append(len(found))
            of_set.append(number)
    flat = np.concatenate(grams) if grams else np.empty(0, np.uint64)
    order = np.argsort(flat, kind="stable")
    owner = np.concatenate(owners)[order] if owners else np.empty(0, np.int64)
    return Index(tuple(sets), ngram, flat[order], owner, np.array(sizes, np.int64), np.array(of_set, np.int64), tuple(short))
