"""What a run writes while it goes on: rows of metrics and of clocks in the workdir, trackers, a progress line, throughput.

metrics.jsonl holds deterministic values only, so that two equal runs write equal bytes; everything that a clock or a machine decides
goes to timing.jsonl, and what was compiled to compiles.jsonl. Each line is one strict JSON object: `step` first, then sorted keys; floats as
Python's repr, which reads back to the same bits; values that are not finite as the strings "nan", "inf" and "-inf".
"""

import importlib
import json
import math
import numbers
import os
import re
import resource
import shutil
import statistics
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, Self, TextIO

import jax

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
    with open(path, encoding="utf-8", errors="replace") as file:
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
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
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


# Throughput.


class Waits:
    """Whether the devices wait for the host, between two calls of `take`: told for each step when its batch has come and just before it is dispatched.

    A step is queued behind the one before it, so the devices wait only where that one has ended already when the next is given to them.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last, self._data, self._host, self._steps, self._queued, self._waited = 0.0, 0.0, 0.0, 0, 0, 0

    def start(self) -> None:
        """A batch is asked for."""
        self._last = self._clock()

    def batch(self) -> None:
        """It has come."""
        self._data += self._clock() - self._last
        self._steps += 1

    def dispatch(self, before: jax.Array | None) -> None:
        """A step is about to be dispatched; `before` is of the one before it, None where the host has waited for that one's end on purpose."""
        self._host += self._clock() - self._last
        if before is not None:
            self._queued += 1
            self._waited += before.is_ready()

    def take(self) -> dict[str, float]:
        """data_seconds, a step's mean wait for its batch; host_seconds, the same until the batch is on its way to the devices; and devices_waited, the share of
        steps before whose dispatch the devices had nothing to do."""
        values = {"data_seconds": self._data / self._steps, "host_seconds": self._host / self._steps} if self._steps else {}
        values |= {"devices_waited": self._waited / self._queued} if self._queued else {}
        self._data, self._host, self._steps, self._queued, self._waited = 0.0, 0.0, 0, 0, 0
        return values


class Peers:
    """Which of several processes keeps the others waiting: the same one, `ROWS` times in a row, by the seconds that its host needs for a step."""

    FACTOR, SHARE, ROWS = 2.0, 0.5, 3  # of the others' median, of the time of a step

    def __init__(self) -> None:
        self._slow: tuple[int | None, int] = (None, 0)  # the process, and in how many rows

    def look(self, hosts: Sequence[str], seconds: Sequence[float], step_time: float | None) -> tuple[dict[str, float], str | None]:
        """Values for a timing row, of the slowest process, and a line to be told once where it is slow; nothing of a process that is alone, or without a batch."""
        if len(seconds) == 1 or not any(seconds):
            return {}, None
        number = max(range(len(seconds)), key=seconds.__getitem__)
        own, others = seconds[number], statistics.median(each for other, each in enumerate(seconds) if other != number)
        slow = step_time is not None and own > self.FACTOR * others and own > self.SHARE * step_time
        self._slow = (number, self._slow[1] + 1 if self._slow[0] == number else 1) if slow else (None, 0)
        values = {"slowest_process": number, "slowest_host_seconds": own}
        if self._slow[1] != self.ROWS:
            return values, None
        return values, (
            f"Process {number} ({hosts[number]}) keeps the others waiting: its host takes {duration(own)} for a batch, the others' {duration(others)} (median), "
            f"a step {duration(step_time)}."
        )


class StepTimer:
    """Seconds a step takes, as the median over a window, from the moments at which the host knows a step to be finished.

    Dispatching a step returns long before it is done, so the time between dispatches means nothing by itself. The loop calls `mark`
    where it reads the metrics of a step anyway, every step or every few; this adds no wait of its own.
    """

    def __init__(self, *, window: int = 32, clock: Callable[[], float] = time.perf_counter) -> None:
        self._times: deque[float] = deque(maxlen=window)
        self._clock = clock
        self._last: tuple[int, float] | None = None

    def mark(self, step: int) -> None:
        """Says that `step` has finished now. The first mark, and the first after a pause, only start the clock."""
        now = self._clock()
        if self._last is not None and step > self._last[0]:
            self._times.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)

    def pause(self) -> None:
        """Leaves out the time until the next mark: evaluation, checkpoint, a new compilation."""
        self._last = None

    @property
    def step_time(self) -> float | None:
        """Median seconds of a step; None before two marks."""
        return statistics.median(self._times) if self._times else None


MFU = (
    "MFU = model FLOPs per second / (dense bf16 peak of a device * devices). Model FLOPs of a training step = 3 * those of the forward pass, "
    "2 for each multiply-add of the matrix products, recomputation not counted (Chowdhery et al. 2022, PaLM, appendix B)."
)

# Dense bf16 FLOPs per second of one device, by jax's device_kind. Sources: Google Cloud TPU system architecture pages (v4, v5e, v5p,
# v6e); NVIDIA data sheets of A100, H100 SXM and H200 SXM (halved where they count sparsity).
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5e|TPU v5 lite": 197e12,
    "TPU v5p|TPU v5": 459e12,
    "TPU v6e|TPU v6 lite": 918e12,
    "NVIDIA A100.*": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of one device in FLOPs per second; None for a device that PEAKS does not know."""
    return next((peak for kind, peak in PEAKS.items() if re.fullmatch(kind, device_kind)), None)


def throughput(step_time: float, *, tokens: float, forward_flops: float, device_kind: str, devices: int) -> dict[str, float]:
    """Timing row of training steps of `step_time` seconds on `tokens` tokens and `forward_flops` (whole batch, forward pass; see MFU).

    Keys: step_time, tokens_per_second, model_flops_per_second, and mfu where the device's peak is known.
    """
    values = {"step_time": step_time, "tokens_per_second": tokens / step_time, "model_flops_per_second": 3.0 * forward_flops / step_time}
    peak = peak_flops(device_kind)
    return values if peak is None else values | {"mfu": values["model_flops_per_second"] / (peak * devices)}


def memory() -> dict[str, int]:
    """Peak bytes so far: of the fullest local device (where its backend counts them) and of this process on the host."""
    unit = 1 if sys.platform == "darwin" else 1024
    values = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return values | ({"device_peak_bytes": max(peaks)} if peaks else {})
