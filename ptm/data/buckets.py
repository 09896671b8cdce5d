"""Rows of one example each, of about equal length side by side: for answers, which are made example by example and not from packed rows.

A batch is cut to one of a few lengths, so that padding is hardly paid for and each length is compiled once.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from ptm.data.batch import Example, Featurizer
from ptm.data.pack import Batch, Layout, Row, stack

COUNT = 4  # of lengths: with halves, an example fills more than half of a row, or is shorter than an eighth of the longest
MULTIPLE = 8  # of lengths but the last: what accelerators like, and few axes of a mesh do not divide


def shapes(featurizer: Featurizer) -> list[dict[str, int]]:
    """The sizes that the dimensions of a batch may have, from the shortest rows to whole ones: each half as long as the next one, in all dimensions alike."""
    whole = featurizer.lengths
    packed = Layout(featurizer).packed
    found = []
    for halvings in reversed(range(COUNT)):
        shorter = {dim: min(size, -(-size // (MULTIPLE << halvings)) * MULTIPLE) if dim in packed else size for dim, size in whole.items()}
        if shorter not in found:
            found.append(shorter)
    return found


def batches(examples: Iterable[tuple[Any, Example]], *, featurizer: Featurizer, batch_size: int, window: int) -> Iterator[tuple[list[Any], Batch]]:
    """Batches of `batch_size` rows with the keys of their examples; rows of padding, which have no key, fill the last one up.

    Examples come as (key, example), and as many as the next multiple of `batch_size` above `window` are looked at at once: the longest of them come first,
    and what was read is given out before more is read. Raises ValueError for an example longer than a row.
    """
    layouts = [Layout(featurizer, lengths=lengths) for lengths in shapes(featurizer)]
    examples = iter(examples)
    while found := list(itertools.islice(examples, -(-window // batch_size) * batch_size)):
        sizes = [layouts[0].sizes(example) for _, example in found]
        levels = [_level(layouts, size) for size in sizes]
        order = sorted(range(len(found)), key=lambda n: (levels[n], sum(sizes[n].values())), reverse=True)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            layout = layouts[levels[chosen[0]]]
            rows = [featurizer.finish(_row(layout, found[n][1], sizes[n])) for n in chosen]
            rows += [featurizer.finish(layout.padding()) for _ in range(batch_size - len(chosen))]
            yield [found[n][0] for n in chosen], stack(rows)


def _level(layouts: list[Layout], sizes: dict[str, int]) -> int:
    for level, layout in enumerate(layouts):
        if all(size <= layout.lengths[dim] for dim, size in sizes.items()):
            return level
    raise ValueError(f"an example has {sizes} positions, but a row holds {layouts[-1].lengths}: the objective's `features` must keep to its lengths.")


def _row(layout: Layout, example: Example, sizes: dict[str, int]) -> Example:
    row = Row(layout)
    row.add(example, sizes)
    row.add_unpacked(example)
    return row.arrays
