"""Items through a compiled step: the rows of each in batches of similar length, what came out given back item by item in the order of the items."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from ptm import interrupts, parallel
from ptm.data import buckets
from ptm.data.batch import Example, Featurizer

T = TypeVar("T")
Outputs = list[dict[str, np.ndarray]]  # of each row of an item, in their order
WINDOW = 32  # batches of rows that are looked ahead at for such of a similar length


class _Pending:
    """An item whose rows are on their way; `size` is known once all of them were made."""

    def __init__(self, item: Any) -> None:
        self.item, self.size = item, None
        self.outputs: dict[int, dict[str, np.ndarray]] = {}

    def done(self) -> bool:
        return self.size == len(self.outputs)


def through(
    items: Iterable[T], *, rows: Callable[[T], Iterable[Example]], featurizer: Featurizer, step: Callable[[Any, Any], dict[str, jax.Array]], run: Any, params: Any,
    batch_size: int, window: int | None = None,
) -> Iterator[tuple[T, Outputs]]:  # fmt: skip
    """(item, outputs of `step(params, batch)` for each of its `rows`) in the order of the items, as soon as all before it are done.

    Batches hold `batch_size` rows of one example each; `window` rows are read ahead. Every process makes all batches and supplies its rows of them, and
    the outputs of `step` are whole on each, so that all processes give the same items.
    """
    window = WINDOW * batch_size if window is None else window
    local = parallel.local_rows(run.layout, batch_size)
    pending: collections.OrderedDict[int, _Pending] = collections.OrderedDict()

    def examples() -> Iterator[tuple[tuple[int, int], Example]]:
        for number, item in enumerate(items):
            entry = pending[number] = _Pending(item)
            size = 0
            for example in rows(item):
                yield (number, size), example
                size += 1
            entry.size = size

    def collect(keys: list[tuple[int, int]], values: dict[str, jax.Array]) -> None:
        found = jax.device_get(values)
        for place, (number, row) in enumerate(keys):
            pending[number].outputs[row] = {name: array[place] for name, array in found.items()}

    def finished() -> Iterator[tuple[T, Outputs]]:
        while pending and (entry := next(iter(pending.values()))).done():
            pending.popitem(last=False)
            yield entry.item, [entry.outputs[row] for row in range(entry.size)]

    before = None  # the batch that the devices work on while the next one is made
    for keys, batch in buckets.batches(examples(), featurizer=featurizer, batch_size=batch_size, window=window):
        interrupts.poll()
        values = step(params, run.to_device({name: array[local] for name, array in batch.items()}, batch_size=batch_size, rows=local))
        if before is not None:
            collect(*before)
            yield from finished()
        before = (keys, values)
    if before is not None:
        collect(*before)
    yield from finished()
    assert not pending, "every row of every item came back"
