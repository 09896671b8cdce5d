"""The objectives: each one file with the features of its examples and its loss."""

from typing import Any, NamedTuple

from ptm.objectives import causal, mlm, span_corruption


class Entry(NamedTuple):
    """A row of OBJECTIVES: the config dataclass and the objective that it configures."""

    config: type
    build: Any


OBJECTIVES: dict[str, Entry] = {
    "causal": Entry(causal.Config, causal.Causal),
    "mlm": Entry(mlm.Config, mlm.MLM),
    "span_corruption": Entry(span_corruption.Config, span_corruption.SpanCorruption),
}
