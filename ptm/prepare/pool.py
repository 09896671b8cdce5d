"""Tasks in several processes of this machine, which end with the process that started them, and a line of progress."""

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TextIO

from ptm.fields import StorageError

stopping = threading.Event()  # set where the process was asked to stop


class Progress:
    """One line on a terminal that is rewritten; elsewhere nothing."""

    def __init__(self, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._stream, self._clock = stream or sys.stderr, clock
        self._live, self._last = self._stream.isatty(), 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` tasks of a stage are finished."""
        now = self._clock()
        if not self._live or now - self._last < 0.1 and 0 < done < total:
            return
        self._last = now
        filled = 20 * done // total if total else 20
        self._stream.write(f"\r{stage:<9} [{'#' * filled}{'.' * (20 - filled)}] {done:,}/{total:,}\x1b[K")
        self._stream.flush()

    def close(self) -> None:
        """Removes the line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Pool:
    """Runs tasks, functions of a module with plain arguments: in this process, or in several others that `prepare(*given)` makes ready."""

    def __init__(self, processes: int, *, prepare: Callable[..., None], given: tuple[Any, ...], progress: Progress):
        self._progress, self._executor, self._window = progress, None, 2 * processes  # tasks that wait hold what they are given
        self._others = set(multiprocessing.active_children())
        if processes == 1:
            prepare(*given)
        else:
            context = multiprocessing.get_context("spawn")  # forks would share the threads of libraries
            self._executor = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(prepare, given))

    def run(self, stage: str, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], *, done: int = 0) -> Iterator[Any]:
        """What the function gives for each task, as they are finished; `done` others were finished before."""
        tasks = list(tasks)
        total = len(tasks) + done
        self._progress.show(stage, done, total)
        try:
            for number, result in enumerate(self._results(function, tasks), done + 1):
                self._progress.show(stage, number, total)
                if stopping.is_set():
                    raise KeyboardInterrupt
                yield result
        except BrokenProcessPool:
            raise StorageError(
                "a process of the preparation was ended from outside, for its memory perhaps. What is finished is kept: start the same command again, with fewer --processes."
            ) from None

    def _results(self, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> Iterator[Any]:
        if self._executor is None:
            for task in tasks:
                yield function(*task)
            return
        waiting: set[concurrent.futures.Future] = set()
        left = iter(tasks)
        while True:
            waiting |= {self._executor.submit(function, *task) for task in itertools.islice(left, self._window - len(waiting))}
            if not waiting:
                return
            finished, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                yield future.result()

    def close(self) -> None:
        """Ends the processes, at once where they are at work."""
        if self._executor is not None:
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.kill()
            self._executor.shutdown(cancel_futures=True)
        self._progress.close()


def _start(prepare: Callable[..., None], given: tuple[Any, ...]) -> None:
    """In a new process: signals that a terminal or a scheduler gives to all are the parent's affair, and nothing goes on without it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()
    prepare(*given)


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
