"""How fast a run goes, and what it waits for: seconds of a step, waits for the host and for other processes, throughput with its definition, memory."""

import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax

from ptm.log import duration


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
