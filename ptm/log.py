"""What a run writes while it goes on: rows of metrics and of clocks in the workdir, trackers, a progress line.

metrics.jsonl holds deterministic values only, so that two equal runs write equal bytes; everything that a clock or a machine decides
goes to timing.jsonl, and what was compiled to compiles.jsonl. Each line is one strict JSON object: `step` first, then sorted keys; floats as
Python's repr, which reads back to the same bits; values that are not finite as the strings "nan", "inf" and "-inf".
"""

import importlib
import json
import math
import numbers
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, Protocol, Self, TextIO

from ptm import atomic, fields, untrusted
from ptm.fields import ConfigError

METRICS, TIMING, COMPILES, SKIPPED = "metrics.jsonl", "timing.jsonl", "compiles.jsonl", "skipped.jsonl"
TAIL = 1 << 16  # bytes at the end of a file that hold its last row
NOT_FINITE = ("nan", "inf", "-inf")


# Rows.


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def row(step: int, values: Mapping[str, Any]) -> str:
    """One line of a JSON lines file, without its end; values are numbers or anything that `float` takes."""
    return json.dumps({"step": int(step)} | written({key: values[key] for key in sorted(values)}), allow_nan=False)


def written(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as strict JSON takes them: those that are not finite as words."""
    cells = {key: _number(value) for key, value in values.items()}
    return {key: value if math.isfinite(value) else str(value) for key, value in cells.items()}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        cells = untrusted.json_of(line)
    except ValueError:
        return None
    if not line.endswith("\n") or not isinstance(cells, dict) or not isinstance(cells.get("step"), int):
        return None
    return {key: float(value) if value in NOT_FINITE else value for key, value in cells.items()}


def read(path: str) -> list[dict[str, Any]]:
    """Rows of a JSON lines file, not-finite values as floats again; a line that is torn or no row is left out, a missing file is empty."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        return [cells for cells in map(_parse, file) if cells is not None]


def last_step(path: str) -> int | None:
    """The step of the last row of a JSON lines file, by its end alone; None without rows."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return None
    rows = (_parse(line + "\n") for line in reversed(lines[:-1]))  # what comes after the last end of a line is torn
    return next((cells["step"] for cells in rows if cells is not None), None)


def truncate(path: str, step: int, owed: Collection[str] = ()) -> None:
    """Drops the rows of a JSON lines file after `step`, those of `owed` evals at it, and torn lines, in one atomic replacement; the other bytes stay as they are."""

    def stays(cells: dict[str, Any]) -> bool:
        return cells["step"] < step or cells["step"] == step and not all(key == "step" or key.partition("/")[0] in owed for key in cells)

    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        kept = [line for line in file if (cells := _parse(line)) is not None and stays(cells)]
    with atomic.replacing(path) as file:
        file.writelines(kept)


# Trackers. Each takes (workdir, name=, config=, resume_step=), where resume_step is None for a run that starts.


class Writer(Protocol):
    """Where rows go besides the JSON lines: `write` one row, `flush` to disk, `close` at the end."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _import(module: str, *, writer: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"log.writers: '{writer}' needs the package {module} ({error}). Install it: pip install '{install}'.") from None


class TensorBoard:
    """Event files in WORKDIR/tb, written by tensorboardX; on resume the later events are marked as purged."""

    def __init__(self, workdir: str, *, name: str, config: Mapping[str, Any], resume_step: int | None) -> None:
        module = _import("tensorboardX", writer="tensorboard", install="tensorboardX")
        folder = os.path.join(workdir, "tb")
        if resume_step is None:
            shutil.rmtree(folder, ignore_errors=True)
        # File names have a resolution of a second, and an existing file would be overwritten.
        suffix = "." + uuid.uuid4().hex[:8]
        self._writer = module.SummaryWriter(folder, purge_step=None if resume_step is None else resume_step + 1, filename_suffix=suffix)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A tracker's run whose own thread writes and knows no flush."""

    _run: Any

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class Wandb(_Run):
    """A Weights & Biases run, found again through WORKDIR/wandb_id; WANDB_MODE=offline needs no network, WANDB_PROJECT names the project."""

    def __init__(self, workdir: str, *, name: str, config: Mapping[str, Any], resume_step: int | None) -> None:
        module = _import("wandb", writer="wandb", install="ptm[wandb]")
        path = os.path.join(workdir, "wandb_id")
        if resume_step is None or not os.path.exists(path):
            with open(path, "w", encoding="utf-8") as file:
                file.write(uuid.uuid4().hex[:8])
        with open(path, encoding="utf-8") as file:
            run_id = file.read()
        project = os.environ.get("WANDB_PROJECT", "ptm")
        self._run = module.init(project=project, name=name, dir=workdir, id=run_id, resume="allow", config=dict(config))
        # The tracker's own step refuses to go back, which a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})


class Trackio(_Run):
    """A trackio run named after the workdir, in trackio's own folder (TRACKIO_DIR)."""

    def __init__(self, workdir: str, *, name: str, config: Mapping[str, Any], resume_step: int | None) -> None:
        module = _import("trackio", writer="trackio", install="ptm[trackio]")
        self._run = module.init(project="ptm", name=name, config=dict(config), resume="never" if resume_step is None else "allow", embed=False)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)


WRITERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Log:
    """The rows of one run, in WORKDIR/metrics.jsonl, timing.jsonl, compiles.jsonl, skipped.jsonl (once a step is), and the named `writers`.

    `resume_step` is the step of the checkpoint that the run goes on from: later rows are dropped. None starts anew: all are dropped. Rows of `owed` evals
    at that step are too: they are made again.
    With `primary` off (every process but the first) nothing is opened and nothing written.
    """

    def __init__(
        self,
        workdir: str,
        *,
        writers: tuple[str, ...] = (),
        resume_step: int | None = None,
        owed: Collection[str] = (),
        config: Mapping[str, Any] | None = None,
        primary: bool = True,
    ) -> None:
        classes = [fields.lookup(WRITERS, name, "log.writers") for name in writers]
        self._paths: dict[str, str] = {}
        self._writers: list[Writer] = []
        if not primary:
            return
        os.makedirs(workdir, exist_ok=True)
        name = os.path.basename(os.path.abspath(workdir))
        # Writers first: a missing package must not cost rows.
        self._writers = [cls(workdir, name=name, config=config or {}, resume_step=resume_step) for cls in classes]
        self._paths = {file: os.path.join(workdir, file) for file in (METRICS, TIMING, COMPILES, SKIPPED)}
        for path in self._paths.values():
            truncate(path, -1 if resume_step is None else resume_step, owed)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a row of deterministic values, known after `step` updates."""
        self._write(METRICS, row(step, values))
        for writer in self._writers:
            writer.write(step, {key: _number(value) for key, value in values.items()})

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a row of clocks, throughput, compile events, memory, and `time`, seconds since 1970; trackers get it as 'timing/KEY'."""
        self._write(TIMING, row(step, {"time": time.time(), **values}))
        for writer in self._writers:
            writer.write(step, {f"timing/{key}": _number(value) for key, value in values.items()})

    def compiled(self, step: int, cells: Mapping[str, Any]) -> None:
        """Writes a row of what was compiled after `step` updates; not for trackers, as it holds words."""
        self._write(COMPILES, json.dumps({"step": step, **cells}))

    def skipped(self, step: int, cells: Mapping[str, Any]) -> None:
        """Writes a row of a step that was not accepted; not for trackers, as it holds words."""
        self._write(SKIPPED, json.dumps({"step": step, **cells}, allow_nan=False))

    def _write(self, name: str, line: str) -> None:
        if name in self._paths:
            with open(self._paths[name], "a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")

    def flush(self) -> None:
        """Returns when all rows are on disk: call it before a checkpoint commits."""
        for path in filter(os.path.exists, self._paths.values()):
            with open(path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Flushes all and closes the trackers; nothing is written after it, and a second call does nothing."""
        self.flush()
        for writer in self._writers:
            writer.close()
        self._paths, self._writers = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Terminal.


def duration(seconds: float) -> str:
    """Seconds as a reader says them: '850 ms', '12.3 s', '3m 05s', '2h 07m', '4d 03h'."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, smaller, small_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= unit:
            return f"{whole // unit}{name} {whole % unit // smaller:02d}{small_name}"
    return f"{whole // 60}m {whole % 60:02d}s"


def count(number: float) -> str:
    """A number to three digits with its unit: '999', '1.23k', '45.6M', '1.3T'."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}" if unit or number != round(number) else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}P"


def progress_line(step: int, *, steps: int, loss: float | None = None, tokens_per_second: float | None = None, seconds_left: float | None = None) -> str:
    """The text of one progress report; what is None is left out."""
    parts = [f"step {step:,}/{steps:,} ({100 * step / steps:.0f} %)"]
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if tokens_per_second is not None:
        parts.append(f"{count(tokens_per_second)} tokens/s")
    if seconds_left is not None and step < steps:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


class Progress:
    """Progress on `stream` (stderr): one line that is rewritten on a terminal, else a plain line every `every` seconds and for the last step."""

    def __init__(self, steps: int, *, stream: TextIO | None = None, every: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._stream, self._clock = steps, stream or sys.stderr, clock
        self._live = self._stream.isatty()
        self._every = 0.1 if self._live else every
        self._last = -math.inf
        self._open = False

    def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None, step_time: float | None = None) -> None:
        """Reports `step` of the run, unless the last report is too fresh; `step_time` in seconds gives the time left."""
        now = self._clock()
        if now - self._last < self._every and step < self._steps:
            return
        self._last = now
        left = None if step_time is None else step_time * (self._steps - step)
        line = progress_line(step, steps=self._steps, loss=loss, tokens_per_second=tokens_per_second, seconds_left=left)
        if self._live:
            # A line that wraps could not be rewritten.
            self._stream.write("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._open = self._live

    def message(self, text: str) -> None:
        """Prints a line of its own; the live line comes back with the next update."""
        self._stream.write(("\r\x1b[K" if self._open else "") + text + "\n")
        self._stream.flush()
        self._open = False

    def close(self) -> None:
        """Leaves the live line on the screen and ends it."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
        self._open = False
