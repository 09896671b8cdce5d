"""A run that hangs says where: the stacks of all threads are written when no step, evaluation or save ends within a multiple of its usual time.

A thread of its own looks at the clock. Where no thread can run, since code outside of Python hangs and keeps Python's lock, a timer of faulthandler writes the
stacks to stderr.
"""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ptm import hosts
from ptm.log import duration
from ptm.sections import Train

FIRST = 10.0  # times hang_seconds for what was never done before: programs are compiled then
KEPT = 32  # durations of which the usual one is the median
TICKS = 20  # looks within hang_seconds


class Watchdog:
    """What a run is at, and how long that usually takes."""

    def __init__(self, options: Train) -> None:
        self._options = options
        self._usual: dict[str, collections.deque[float]] = collections.defaultdict(lambda: collections.deque(maxlen=KEPT))
        self.now_doing: tuple[str, float] | None = None  # and since when

    def now(self, activity: str | None) -> None:
        """What was going on has ended; `activity` begins, or with None nothing that is watched."""
        before, at = self.now_doing, time.monotonic()
        if before is not None:
            self._usual[before[0]].append(at - before[1])
        self.now_doing = None if activity is None else (activity, at)

    def limit(self, activity: str) -> float:
        """Seconds that an activity may take."""
        usual = self._usual[activity]
        least = self._options.hang_seconds
        return max(least, self._options.hang_factor * statistics.median(usual)) if usual else FIRST * least

    def told(self, activity: str) -> str:
        usual = self._usual[activity]
        return f"usually {duration(statistics.median(usual))}" if usual else "for the first time"


@contextlib.contextmanager
def watch(options: Train, stacks: Path, told: Callable[[str], None]) -> Iterator[Watchdog]:
    """A watchdog of the body, which writes to the file `stacks` and gives `told` a line; with `hang_exit` the process ends then, and all others with it."""
    dog = Watchdog(options)
    if options.hang_seconds is None:
        yield dog
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(dog, options, stacks, told, done), name="watchdog", daemon=True)
    thread.start()
    try:
        yield dog
    finally:
        done.set()
        thread.join()


def _watch(dog: Watchdog, options: Train, stacks: Path, told: Callable[[str], None], done: threading.Event) -> None:
    """Adds up the time that it was awake itself: a process that was stopped, or a machine that slept, does not hang."""
    tick = options.hang_seconds / TICKS
    seen, waited, told_of, looked = None, 0.0, None, time.monotonic()
    while not done.wait(tick):
        faulthandler.dump_traceback_later(FIRST * options.hang_seconds, file=sys.__stderr__)
        before, looked = looked, time.monotonic()
        now = dog.now_doing
        if now is not seen:
            if told_of is not None:
                told(f"{told_of[0]} has ended, after {duration(waited)}; the run goes on.")
            seen, waited, told_of = now, 0.0, None
            continue
        waited += min(looked - before, 2 * tick)
        if now is None or told_of is not None or waited <= dog.limit(now[0]):
            continue
        told_of = now
        with open(stacks, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {now[0]}, for {duration(waited)}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        message = f"{now[0]} has not ended for {duration(waited)} ({dog.told(now[0])}). The stacks of all threads are in {stacks}."
        if options.hang_exit:
            hosts.fail(f"{message} Ended by train.hang_exit; start the same command again to go on from the last checkpoint.", hosts.INTERRUPTED)
        told(f"{message} Still waiting; --config.train.hang_exit=True would end the run, to be started again.")
    faulthandler.cancel_dump_traceback_later()
