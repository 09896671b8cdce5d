"""The order in which documents are drawn: an endless shuffled order over weighted sources, or one pass in source order.

`Order` and `Pass` are pure functions of the draw's number, so that logical streams are strides of one global order and any place of it can be
reached at once. Where weights change with the steps of a run, or sources may be drawn so often only, each stream has a `Mixer` of its own.
"""

import dataclasses
import functools

import numpy as np
from grain.experimental import index_shuffle

from ptm.data.batch import keyed_rng
from ptm.fields import ConfigError

Draw = tuple[int, int, int]  # source, record, visit: how often the record was drawn before
BLOCK = 1024
# Below this, index_shuffle walks through most of its smallest domain (5 ms a draw for 2 records), and a table of the epoch is small.
TABLE = 1 << 16
PHASES, GOLDEN = 1024, (5**0.5 - 1) / 2  # multiples of the golden ratio are spread evenly, and share no period with any weights
ONE = 1 << 32  # shares of a Mixer are parts of it: sums of integers are exact, wherever and in whatever order they are made


class Shuffles:
    """Sources that are shuffled and repeated, each on its own."""

    def __init__(self, sizes: tuple[int, ...], *, seed: int, shuffle: bool):
        self.sizes, self._seed, self._shuffle = sizes, seed, shuffle
        self._table = functools.lru_cache(maxsize=max(4, min(4096, 16 * TABLE // max(sizes))))(self._make_table)
        self._epoch_seed = functools.lru_cache(maxsize=64)(self._make_epoch_seed)

    def draw(self, source: int, place: int) -> Draw:
        """What stands at a place of a source's endless order."""
        visit, record = divmod(place, self.sizes[source])
        if self._shuffle and self.sizes[source] <= TABLE:
            record = int(self._table(source, visit)[record])
        elif self._shuffle:
            record = self._permuted(record, self.sizes[source], self._epoch_seed(source, visit))
        return source, record, visit

    @staticmethod
    def _permuted(record: int, size: int, seed: int) -> int:
        top = size - 1
        top += top & (top - 1) == 0  # index_shuffle 0.2.18 is no permutation where max_index is a power of 4: take one more and walk on
        record = index_shuffle(record, max_index=top, seed=seed, rounds=4)
        return record if record < size else index_shuffle(record, max_index=top, seed=seed, rounds=4)

    def _make_table(self, source: int, visit: int) -> np.ndarray:
        return keyed_rng(self._seed, "order", source, visit).permutation(self.sizes[source]).astype(np.uint16)

    def _make_epoch_seed(self, source: int, visit: int) -> int:
        return int(keyed_rng(self._seed, "order", source, visit).integers(2**32))


class Order:
    """Endless: every source shuffles and repeats on its own, `order[n]` is the n-th draw over all streams.

    Weights are shares of draws. Every block of draws holds each source in its share, to within one draw, in random places: a
    regular interleave would send a source always to the same streams, and streams draw at different rates.
    """

    def __init__(self, sizes: tuple[int, ...], *, weights: tuple[float, ...], seed: int, shuffle: bool):
        self._shuffles, self._seed = Shuffles(sizes, seed=seed, shuffle=shuffle), seed
        self._shares = [round(weight / sum(weights) * 2**32) for weight in weights]
        self.drawn = [source for source, share in enumerate(self._shares) if share]  # the others have no weight to speak of
        self._block = functools.lru_cache(maxsize=256)(self._make_block)

    def __getitem__(self, number: int) -> Draw:
        if len(self._shares) == 1:
            return self._shuffles.draw(0, number)
        sources, places = self._block(number // BLOCK)
        return self._shuffles.draw(sources[number % BLOCK], places[number % BLOCK])

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


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of sources from some steps on, the first of them 0, and how many draws of each there may be over all streams (None = no limit)."""

    points: tuple[tuple[int, tuple[float, ...]], ...]
    linear: bool
    limits: tuple[int | None, ...]

    def at(self, step: int) -> tuple[float, ...]:
        """Shares of the draws that are made for a step, counted from 0; they add up to 1."""
        steps, shares = [at for at, _ in self.points], [[weight / sum(weights) for weight in weights] for _, weights in self.points]
        if self.linear:
            return tuple(float(np.interp(step, steps, column)) for column in zip(*shares))
        return tuple(shares[max(n for n, at in enumerate(steps) if at <= step)])


class Mixer:
    """The draws of logical stream `first` of `step`, one after the other, by weights that may change from each to the next.

    A source's places first, first + step, ... are those of this stream. It counts how far each source's draws are behind the sum of its shares. Of the
    sources that are behind enough the one that would first be a whole draw behind comes next (Tijdeman 1980, "The chairman assignment problem"), so that
    every source stays within a draw of what was asked for in each stream, whatever the weights become and however many draws a step takes.
    """

    def __init__(self, shuffles: Shuffles, weights: Weights, *, first: int, step: int):
        self._shuffles, self._weights, self._first, self._step = shuffles, weights, first, step
        self.drawn = [source for source, given in enumerate(zip(*(given for _, given in weights.points))) if any(given)]
        self.counts = [0] * len(shuffles.sizes)
        # Streams begin at other places of one interleave: else all of them would draw the same source at once.
        shares, self.behind = _parts(weights.at(0)), [0] * len(shuffles.sizes)
        for _ in range(int(first * GOLDEN % 1 * PHASES)):
            self._next(shares)
        self._shares = functools.lru_cache(maxsize=8)(self._make_shares)

    def draw(self, step: int) -> Draw:
        """The next draw, made for a step of the run. Raises ConfigError where no source is left."""
        left = tuple(limit is None or self._first + self._step * count < limit for limit, count in zip(self._weights.limits, self.counts))
        source = self._next(self._shares(step, left))
        self.counts[source] += 1
        return self._shuffles.draw(source, self._first + self._step * (self.counts[source] - 1))

    def restore(self, *, counts: list[int], behind: list[int]) -> None:
        """Goes on with draws by source, and how far each was behind, as they were."""
        self.counts, self.behind = list(counts), list(behind)

    def _make_shares(self, step: int, left: tuple[bool, ...]) -> list[int]:
        weights = [weight if more else 0.0 for weight, more in zip(self._weights.at(step), left)]
        if not any(weights):
            raise ConfigError(
                f"the data ends in step {step + 1}: logical stream {self._first} of {self._step} has drawn all sources that have weight there as often as data.max_epochs "
                f"allows. End this run with --config.train.steps={max(step, 1)}, or raise --config.data.max_epochs (with --allow_change=data.max_epochs it goes on)."
            )
        return _parts(weights)

    def _next(self, shares: list[int]) -> int:
        behind, drawn = self.behind, [source for source, share in enumerate(shares) if share]
        for source in drawn:
            behind[source] += shares[source]
        enough = ONE // max(2 * len(drawn) - 2, 1)
        chosen = min([s for s in drawn if behind[s] >= enough] or drawn, key=lambda s: (ONE - enough - behind[s]) / shares[s])
        behind[chosen] -= ONE
        return chosen


def _parts(weights: tuple[float, ...] | list[float]) -> list[int]:
    """Weights as whole parts of ONE, which they add up to."""
    parts = [int(weight / sum(weights) * ONE) for weight in weights]
    parts[max(range(len(parts)), key=parts.__getitem__)] += ONE - sum(parts)
    return parts


class Pass:
    """Every record of every source once, in source order."""

    def __init__(self, sizes: tuple[int, ...]):
        self._first = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Draw:
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        return source, number - int(self._first[source]), 0
