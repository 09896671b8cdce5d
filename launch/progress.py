"""How far a run is, by the files of its workdir, and tables of runs for a person: rewritten in place on a terminal, else a line for each change."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ptm import untrusted

TAIL = 4096  # bytes at the end of a file that hold its last row
EVERY = 1.0  # seconds between two pictures on a terminal


class Progress(NamedTuple):
    """Steps done and to do, tokens a second; None where a run has not said so yet."""

    step: int | None = None
    steps: int | None = None
    speed: float | None = None


def progress(workdir: Path) -> Progress:
    """What the last row of a run's timing.jsonl and its config.json say."""
    row = _last_row(workdir / "timing.jsonl")
    try:
        steps = untrusted.read_json(workdir / "config.json")["train"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        steps = None
    return Progress(row.get("step"), steps, row.get("tokens_per_second"))


def _last_row(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().split(b"\n")[:-1]  # what has no end of line is still being written
        row = untrusted.json_of(lines[-1]) if lines else {}
        return row if isinstance(row, dict) else {}
    except (OSError, ValueError):
        return {}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def cells(found: Progress) -> tuple[str, str]:
    """Progress as it is shown: step of steps, tokens a second."""
    step = "" if found.step is None else f"{found.step:,}" if found.steps is None else f"{found.step:,} of {found.steps:,}"
    return step, "" if found.speed is None else f"{found.speed:,.0f}"


class Live:
    """The table of tasks while they run. On a terminal it is drawn anew; else each change of a task's state is a line."""

    HEAD = ("task", "state", "on", "step", "tokens/s", "time")

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._terminal = stream, clock, stream.isatty()
        self._told: dict[str, str] = {}
        self._drawn, self._last = 0, -EVERY

    def show(self, rows: Mapping[str, Sequence[str]]) -> None:
        """Rows by the names of their tasks: state, place, step, tokens a second, time."""
        changed = [name for name, row in rows.items() if self._told.get(name) != row[0]]
        self._told |= {name: rows[name][0] for name in changed}
        if not self._terminal:
            for name in changed:
                if rows[name][0] != "waiting":
                    print(f"{name}: {rows[name][0]}" + (f" on {rows[name][1]}" if rows[name][1] else ""), file=self._stream, flush=True)
            return
        if not changed and self._clock() - self._last < EVERY:
            return
        self._last = self._clock()
        size = shutil.get_terminal_size()
        lines = columns([self.HEAD, *((name, *row) for name, row in rows.items())])
        if len(lines) > size.lines - 2:  # what does not fit could not be drawn over: those that nothing happens to are left out
            busy = [line for line, row in zip(lines[1:], rows.values()) if row[0] not in ("waiting", "finished")]
            rest = len(rows) - len(busy[: size.lines - 4])
            lines = [lines[0], *busy[: size.lines - 4], f"and {rest} more"]
        self._stream.write(f"\x1b[{self._drawn}A" * bool(self._drawn) + "".join(f"\r{line[: size.columns - 1]}\x1b[K\n" for line in lines) + "\x1b[J")
        self._stream.flush()
        self._drawn = len(lines)
