"""One description of a job for all launchers: tasks as lists of arguments, which of them wait for which, and what each needs.

A task is a process (one on each of its hosts) that ends with 0 finished, 75 interrupted and resumable by the same command, other: failed. Nothing here
knows how tasks are started. Arguments stay lists until they are written for a shell, by `shell` alone.
"""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from ptm.fields import ConfigError, field

FINISHED, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What each task gets."""

    hosts: int = field(1, low=1, doc="Hosts of a task: one process on each, all together one run.")
    devices: int | None = field(None, low=0, doc="Accelerators of each host; None: local: an equal share of those there, elsewhere: none.")
    cores: int | None = field(None, low=1, doc="CPU cores of each host; None: local: an equal share, elsewhere: what the cluster gives.")
    memory: int | None = field(None, low=1, unit="GiB", doc="Memory of each host; None: what the cluster gives.")
    time: int | None = field(None, low=1, unit="minutes", doc="Time limit of one attempt, after which a run goes on in another; None: that of the cluster.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A command by its arguments. `name` is unique in its job, `stage` groups tasks of a kind, `needs` is the name of the task that must finish before it."""

    name: str
    command: tuple[str, ...]
    stage: str
    workdir: Path  # of the run, where what it writes can be looked at
    needs: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Tasks in an order in which none stands before the one that it needs; they start in `folder` and are kept track of in WORKDIR/launch."""

    name: str
    tasks: tuple[Task, ...]
    workdir: Path
    folder: Path
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for task in self.tasks:
            require_inside(task.name)
            if task.name in seen:
                raise ConfigError(f"two tasks of {self.name} are called '{task.name}'; give each a name of its own.")
            if task.needs is not None and task.needs not in seen:
                raise ConfigError(f"task '{task.name}' needs '{task.needs}', which is no task before it.")
            seen.add(task.name)
        for path in (self.workdir, self.folder):
            if not path.is_absolute() or re.search(r"[\0-\x1f\x7f]", str(path)):
                raise ConfigError(f"{str(path)!r} is no path that can be written into scripts; give one without control characters.")

    @property
    def launch(self) -> Path:
        """The folder of what launchers write: scripts, logs, what was submitted."""
        return self.workdir / "launch"


def require_inside(name: str) -> None:
    """Raises ConfigError for a name that, as a path below a folder, would leave it or could not be printed on one line."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\0-\x1f\x7f]", name):
        raise ConfigError(f"{name!r} cannot be the name of a task; allowed: parts between /, none empty, '.' or '..', no control characters.")


def shell(words: Iterable[str]) -> str:
    """Arguments as text for a POSIX shell, each of them one word whatever it holds."""
    return shlex.join(words)


def label(text: str, *, length: int = 24, unique: Sequence[str] = ()) -> str:
    """A text as a DNS label of at most `length` characters (lower case, digits, hyphens; a letter first); `unique` adds a hash of these texts to it."""
    ending = "-" + hashlib.sha256("\0".join(unique).encode()).hexdigest()[:8] if unique else ""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"x{plain}"
    return plain[: length - len(ending)].rstrip("-") + ending


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: '0-5,7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def trees(tasks: Sequence[Task]) -> list[list[Task]]:
    """The tasks that depend on each other, together: each list begins with one that needs no other, in the order of the job."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        found[task.name] = found[task.needs] if task.needs is not None else []
        found[task.name].append(task)
    return [found[task.name] for task in tasks if task.needs is None]


@dataclasses.dataclass
class Array:
    """Tasks of one stage that are submitted together. Those of `after`, where there is one, are needed by the ones of the same number."""

    name: str
    tasks: dict[int, Task]
    after: "Array | None" = None


def arrays(tasks: Sequence[Task], *, largest: int) -> list[Array]:
    """The tasks as numbered arrays, in which a task has the number of the one that it needs: so each starts as soon as that one has finished.

    Where several tasks of a stage need the same one, they are in as many arrays; numbers are below `largest`.
    """
    made: dict[tuple[str, int, int], Array] = {}
    place: dict[str, tuple[Array, int]] = {}
    used: dict[tuple[str, str], int] = {}
    for task in tasks:
        if task.needs is None:
            free = sum(len(array.tasks) for array in made.values() if array.after is None and next(iter(array.tasks.values())).stage == task.stage)
            after, number, layer = None, free % largest, free // largest
        else:
            after, number = place[task.needs]
            layer = used[task.needs, task.stage] = used.get((task.needs, task.stage), -1) + 1
        key = (task.stage, id(after), layer)
        if key not in made:
            of_stage = sum(key[0] == task.stage for key in made)
            made[key] = Array(task.stage if not of_stage else f"{task.stage}-{of_stage + 1}", {}, after)
        made[key].tasks[number] = task
        place[task.name] = (made[key], number)
    return list(made.values())
