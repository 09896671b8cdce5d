"""What tests of faults tell of: which fault, how often it was tried, how often something was lost by it; and the table of all.

A test tells it before it tries, by `tell(record_property, ...)` or pytest's own `record_property("fault", NAME)`, `("tried", 6)`, `("lost", 0)`, in this order, once for
each fault. A NAME begins with its number in docs/reliability.md. Where the test fails, all that it tried counts as lost.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

COLUMNS = ("fault", "tried", "survived", "lost")
Row = tuple[str, int, int, int]


class Told(NamedTuple):
    """What one test tells, as pytest keeps it, and whether the test passed."""

    properties: Iterable[tuple[str, Any]]
    passed: bool


def tell(record_property: Callable[[str, Any], None], fault: str, *, tried: int = 1, lost: int = 0) -> None:
    """Tells one fault."""
    for name, value in (("fault", fault), ("tried", tried), ("lost", lost)):
        record_property(name, value)


def table(tests: Iterable[Told]) -> list[Row]:
    """A row for each fault, in the order of their numbers; what several tests tell of one is added up."""
    sums: dict[str, list[int]] = {}
    for properties, passed in tests:
        entries: list[dict[str, Any]] = []
        for name, value in properties:
            if name == "fault":
                entries.append({"fault": value, "tried": 1, "lost": 0})
            elif name in ("tried", "lost") and entries:
                entries[-1][name] = value
        for entry in entries:
            row = sums.setdefault(entry["fault"], [0, 0])
            row[0] += entry["tried"]
            row[1] += entry["lost"] if passed else entry["tried"]
    return [(fault, tried, tried - lost, lost) for fault, (tried, lost) in sorted(sums.items(), key=lambda item: _key(item[0]))]


def text(rows: list[Row], *, markdown: bool = False) -> str:
    """The table with its sum, for a terminal or as Markdown."""
    total = ("all", *(sum(row[column] for row in rows) for column in (1, 2, 3)))
    cells = [[str(cell) for cell in row] for row in (COLUMNS, *rows, total)]
    if markdown:
        head, *rest = ("| " + " | ".join(row) + " |" for row in cells)
        return "\n".join([head, "|---|---:|---:|---:|", *rest])
    width = max(len(row[0]) for row in cells)
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in cells)


def _key(fault: str) -> tuple[int, str]:
    number = re.match(r"\d+", fault)
    return int(number.group()) if number else 10**6, fault
