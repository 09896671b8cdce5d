"""The endless batches of a run: logical streams side by side, prepared ahead in a thread, with exact state."""

import bisect
import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ptm.config import Data, weight_points
from ptm.data.batch import Featurizer, keyed_rng
from ptm.data.documents import Corpus, Tokenizer
from ptm.data.mixture import TABLE, Mixer, Order, Pass, Shuffles, Weights
from ptm.data.pack import Batch, stack
from ptm.data.pipeline import COUNTED, State, Stream
from ptm.fields import ConfigError

ENOUGH = 1.25  # times as many rows as a sample tells of may be there
SAMPLE = 64  # records of a source by which it is told how many rows it gives
Later = tuple[int, int, Featurizer]  # from a step on: the batch size, and what makes the rows
Counts = dict[str, Any]  # of the logical streams of a host
Drawn = dict[int, tuple[tuple[int, int], ...]]  # by logical stream, (source, record) of what the rows of a batch are made of


class Loader(Iterator[Batch]):
    """Batches of a split without end; batch t is a pure function of (data, seed, t), whatever rows this host asks for.

    Stream p of S gives the rows p * B/S to (p + 1) * B/S - 1 of every batch. State, counts and bad records are those of the last batch
    handed out, however many were prepared ahead.
    """

    def __init__(
        self,
        data: Data,
        *,
        featurizer: Featurizer,
        tokenizer: Tokenizer,
        seed: int,
        batch_size: int,
        streams: int,
        rows: Sequence[int] | Callable[[int], Sequence[int]] | None = None,
        split: str = "train",
        later: Sequence[Later] = (),
    ):
        """`rows` are this host's row numbers of the global batch, in the order it wants them, or what gives them for a batch size; by default all.

        `later` says from which steps on batches are of another size, or rows longer.
        """
        self._sizes = [(0, batch_size), *((start, size) for start, size, _ in later)]
        for _, size in self._sizes:
            if size % streams:
                raise ConfigError(f"data.streams={streams} does not divide the batch size {size}; choose a divisor, or None for the largest one up to 64.")
        self._rows = {size: list(rows(size) if callable(rows) else range(size) if rows is None else rows) for _, size in self._sizes}
        for size, chosen in self._rows.items():
            if not chosen or not all(0 <= row < size for row in chosen):
                raise ValueError(f"rows={chosen} must be numbers from 0 to {size - 1}, at least one.")
        self._count, self._prefetch = streams, data.prefetch
        longer = [(start, made_by) for (start, _, made_by), before in zip(later, (featurizer, *(made_by for *_, made_by in later))) if made_by is not before]
        self._longest = max((featurizer, *(made_by for _, made_by in longer)), key=lambda made_by: made_by.lengths["L"])
        self._corpus = Corpus(data, split=split, tokenizer=tokenizer)
        self._mixed = bool(data.weight_schedule or data.max_epochs)
        windows = data.packing == "window"
        self._limits = _limits(data, self._corpus.sizes)
        order = self._orders(data, seed=seed)
        self._sampler = functools.partial(Stream, self._corpus, order=Pass(self._corpus.sizes), data=data, featurizer=self._longest, seed=seed, windows=windows)
        self._lengths = [(start, made_by.lengths["L"]) for start, made_by in ((0, featurizer), *longer)]
        self._streams = {
            p: Stream(self._corpus, order=order(p), data=data, featurizer=featurizer, seed=seed, first=p, step=streams, windows=windows, longer=longer)
            for p in sorted({row * streams // size for size, chosen in self._rows.items() for row in chosen})
        }
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="ptm-data")
        self._ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        self._error: BaseException | None = None
        self._snapshots = self._take()
        self._drawn: Drawn = {}

    def _orders(self, data: Data, *, seed: int) -> Callable[[int], Order | Mixer]:
        """The order that a logical stream takes its draws from: one for all, or a Mixer of its own."""
        sizes, weights = self._corpus.sizes, self._corpus.weights
        if not self._mixed:
            order = Order(sizes, weights=weights, seed=seed, shuffle=data.shuffle)
            return lambda p: order
        asked = Weights(weight_points(data.weight_schedule) or ((0, weights),), data.weight_change == "linear", self._limits)
        shuffles = Shuffles(sizes, seed=seed, shuffle=data.shuffle)
        return lambda p: Mixer(shuffles, asked, first=p, step=self._count)

    def __next__(self) -> Batch:
        """The next batch: a dict of arrays [rows of this host, ...]. An error of the thread is raised here, and again by later calls."""
        if not self._prefetch:
            batch, self._snapshots, self._drawn = self._make()
            return batch
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._worker.submit(self._make))
        batch, self._snapshots, self._drawn = self._ahead.popleft().result()
        return batch

    def _make(self) -> tuple[Batch, dict[int, State], Drawn]:
        if self._error is not None:
            raise self._error  # streams stopped in the middle of a batch: what follows would not be the batches of this run
        try:
            size = _at(self._sizes, next(iter(self._streams.values())).step)
            share = size // self._count
            made = {p: [stream.next_row() for _ in range(share)] for p, stream in self._streams.items()}
            batch = stack([made[row // share][row % share] for row in self._rows[size]])
            for stream in self._streams.values():
                stream.step += 1
            return batch, self._take(), {p: stream.take_drawn() for p, stream in self._streams.items()}
        except BaseException as error:
            self._error = error
            raise

    def _take(self) -> dict[int, State]:
        return {p: stream.snapshot() for p, stream in self._streams.items()}

    def require(self, steps: int) -> None:
        """Refuses a run of so many steps for which the data will not do, if sources may be drawn so often only: by the first records of each in random order.

        Raises ConfigError where rows are clearly too few; what is near the end is told at the step where the data ends.
        """
        if any(limit is None and weight for limit, weight in zip(self._limits, self._corpus.weights)):
            return
        sampler, rows = self._sampler(), 0.0
        for source, (size, limit, weight) in enumerate(zip(self._corpus.sizes, self._limits, self._corpus.weights)):
            if weight:
                chosen = keyed_rng("sample", source).permutation(size)[:SAMPLE] if size <= TABLE else keyed_rng("sample", source).integers(size, size=SAMPLE)
                rows += limit * sum(sampler.rows_of(source, int(record)) for record in chosen) / len(chosen)
        # In rows of the last length; a phase lasts until the next one begins.
        starts = sorted({start for start, _ in (*self._sizes, *self._lengths) if start < steps})
        each = [_at(self._sizes, start) * _at(self._lengths, start) / self._lengths[-1][1] for start in starts]
        needed = round(sum(rows_of * (end - start) for rows_of, start, end in zip(each, starts, (*starts[1:], steps))))
        if rows * ENOUGH < needed:
            raise ConfigError(
                f"data.max_epochs leaves about {rows:,.0f} rows, and train.steps={steps} with train.batch_size={max(self._rows)} needs {needed:,}: raise "
                f"data.max_epochs to about {needed / max(rows, 1):.2g} times what it is, add sources, or lower train.steps to about {int(steps * rows / needed)}."
            )

    def state(self) -> dict[int, State]:
        """For each logical stream of this host its JSON-ready state after the last batch handed out."""
        return {p: _lists({**snapshot, "bad": sorted(snapshot["bad"])}) for p, snapshot in self._snapshots.items()}

    def restore(self, states: dict[Any, State]) -> None:
        """Goes on where `states` were taken: at least this host's streams, by number (an int, or a string as JSON makes it)."""
        by_number = {int(p): state for p, state in states.items()}
        for saved in {state["streams"] for state in by_number.values()} - {self._count}:
            raise ConfigError(f"the data state was saved with {saved} logical streams, this run has {self._count}; set --config.data.streams={saved}.")
        missing = sorted(set(self._streams) - set(by_number))
        if missing:
            raise ConfigError(f"the data state lacks the logical streams {missing}; it holds {sorted(by_number)}.")
        self._drain()
        self._error = None
        for p, stream in self._streams.items():
            stream.restore(by_number[p])
        self._snapshots = self._take()

    def counts(self) -> Counts:
        """For each logical stream of this host what `stats` is made of, ready for JSON."""
        return {str(p): _lists(_counted(snapshot)) for p, snapshot in self._snapshots.items()}

    def stats(self, counts: Sequence[Counts] | None = None) -> dict[str, float]:
        """Figures of the streams up to the last batch handed out: of this host's, or of all those that the `counts` of some hosts have.

        rows; tokens, their positions without padding; padding_share of all their positions; epoch (passes over the source that was read most often), counting
        what is begun; bad_records (distinct ones met). In a mixture, of each source N also epoch_N, draws_N (documents begun), examples_N and tokens_N (what
        rows that are finished hold of it).
        """
        streams = {int(p): stream for host in ([self.counts()] if counts is None else counts) for p, stream in host.items()}
        found = [streams[p] for p in sorted(streams)]
        rows, filled, positions = (sum(stream[key] for stream in found) for key in ("rows", "filled", "positions"))
        draws = sum(stream["draws"] for stream in found) / len(found) * self._count
        shares = [weight / sum(self._corpus.weights) for weight in self._corpus.weights]
        epochs = [draws * share / size for share, size in zip(shares, self._corpus.sizes)]
        counted = {name: [sum(of) for of in zip(*(stream["sources"][name] for stream in found))] for name in COUNTED if "sources" in found[0]}
        if self._mixed:
            epochs = [drawn / size * self._count / len(found) for drawn, size in zip(counted["draws"], self._corpus.sizes)]
        stats = {"rows": rows, "epoch": max(epochs), "tokens": filled, "padding_share": 1 - filled / positions if rows else 0.0}
        if len(epochs) > 1:
            stats |= {f"epoch_{n}": epoch for n, epoch in enumerate(epochs)}
            stats |= {f"{name}_{n}": count for name, counts in counted.items() for n, count in enumerate(counts)}
        return {**stats, "bad_records": len({tuple(bad) for stream in found for bad in stream["bad"]})}

    def drawn(self) -> Drawn:
        """What the last batch handed out is made of, for `record_ids`."""
        return self._drawn

    def record_ids(self, drawn: Drawn) -> list[str]:
        """Ids of the records that the streams of this host had in a batch, without others that are drawn beside them (second segments of pairs)."""
        return list(dict.fromkeys(self._corpus.id(*place) for places in drawn.values() for place in places))

    def bad_records(self) -> list[str]:
        """'ID: reason' of the bad records met up to the last batch handed out."""
        return [f"{self._corpus.id(*key)}: {self._corpus.bad[key]}" for key in sorted(self._bad())]

    def _bad(self) -> frozenset[tuple[int, int]]:
        return frozenset().union(*(snapshot["bad"] for snapshot in self._snapshots.values()))

    def _drain(self) -> None:
        for future in self._ahead:
            future.cancel()
        concurrent.futures.wait(self._ahead)
        self._ahead.clear()

    def close(self) -> None:
        """Stops the thread; no batch can be taken afterwards."""
        self._drain()
        self._worker.shutdown()


def _counted(snapshot: State) -> State:
    """The counts of a stream's snapshot."""
    counts = {key: snapshot[key] for key in ("rows", "filled", "positions", "draws")} | {"bad": sorted(snapshot["bad"])}
    return counts | ({"sources": {name: snapshot["sources"][name] for name in COUNTED}} if "sources" in snapshot else {})


def _at(points: Sequence[tuple[int, int]], step: int) -> int:
    """What holds at a step, of (first step, value)."""
    return points[bisect.bisect_right(points, step, key=lambda point: point[0]) - 1][1]


def _limits(data: Data, sizes: tuple[int, ...]) -> tuple[int | None, ...]:
    """How often each source may be drawn over all streams; None = any number of times."""
    epochs = data.max_epochs * (len(sizes) if len(data.max_epochs) == 1 else 1) or (0.0,) * len(sizes)
    return tuple(int(most * size) if most else None for most, size in zip(epochs, sizes))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value
