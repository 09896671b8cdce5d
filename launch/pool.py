"""Tasks as child processes, some at a time, each in a slot of its own: what launchers do that have no scheduler to hand them to."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from launch.job import FAILED, FINISHED, INTERRUPTED, Job, Task
from launch.progress import Live, cells, progress

Begin = Callable[[Task, "Slot", IO[bytes]], subprocess.Popen]  # starts a task in a slot; its output goes to the file
LOOK = 0.2  # seconds between two looks at the children
LONGEST = 60.0  # seconds that a task rests before it is started again


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place where one task runs at a time: its cores, and what its processes get in their environment."""

    name: str
    cores: tuple[int, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Entry:
    """A task and what became of it."""

    task: Task
    state: str = "waiting"
    slot: Slot | None = None
    process: subprocess.Popen | None = None
    begun: float = 0.0
    seconds: float = 0.0
    failures: int = 0
    interruptions: int = 0
    rests: float = 0.0  # until then it is not started again
    error: str = ""  # why it could not be started


class _Stop:
    """SIGTERM and SIGINT while the pool runs: `asked` counts them."""

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.asked += 1


def run(job: Job, *, slots: Sequence[Slot], begin: Begin, restarts: int, retries: int, logs: Path) -> int:
    """Runs the tasks of a job in its order, as many at a time as there are slots; each starts once the one that it needs has finished.

    A task that ends with 75 though nobody asked it to is started again, `restarts` times at most, a failed one `retries` times. SIGTERM and SIGINT are
    passed on to all as SIGTERM, and nothing is started any more; at the second one they are killed. Output goes to LOGS/TASK.log. Returns the exit code of
    all: 0 finished, 75 interrupted (the same command goes on), 1 some failed.
    """
    entries = {task.name: _Entry(task) for task in job.tasks}
    live, free = Live(sys.stdout), list(slots)
    with _Stop() as stop:
        told = 0
        while True:
            if stop.asked > told:
                told = stop.asked
                for entry in entries.values():
                    if entry.process is not None and told == 1:
                        entry.process.terminate()  # it alone: what it started is its own to stop
                    elif entry.process is not None:
                        os.killpg(entry.process.pid, signal.SIGKILL)
            for entry in entries.values():
                if entry.process is not None and entry.process.poll() is not None:
                    free.append(_ended(entry, entry.process.returncode, stopping=told > 0, restarts=restarts, retries=retries))
            now = time.monotonic()
            for entry in entries.values():
                needed = entries[entry.task.needs] if entry.task.needs else None
                if entry.state == "waiting" and needed is not None and needed.state in ("failed", "not started"):
                    entry.state = "not started"
                if entry.state == "waiting" and free and not told and now >= entry.rests and (needed is None or needed.state == "finished"):
                    slot = free.pop(0)
                    if not _begun(entry, slot, begin, _log(logs, entry.task)):
                        free.append(slot)
            live.show({name: _row(entry) for name, entry in entries.items()})
            running = [entry for entry in entries.values() if entry.process is not None]
            if not running and (told or all(entry.state != "waiting" for entry in entries.values())):
                return _summary(job.name, entries, logs, interrupted=told > 0)
            time.sleep(LOOK)


def _log(logs: Path, task: Task) -> Path:
    return logs / f"{task.name}.log"


def _begun(entry: _Entry, slot: Slot, begin: Begin, path: Path) -> bool:
    """Starts a task, or notes why that cannot be; whether it runs."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as log:
            entry.process = begin(entry.task, slot, log)
    except OSError as error:  # no such command, no space for its log; others may be running
        entry.state, entry.error = "failed", str(error)
        return False
    entry.state, entry.slot, entry.begun = "running", slot, time.monotonic()
    return True


def _ended(entry: _Entry, code: int, *, stopping: bool, restarts: int, retries: int) -> Slot:
    """Notes the end of an attempt; returns the slot that it leaves."""
    slot, entry.slot, entry.process = entry.slot, None, None
    entry.seconds += time.monotonic() - entry.begun
    if code == FINISHED:
        entry.state = "finished"
    elif stopping or code == INTERRUPTED:
        entry.interruptions += 1
        entry.state = "interrupted" if stopping else "waiting" if entry.interruptions <= restarts else "failed"
        entry.rests = time.monotonic() + min(LONGEST, LOOK * 2**entry.interruptions)  # what stopped it, or has it, may still be there
    else:
        entry.failures += 1
        entry.state = "waiting" if entry.failures <= retries else "failed"
    return slot


def _row(entry: _Entry) -> tuple[str, ...]:
    seconds = entry.seconds + (time.monotonic() - entry.begun if entry.process is not None else 0.0)
    step, speed = cells(progress(entry.task.workdir)) if entry.state in ("running", "finished") else ("", "")
    return entry.state, entry.slot.name if entry.slot else "", step, speed, f"{seconds // 60:.0f}:{seconds % 60:02.0f}" if seconds else ""


def _summary(name: str, entries: Mapping[str, _Entry], logs: Path, *, interrupted: bool) -> int:
    states = [entry.state for entry in entries.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "failed", "not started", "interrupted", "waiting") if state in states)
    print(f"{name}: {counts or 'nothing to do'}.", flush=True)
    for entry in entries.values():
        if entry.state == "failed":
            print(f"  {entry.task.name} failed: {entry.error or f'see {_log(logs, entry.task)}'}", flush=True)
    if interrupted:
        print("Start the same command again to go on.", flush=True)
        return INTERRUPTED if set(states) != {"finished"} else FINISHED
    return FAILED if set(states) - {"finished"} else FINISHED
