"""What signals ask of a run: to stop (SIGTERM, SIGINT), or to save and go on (SIGUSR1).

Python runs handlers in the main thread alone, between its own instructions: while that thread is in the compiler, for minutes maybe, nothing is heard there. A
thread of its own hears every signal at once, and ends the process where nothing can be lost by that and the main thread does not come back in time.
"""

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ptm import hosts

STOP = (signal.SIGTERM, signal.SIGINT)
GRACE = 8.0  # seconds that the main thread has to come out of the compiler, before the process ends without it
STARTING = 1.0  # the same before the first step, when there is nothing to save
COMPILER = ("jax/_src/compiler.py", "jax\\_src\\compiler.py")


class Interrupted(Exception):
    """What was under way is given up, since the run was asked to stop."""


class Asked:
    """What is asked of a run; `running` while there are steps to finish and to save. Several processes do it after the same step, whichever was asked."""

    running = False

    def __init__(self) -> None:
        self.stopping = False  # this process was asked to stop
        self._saves = self._answered = 0  # requests to save: of this process, and what their sum was at the last save
        self._agreed = (0, 0)
        self._vote: Any = None

    def votes(self) -> tuple[int, int]:
        """What this process says to the others after a step."""
        return int(self.stopping), self._saves

    def look(self, votes: Any) -> None:
        """Takes note of the votes of a step, those of all processes."""
        self._agreed = tuple(int(vote) for vote in votes)

    def poll(self) -> None:
        """Between the batches of an evaluation; all processes call it as often. Raises Interrupted on all of them at the same call, one after the signal."""
        before, self._vote = self._vote, hosts.vote(*self.votes())
        if before is not None:
            self.look(before)
        if self.stop:
            raise Interrupted

    @property
    def stop(self) -> bool:
        """Whether to save and stop; alone a process need not wait for its own vote."""
        return bool((self.votes() if jax.process_count() == 1 else self._agreed)[0])

    @property
    def save(self) -> bool:
        """Whether to save and go on."""
        return self._sum() != self._answered

    def saved(self) -> None:
        """What was asked is done."""
        self._answered = self._sum()

    def _sum(self) -> int:
        return self._saves if jax.process_count() == 1 else self._agreed[1]

    def hear(self, number: int, told: Callable[[str], None]) -> None:
        """The handler of the signals."""
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            self._saves += 1
            told(f"{name}: saving after the step." if self.running else f"{name}: saving after the first step.")
            return
        if not self.running:
            _end_before(name)
        if self.stopping and number == signal.SIGINT:
            hosts.fail(f"A second {name}: nothing was saved since the last checkpoint. Start the same command again.", hosts.INTERRUPTED)
        self.stopping = True
        told(f"{name}: finishing the step and saving.")


_listening: Asked | None = None


def poll() -> None:
    """To be called between batches of what may be given up. Raises Interrupted where a run that is trained was asked to stop; elsewhere nothing happens."""
    if _listening is not None and _listening.running:
        _listening.poll()


@contextlib.contextmanager
def listen(told: Callable[[str], None]) -> Iterator[Asked]:
    """What is asked while the body runs. Before the first step a signal to stop ends the process at once, as does a second SIGINT at any time."""
    global _listening
    before_it, _listening = _listening, (asked := Asked())
    old = {number: signal.signal(number, lambda number, _: asked.hear(number, told)) for number in (*STOP, signal.SIGUSR1)}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, asked, threading.get_ident()), name="signals", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        _listening = before_it
        signal.set_wakeup_fd(before)
        for number, handler in old.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def _watch(reader: socket.socket, asked: Asked, main: int) -> None:
    """Ends the process that was asked to stop where the main thread is in the compiler, or at anything else before the first step, for too long."""
    heard: list[tuple[str, float]] = []
    while True:
        reader.settimeout(STARTING / 4 if heard else None)
        with contextlib.suppress(TimeoutError):
            numbers = reader.recv(64)
            if not numbers:
                return  # the body has ended
            heard += [(signal.Signals(number).name, time.monotonic()) for number in numbers if number in STOP]
        if not heard:
            continue
        name, since = heard[0]
        waited = time.monotonic() - since
        if not asked.running and waited > STARTING:
            _end_before(name)
        if waited > GRACE and _compiling(main):
            hosts.fail(f"{name} while a program was compiled: nothing was saved since the last checkpoint. Start the same command again.", hosts.INTERRUPTED)


def _end_before(name: str) -> None:
    hosts.fail(f"{name} before the first step: nothing is lost. Start the same command again.", hosts.INTERRUPTED)


def _compiling(thread: int) -> bool:
    """Whether a thread is in JAX's compiler."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.endswith(COMPILER):
        frame = frame.f_back
    return frame is not None
