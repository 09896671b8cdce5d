"""`python -m launch.local`: tasks on this machine, some at a time, each on cores and devices of its own."""

import contextlib
import dataclasses
import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO

from launch import command, pool
from launch.job import Job, Task, ranges, shell
from launch.pool import Slot
from ptm.fields import ConfigError, field

DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    """What else can be said to this launcher."""

    parallel: int | None = field(None, low=1, doc="Tasks at a time; None: as many as there are devices for, or cores; one where neither is said.")
    restarts: int = field(100, low=0, doc="Times that a task is started again which ended with 75.")
    retries: int = field(0, low=0, doc="Times that a task is started again which failed.")

    def check(self, where: str) -> None:
        super().check(where)
        if self.hosts > 1:
            raise ConfigError(f"--hosts={self.hosts}; launch.local works on this machine. Several are for launch.slurm, launch.kubernetes and launch.tpu_pod.")
        for name in ("memory", "time"):
            if vars(self)[name] is not None:
                raise ConfigError(f"--{name}={vars(self)[name]}: launch.local sets no limit of {name}; leave it out.")


def slots(options: Options, *, tasks: int, cores: Sequence[int], devices: Sequence[str]) -> list[Slot]:
    """The machine divided: so many slots as tasks run at a time, none of which shares a core or a device with another.

    Raises ConfigError where there are fewer than asked for.
    """
    if options.devices is not None and options.devices > len(devices):
        raise ConfigError(f"--devices={options.devices}; this machine has {len(devices)} (nvidia-smi, {DEVICES}). Lower it.")
    if options.cores is not None and options.cores > len(cores):
        raise ConfigError(f"--cores={options.cores}; this process may use {len(cores)}. Lower it.")
    limits = [len(devices) // (options.devices or 1)] if options.devices != 0 and devices else []
    limits += [len(cores) // options.cores] if options.cores else []
    count = min(options.parallel or min(limits, default=1), max(tasks, 1))
    each = (options.cores or max(1, len(cores) // count), options.devices if options.devices is not None else len(devices) // count)
    if options.devices is None and devices and not each[1]:
        raise ConfigError(f"--parallel={count}; this machine has {len(devices)} devices for them. Lower it, or give --devices=0 for tasks that need none.")
    for name, one, there in (("cores", each[0], len(cores)), ("devices", each[1], len(devices))):
        if one * count > there:
            raise ConfigError(f"--parallel={count} tasks of {one} {name} each need {one * count}; there are {there}. Lower one of them.")
    made = []
    for n in range(count):
        own = tuple(cores[n * each[0] : (n + 1) * each[0]])
        seen = devices[n * each[1] : (n + 1) * each[1]]
        env = {DEVICES: ",".join(seen)} if devices else {}
        name = f"cores {ranges(own)}" + (f", devices {','.join(seen)}" if seen else "")
        made.append(Slot(name, own, env))
    return made


def machine() -> tuple[list[int], list[str]]:
    """The cores that this process may use, and the NVIDIA devices that it may see."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if DEVICES in os.environ:
        return cores, [name for name in os.environ[DEVICES].split(",") if name and name != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return cores, []
    return cores, listed.split()


def _begin(job: Job, task: Task, slot: Slot, log: IO[bytes]) -> subprocess.Popen:
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    with _only(slot.cores):
        return subprocess.Popen(task.command, cwd=job.folder, env=os.environ | slot.env, start_new_session=True, **streams)


@contextlib.contextmanager
def _only(cores: Sequence[int]) -> Iterator[None]:
    """Children that are started in the body have these cores from their first instruction on; code between fork and exec could wait for ever for a lock of ours."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(job: Job, options: Options) -> int:
    """Runs the job; returns the exit code of all."""
    places = slots(options, tasks=len(job.tasks), cores=(found := machine())[0], devices=found[1])
    job.launch.mkdir(parents=True, exist_ok=True)
    with open(job.launch / "local.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another launch.local works on {job.workdir}; wait for it, or end it.") from None
        return pool.run(job, slots=places, begin=functools.partial(_begin, job), restarts=options.restarts, retries=options.retries, logs=job.launch)


def show(job: Job, options: Options) -> str:
    """What would be started, and where."""
    cores, devices = machine()
    places = slots(options, tasks=len(job.tasks), cores=cores, devices=devices)
    lines = [f"# {job.name}: {len(job.tasks)} tasks, {len(places)} at a time", *(f"# {place.name}" for place in places), shell(["cd", str(job.folder)])]
    for task in job.tasks:
        lines += [f"# {task.name}" + (f", after {task.needs}" if task.needs else ""), shell(task.command)]
    return "\n".join(lines)


LAUNCHER = command.Launcher("local", Options, start, show)

if __name__ == "__main__":
    sys.exit(command.main(LAUNCHER))
