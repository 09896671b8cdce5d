"""Near duplicates: sets of n-grams, MinHash signatures in bands (Broder 1997; Leskovec et al. 2014, section 3.4), and the exact similarity that decides.

The rule knows no order of work: a record goes when a smaller one shares a band with it and their Jaccard similarity reaches the threshold, whether or not the smaller
one goes as well.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptm.fields import ConfigError
from ptm.prepare import words
from ptm.prepare.options import Options

BLOCK = 4096  # n-grams that are permuted at once
SEED = 1


def require() -> None:
    """Raises ConfigError where the library of the sketches is missing."""
    _minhash()


def _minhash() -> Any:
    try:
        from datasketch import MinHash  # an extra
    except ImportError:
        raise ConfigError(
            "near duplicates need datasketch, which is not installed; install it with: pip install 'ptm[prepare]', or give --near=false."
        ) from None
    return MinHash


@functools.lru_cache(maxsize=8)
def _empty(permutations: int) -> Any:
    """A signature of nothing: drawing its permutations takes longer than sketching a document."""
    return _minhash()(num_perm=permutations, seed=SEED, hashfunc=int, scheme="affine32")


def shingles(text: str, options: Options) -> np.ndarray:
    """Hashes of the n-grams of a text, uint64 [n-grams], distinct and ascending. Of fewer words it is one of all; of no word, none."""
    hashes_W = words.hashes(text)
    return np.unique(words.ngrams(hashes_W, min(options.near_ngram, len(hashes_W)))) if len(hashes_W) else hashes_W


def bands(shingles_S: np.ndarray, options: Options) -> np.ndarray:
    """A key for each band of the signature, uint64 [bands]; documents that agree in a band have the same key there. None of an empty set."""
    if not len(shingles_S):
        return np.empty(0, np.uint64)
    sketch = _empty(options.near_bands * options.near_rows).copy()
    low_S = (shingles_S & np.uint64(0xFFFFFFFF)).tolist()
    for start in range(0, len(low_S), BLOCK):
        sketch.update_batch(low_S[start : start + BLOCK])
    rows_BR = sketch.hashvalues.astype("<u4").reshape(options.near_bands, options.near_rows)
    digests = (hashlib.blake2b(band.to_bytes(4, "little") + row.tobytes(), digest_size=8).digest() for band, row in enumerate(rows_BR))
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def jaccard(one_S: np.ndarray, other_S: np.ndarray) -> float:
    """The Jaccard similarity of two sets as `shingles` gives them, 0 of empty ones."""
    shared = len(np.intersect1d(one_S, other_S, assume_unique=True))
    return shared / (len(one_S) + len(other_S) - shared) if shared else 0.0


def similar(one_S: np.ndarray, other_S: np.ndarray, threshold: float) -> bool:
    """Whether the Jaccard similarity reaches the threshold; sizes that are too different decide it alone."""
    if min(len(one_S), len(other_S)) < threshold * max(len(one_S), len(other_S)):
        return False
    return jaccard(one_S, other_S) >= threshold


def duplicates(
    members: Sequence[Any], shingles_of: Callable[[Any], np.ndarray], *, threshold: float, known: Callable[[Any], bool] = lambda member: False
) -> list[Any]:
    """Those of the records that share a band, given in ascending order of their keys, that go; `known` says which of them are sure to go, and need no look."""
    gone = []
    for place, member in enumerate(members):
        if place and not known(member) and any(similar(shingles_of(smaller), shingles_of(member), threshold) for smaller in itertools.islice(members, place)):
            gone.append(member)
    return gone
