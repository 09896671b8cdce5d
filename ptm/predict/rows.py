"""Lines through a compiled function of rows: of each line its examples, or why it cannot be read, and what is made of their outputs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ptm.data.batch import Example, Featurizer, Field
from ptm.data.records import BadRecord
from ptm.evals import stream
from ptm.fields import ConfigError
from ptm.predict.lines import Line


class Read(NamedTuple):
    """What was made of a line: whatever its answer needs besides, and its rows."""

    about: Any
    rows: Iterable[Example]


class Rows:
    """Rows of one example each, of some lengths and fields: what the pipeline knows of a Featurizer that trains nothing."""

    packing, raw_length, visits, max_segments = "none", None, None, 1

    def __init__(self, lengths: dict[str, int], fields: dict[str, Field]) -> None:
        self.lengths, self.fields = lengths, fields

    def finish(self, row: Example) -> Example:
        return row


class _Item:
    """A line on its way."""

    def __init__(self, line: Line) -> None:
        self.record, self.about, self.error = line.record, None, None


def answers(
    lines: Iterable[Line], *, read: Callable[[dict[str, Any]], Read], answer: Callable[[Any, Sequence[dict[str, np.ndarray]]], dict[str, Any]],
    featurizer: Featurizer, step: Callable[[Any, Any], Any], run: Any, params: Any, batch_size: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """`answer(about, outputs of its rows)` of what `read` makes of each line, in order; {"error"} for a line that `read`, or making its rows, refuses."""

    def rows(item: _Item) -> Iterator[Example]:
        try:
            found = read(item.record)
            item.about = found.about
            yield from found.rows
        except (ConfigError, BadRecord) as error:
            item.error = str(error)

    found = stream.through(map(_Item, lines), rows=rows, featurizer=featurizer, step=step, run=run, params=params, batch_size=batch_size)
    for item, outputs in found:
        yield {"error": item.error} if item.error is not None else answer(item.about, outputs)


def text_of(record: dict[str, Any], name: str = "text") -> str:
    """A field of a record that must be text which is not blank. Raises ConfigError."""
    if name not in record:
        raise ConfigError(f"no field '{name}'; it has: {', '.join(record) or 'none'}")
    if not isinstance(record[name], str) or not record[name].strip():
        raise ConfigError(f"field '{name}' is {str(record[name])[:40]!r}, not text")
    return record[name]
