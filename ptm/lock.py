"""One process at a folder: a lock that goes with its process, and signs of life where locks do not reach.

`run.lock` is held by the process that writes into the folder and tells who that is, {"host", "pid", "start"} (seconds since 1970); it is empty where that process
ended by itself. `alive` is there as long and touched by it every `BEAT` seconds: on a file system that does not share locks, another host is taken for gone when that stops. Its
clock may be wrong, so that nothing but a change counts.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ptm import untrusted
from ptm.fields import ConfigError

LOCK, ALIVE = "run.lock", "alive"
BEAT = 20.0  # seconds between two signs of life
PATIENCE = 50.0  # seconds without one after which the process of another host is gone
FRESH = 120.0  # for who cannot wait: seconds between the last one and now, by the clocks of both hosts
TRIES, PAUSE = 20, 0.1  # of a lock: who looks whether it is held holds it for a moment

_held: set[Path] = set()


class Busy(ConfigError):
    """Another process is at the folder; the message says which."""


@contextlib.contextmanager
def hold(folder: Path, told: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """The body while this process alone has `folder`, which is made; it may hold a folder that it has. Raises Busy where another process has it.

    Where the last process was one of another host, it is waited for its signs of life; `told` is given a line that says so.
    """
    key = folder.resolve()
    if key in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file, contextlib.ExitStack() as stack:
        locked = _take(file, folder)
        before = owner(folder)
        if before is not None and (before["host"] != socket.gethostname() or not locked):
            told(f"{folder} was last run by process {before['pid']} of {before['host']}: waiting up to {PATIENCE:.0f} s for a sign of life.")
            if _lives(folder):
                raise _busy(folder)
        _tell(file, {"host": socket.gethostname(), "pid": os.getpid(), "start": time.time()})
        stack.callback(_tell, file, None)
        _held.add(key)
        stack.callback(_held.discard, key)
        stack.enter_context(_alive(folder / ALIVE))
        yield


def owner(folder: Path) -> dict[str, Any] | None:
    """Who has the folder, or had it when it was killed; None where that process ended by itself, or nobody is told of."""
    try:
        found = untrusted.read_json(folder / LOCK)
        return {key: found[key] for key in ("host", "pid", "start")}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def held(folder: Path) -> bool:
    """Whether a process is at the folder: one that holds its lock, or one of another host that gave a sign of life of late."""
    try:
        with open(folder / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody was ever at it, or a file system without locks
        pass
    found = owner(folder)
    if found is None or found["host"] == socket.gethostname():
        return False
    return abs(time.time() - (_touched(folder) or 0.0)) < FRESH  # one from the future was left by a clock that was set back


def _take(file: IO[bytes], folder: Path) -> bool:
    """Takes the lock; False on a file system without locks, where signs of life must do."""
    for _ in range(TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(PAUSE)
        except OSError:
            return False
    raise _busy(folder)


def _tell(file: IO[bytes], who: dict[str, Any] | None) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(json.dumps(who).encode() if who else b"")
        file.flush()


def _busy(folder: Path) -> Busy:
    found = owner(folder)
    if found is None:
        return Busy(f"{folder} is being run by another process. Wait for it, stop it, or take another folder.")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["start"]))
    return Busy(f"{folder} is being run by process {found['pid']} of {found['host']}, since {since}. Wait for it, stop it, or take another folder.")


def _lives(folder: Path) -> bool:
    before, until = _touched(folder), time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(min(1.0, PATIENCE / 50))
        if _touched(folder) != before:
            return True
    return False


def _touched(folder: Path) -> float | None:
    with contextlib.suppress(OSError):
        return (folder / ALIVE).stat().st_mtime
    return None


@contextlib.contextmanager
def _alive(path: Path) -> Iterator[None]:
    """Signs of life during the body."""
    done = threading.Event()

    def beat() -> None:
        ended = False
        while not ended:
            with contextlib.suppress(OSError):
                path.touch()
            ended = done.wait(BEAT)

    thread = threading.Thread(target=beat, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()
