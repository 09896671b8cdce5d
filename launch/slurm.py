"""`python -m launch.slurm`: a study as job arrays, one a stage, each task of which starts when the one that it needs has finished; or one run.

A task is an `srun` inside the batch script: SLURM tells its processes who they are, and `--signal` reaches them but not the script. A run that was asked to
stop ends with 75; the script then puts its own job back into the queue, and in no other case.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command
from launch.job import FINISHED, INTERRUPTED, Array, Job, Task, arrays, label, ranges, shell
from launch.progress import cells, columns, progress
from ptm import atomic, untrusted
from ptm.fields import ConfigError, field

RECORD = "slurm.json"
ENDINGS = ".code"  # beside a log: the exit code of the last attempt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    """What else can be said to this launcher."""

    tasks_per_host: int = field(1, low=1, doc="Processes of a task on each host; 1 takes all its devices, several the one of their number each.")
    parallel: int | None = field(None, low=1, doc="Tasks of an array that run at a time; None: as many as the cluster lets.")
    partition: str = field("", doc="Partition; empty: the cluster's own choice, as for the next three.")
    account: str = field("", doc="Account.")
    qos: str = field("", doc="Quality of service.")
    constraint: str = field("", doc="Features that the hosts must have.")
    grace: int = field(120, low=1, unit="seconds", doc="How long before the end of its time a task is asked to save and stop.")
    restarts: int = field(1000, low=0, doc="Times that a task goes back into the queue.")
    largest_array: int = field(1000, low=1, doc="Numbers of an array are below this; the cluster's MaxArraySize.")
    setup: str = field("", doc="A line for the shell before the command, such as 'module load cuda' or 'source /opt/venv/bin/activate'.")

    def check(self, where: str) -> None:
        super().check(where)
        if self.time is not None and 60 * self.time <= self.grace + 60:  # the signal comes up to 60 seconds early
            raise ConfigError(
                f"--time={self.time} minutes leave nothing before the signal, which may come --grace={self.grace} + 60 seconds before their end; give more."
            )
        if self.devices is not None and self.devices and self.tasks_per_host > self.devices:
            raise ConfigError(f"--tasks_per_host={self.tasks_per_host} processes cannot share --devices={self.devices} of a host; lower the first.")
        if self.cores is not None and self.tasks_per_host > self.cores:
            raise ConfigError(f"--tasks_per_host={self.tasks_per_host} processes need as many cores of a host; --cores={self.cores} are fewer.")
        for name in ("partition", "account", "qos", "constraint", "setup"):
            if not vars(self)[name].isprintable():
                raise ConfigError(f"--{name}={vars(self)[name]!r} has characters that are not printed; give one line.")


def script(job: Job, options: Options, array: Array) -> str:
    """The batch script of an array, which has a number for each of its tasks."""
    resources, each = job.resources, options.tasks_per_host
    cores = None if resources.cores is None else resources.cores // each
    given = {
        "job-name": f"{label(job.name)}.{label(array.name)}",
        "array": ranges(sorted(array.tasks)) + (f"%{options.parallel}" if options.parallel else ""),
        "chdir": str(job.folder),
        "output": f"{str(job.launch).replace('%', '%%')}/%A_%a.log",
        "open-mode": "append",
        "nodes": resources.hosts,
        "ntasks": resources.hosts * each,
        "ntasks-per-node": each,
        "cpus-per-task": cores,
        "gpus-per-node": resources.devices or None,
        "mem": None if resources.memory is None else f"{resources.memory}G",
        "time": resources.time,
        "partition": options.partition or None,
        "account": options.account or None,
        "qos": options.qos or None,
        "constraint": options.constraint or None,
        "signal": f"TERM@{options.grace}",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={shell([str(value)])}" for name, value in given.items() if value is not None), "#SBATCH --requeue", ""]
    lines += [options.setup] if options.setup else []
    lines += ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, task in sorted(array.tasks.items()):
        lines += [f"{number}) words=({shell(task.command)}) ;;"]
    # No --kill-on-bad-exit: processes of a run end together, and one that waits for another's checkpoint must not be killed for it.
    srun = ["srun", f"--ntasks={resources.hosts * each}", f"--ntasks-per-node={each}"] + ([f"--cpus-per-task={cores}"] if cores else [])
    lines += [
        "esac",
        "code=0",
        f'{shell(srun)} "${{words[@]}}" || code=$?',
        f'echo "$code" >{shell([str(job.launch)])}/"${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"{ENDINGS}',
        f'if [ "$code" = {INTERRUPTED} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {options.restarts} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
        "",
    ]
    return "\n".join(lines)


def submission(job: Job, array: Array, path: Path, *, after: str | None) -> list[str]:
    """The command that submits the script at `path`; `after` is the id of the array that it depends on."""
    depends = [f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes"] if after is not None else []
    return ["sbatch", "--parsable", *depends, str(path)]


def _scripts(job: Job, options: Options, tasks: Sequence[Task], *, first: int) -> list[tuple[Array, Path, str]]:
    made = arrays(tasks, largest=options.largest_array)
    return [(array, job.launch / f"{first + n:02d}-{label(array.name)}.sh", script(job, options, array)) for n, array in enumerate(made)]


def start(job: Job, options: Options) -> int:
    """Submits what is not in the queue already; returns the exit code."""
    record = _read(job)
    queued = queued_jobs([entry["id"] for entry in record])
    there = {name: f"{entry['id']}_{number}" for entry in record for number, name in entry["tasks"].items() if f"{entry['id']}_{number}" in queued}
    tasks = [task for task in job.tasks if task.name not in there]
    if there:
        print(f"{len(there)} tasks are in the queue already.", flush=True)
    for task in tasks:
        if task.needs in there:
            raise ConfigError(f"'{task.name}' needs '{task.needs}', which is in the queue as {there[task.needs]}: wait for it, or --cancel first.")
    job.launch.mkdir(parents=True, exist_ok=True)
    ids: dict[int, str] = {}
    for array, path, text in _scripts(job, options, tasks, first=len(record) + 1):
        path.write_text(text, encoding="utf-8")
        if not ids:  # all arrays ask for the same; what can never start would wait in the queue for good
            _run(["sbatch", "--test-only", str(path)])
        ids[id(array)] = _run(submission(job, array, path, after=ids[id(array.after)] if array.after else None)).strip().partition(";")[0]
        record.append({"id": ids[id(array)], "script": path.name, "tasks": {str(number): task.name for number, task in array.tasks.items()}})
        atomic.write(job.launch / RECORD, json.dumps(record, indent=1) + "\n")  # after each: what is submitted is known even if the next one is refused
        print(f"submitted {len(array.tasks)} of {array.name} as {ids[id(array)]}: {path}", flush=True)
    return FINISHED


def show(job: Job, options: Options) -> str:
    """The commands that would be given, and the scripts."""
    made = _scripts(job, options, job.tasks, first=len(_read(job)) + 1)
    names = {id(array): f"ID_OF_{path.stem}" for array, path, _ in made}
    shown = []
    for array, path, text in made:
        words = submission(job, array, path, after=names[id(array.after)] if array.after else None)
        shown += [f"# {path}", text.rstrip(), f"# {shell(words)}", ""]
    return "\n".join(shown).rstrip()


def status(job: Job, options: Options, dry_run: bool) -> int:
    """A table of what was submitted, by the last attempt at each task."""
    record = _read(job)
    command_line = _squeue([entry["id"] for entry in record])
    if dry_run or not record:
        print(shell(command_line) if record else f"nothing was submitted for {job.workdir}.", flush=True)
        return FINISHED
    queued = queued_jobs([entry["id"] for entry in record])
    rows: dict[str, tuple[str, ...]] = {}
    for entry in record:
        for number, name in entry["tasks"].items():
            place = f"{entry['id']}_{number}"
            folder = job.workdir / name if (job.workdir / name).is_dir() else job.workdir
            state, reason = queued[place] if place in queued else _ending(job, place)
            rows[name] = (name, place, state, reason, *cells(progress(folder)))
    print("\n".join(columns([("task", "job", "state", "reason", "step", "tokens/s"), *rows.values()])), flush=True)
    return FINISHED


def _ending(job: Job, place: str) -> tuple[str, str]:
    """What is known of a job that has left the queue."""
    try:
        code = int((job.launch / f"{place}{ENDINGS}").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "GONE", "cancelled, or its host was lost, or what it needs failed"
    return ("FINISHED", "") if code == FINISHED else ("ENDED", f"exit code {code}: see {job.launch / place}.log")


def cancel(job: Job, options: Options, dry_run: bool) -> int:
    """Cancels all that was submitted and is in the queue."""
    record = _read(job)
    if not record:
        print(f"nothing was submitted for {job.workdir}.", flush=True)
        return FINISHED
    words = ["scancel", *(entry["id"] for entry in record)]
    if dry_run:
        print(shell(words), flush=True)
        return FINISHED
    queued = queued_jobs([entry["id"] for entry in record])
    if queued:
        _run(["scancel", *sorted({place.partition("_")[0] for place in queued}, key=int)])
    print(f"cancelled {len(queued)} tasks.", flush=True)
    return FINISHED


def _read(job: Job) -> list[dict[str, Any]]:
    path = job.launch / RECORD
    try:
        return untrusted.read_json(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ConfigError(f"{path}, what was submitted, is damaged ({error}); move it away once squeue shows no job of it.") from None


def _squeue(ids: Sequence[str]) -> list[str]:
    return ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(ids)}"]


def queued_jobs(ids: Sequence[str]) -> Mapping[str, tuple[str, str]]:
    """ARRAY_NUMBER -> state and reason, of what is in the queue: waiting, running or about to end."""
    if not ids:
        return {}
    _require("squeue")
    ended = subprocess.run(_squeue(ids), capture_output=True, text=True, check=False)
    if ended.returncode and "Invalid job id" not in ended.stderr:
        raise ConfigError(f"squeue: {_line(ended.stderr)}")
    rows = [line.split("|") for line in ended.stdout.splitlines()]
    over = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
    return {place: (state, "" if reason == "None" else reason) for place, state, reason in rows if state not in over}


def _require(name: str) -> None:
    if shutil.which(name) is None:
        raise ConfigError(f"there is no `{name}` on this machine; start launch.slurm on a host of the cluster where jobs are submitted.")


def _run(words: Sequence[str]) -> str:
    """What a command of SLURM prints. Raises ConfigError with its reason where it refuses."""
    _require(words[0])
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ConfigError(f"{words[0]} refused: {_line(ended.stderr)} ({shell(words)})")
    return ended.stdout


def _line(text: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").removeprefix("allocation failure: ") for line in text.strip().splitlines()]
    return lines[-1] if lines else "no reason given"


LAUNCHER = command.Launcher("slurm", Options, start, show, actions={"status": status, "cancel": cancel})

if __name__ == "__main__":
    sys.exit(command.main(LAUNCHER))
