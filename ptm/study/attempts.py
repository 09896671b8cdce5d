"""Who was at a run of a study: run.json beside the lock of who is at it.

A run's folder holds `run.json`, {"identity", "attempts": [{"start", "end", "exit_code", "error", "git", "host", "pid"}]} (times in seconds since
1970; an attempt that was killed has no end), what ptm/lock.py keeps there, and `claim.lock`, which a runner holds while a child of its own is at the run, so
that another runner does not even start one.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptm import atomic, lock, untrusted
from ptm.fields import ConfigError

FILE = "run.json"
INTERRUPTED = 75


def read(path: Path) -> dict[str, Any]:
    """The run.json of a run's folder; without attempts where there is none. Raises ConfigError for a damaged one."""
    try:
        found = untrusted.read_json(path / FILE)
        if not isinstance(found, dict) or not all("exit_code" in attempt and "error" in attempt for attempt in list(found["attempts"])):
            raise TypeError("no list of attempts")
        return found
    except FileNotFoundError:
        return {"identity": None, "attempts": []}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path / FILE} is damaged ({error}); move it away, the run itself does not need it.") from None


def write(path: Path, *, identity: str, attempts: list[dict[str, Any]]) -> None:
    """Replaces the run.json of a run's folder."""
    path.mkdir(parents=True, exist_ok=True)
    atomic.write(path / FILE, json.dumps({"identity": identity, "attempts": attempts}, indent=1) + "\n")


def failed(attempt: dict[str, Any]) -> bool:
    """Whether an attempt ended in an error: neither finished, nor interrupted, nor cut off."""
    return attempt["exit_code"] not in (None, 0, INTERRUPTED)


def failures(attempts: list[dict[str, Any]]) -> int:
    """Attempts in a row that failed, up to the last one."""
    count = 0
    for attempt in reversed(attempts):
        if not failed(attempt):
            break
        count += 1
    return count


def note(path: Path, *, pid: int, identity: str, git: dict[str, Any], exit_code: int, error: str | None) -> None:
    """Notes the end of a process that could not do so itself: of its attempt, or of one that it had not yet noted."""
    found = read(path)["attempts"]
    if not found or found[-1]["pid"] != pid or found[-1]["end"] is not None:
        found.append(_begun(git) | {"pid": pid})
    found[-1] |= {"end": time.time(), "exit_code": exit_code, "error": error}
    write(path, identity=identity, attempts=found)


def _begun(git: dict[str, Any]) -> dict[str, Any]:
    return {"start": time.time(), "end": None, "exit_code": None, "error": None, "git": git, "host": socket.gethostname(), "pid": os.getpid()}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """An attempt that is on; its end is noted by `end`."""

    path: Path
    identity: str
    earlier: tuple[dict[str, Any], ...]
    this: dict[str, Any]

    def end(self, code: int, *, error: str | None = None) -> None:
        """The attempt is over, with an exit code and, if it failed, a reason."""
        self._write(self.this | {"end": time.time(), "exit_code": code, "error": error})

    def begin(self) -> None:
        """The attempt is on."""
        self._write(self.this)

    def _write(self, entry: dict[str, Any]) -> None:
        write(self.path, identity=self.identity, attempts=[*self.earlier, entry])


@contextlib.contextmanager
def hold(path: Path, *, identity: str, git: dict[str, Any]) -> Iterator[Attempt]:
    """Takes a run for this process and notes an attempt. Raises lock.Busy where another process has it."""
    with lock.hold(path, lambda text: print(f"ptm: {text}", file=sys.stderr, flush=True)):
        attempt = Attempt(path, identity, tuple(read(path)["attempts"]), _begun(git))
        attempt.begin()
        yield attempt


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The body while no other runner of a study's folder is in one; waits for it."""
    with open(folder / "study.lock", "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks: runners there must not be started at the same moment
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this runner is the one that may start a process for a run, until the body ends."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "claim.lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
