"""The order in which documents are drawn: an endless shuffled order over weighted sources, or one pass in source order.

Both are pure functions of the draw's number, so that logical streams are strides of one global order and any place of it can be
reached at once.
"""

import functools

import numpy as np
from grain.experimental import index_shuffle

from ptm.data.batch import keyed_rng

Draw = tuple[int, int, int]  # source, record, visit: how often the record was drawn before
BLOCK = 1024
# Below this, index_shuffle walks through most of its smallest domain (5 ms a draw for 2 records), and a table of the epoch is small.
TABLE = 1 << 16


class Order:
    """Endless: every source shuffles and repeats on its own, `order[n]` is the n-th draw over all streams.

    Weights are shares of draws. Every block of draws holds each source in its share, to within one draw, in random places: a
    regular interleave would send a source always to the same streams, and streams draw at different rates.
    """

    def __init__(self, sizes: tuple[int, ...], *, weights: tuple[float, ...], seed: int, shuffle: bool):
        self._sizes, self._seed, self._shuffle = sizes, seed, shuffle
        self._shares = [round(weight / sum(weights) * 2**32) for weight in weights]
        self.drawn = [source for source, share in enumerate(self._shares) if share]  # the others have no weight to speak of
        self._block = functools.lru_cache(maxsize=256)(self._make_block)
        self._table = functools.lru_cache(maxsize=max(4, min(4096, 16 * TABLE // max(sizes))))(self._make_table)
        self._epoch_seed = functools.lru_cache(maxsize=64)(self._make_epoch_seed)

    def __getitem__(self, number: int) -> Draw:
        if len(self._sizes) == 1:
            source, place = 0, number
        else:
            sources, places = self._block(number // BLOCK)
            source, place = sources[number % BLOCK], places[number % BLOCK]
        visit, record = divmod(place, self._sizes[source])
        if self._shuffle and self._sizes[source] <= TABLE:
            record = int(self._table(source, visit)[record])
        elif self._shuffle:
            record = self._permuted(record, self._sizes[source], self._epoch_seed(source, visit))
        return source, record, visit

    @staticmethod
    def _permuted(record: int, size: int, seed: int) -> int:
        top = size - 1
        top += top & (top - 1) == 0  # index_shuffle 0.2.18 is no permutation where max_index is a power of 4: take one more and walk on
        record = index_shuffle(record, max_index=top, seed=seed, rounds=4)
        return record if record < size else index_shuffle(record, max_index=top, seed=seed, rounds=4)

    def _make_table(self, source: int, visit: int) -> np.ndarray:
        return keyed_rng(self._seed, "order", source, visit).permutation(self._sizes[source]).astype(np.uint16)

    def _make_epoch_seed(self, source: int, visit: int) -> int:
        return int(keyed_rng(self._seed, "order", source, visit).integers(2**32))

    def _share_out(self, number: int) -> tuple[int, int]:
        """(source, place in it) of a draw of the regular interleave: a source takes the draws at which its rounded share grows."""
        left = sum(self._shares)
        for source, share in enumerate(self._shares[:-1]):
            others, others_next = number * (left - share) // left, (number + 1) * (left - share) // left
            if others == others_next:
                return source, number - others
            number, left = others, left - share
        return len(self._shares) - 1, number

    def _make_block(self, block: int) -> tuple[list[int], list[int]]:
        sources, places = np.array([self._share_out(number) for number in range(block * BLOCK, (block + 1) * BLOCK)], np.int64).T
        mixed = sources[keyed_rng(self._seed, "mixture", block).permutation(BLOCK)]
        mixed_places = np.empty(BLOCK, np.int64)
        for source in set(sources.tolist()):
            mixed_places[mixed == source] = places[sources == source]
        return mixed.tolist(), mixed_places.tolist()


class Pass:
    """Every record of every source once, in source order."""

    def __init__(self, sizes: tuple[int, ...]):
        self._first = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Draw:
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        return source, number - int(self._first[source]), 0
