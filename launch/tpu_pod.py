"""`python -m launch.tpu_pod`: runs on slices of Cloud TPUs that are asked for as queued resources: the command goes to all workers of a slice by ssh.

Each task is a shell script that runs here: it asks for its slice if there is none, waits for it, starts the command on all workers and ends with the command's
exit code, or with 75 where the slice was lost. A task that ends with 75 is started again, which asks for a slice again.
"""

import dataclasses
import functools
import re
import shutil
import subprocess
import sys
from typing import IO

from launch import command, pool
from launch.job import INTERRUPTED, Job, Task, label, shell
from launch.pool import Slot
from ptm.fields import ConfigError, field

FILE = "~/ptm-launch.pid"  # on each worker: the process that is to be asked to stop
MARK = "ptm_exit="


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    """What else can be said to this launcher."""

    ptm: str = field("ptm", doc="How `ptm` is started on the workers: a word, or several as a shell reads them.")
    project: str = field("", doc="Project; empty: that of gcloud's configuration.")
    zone: str = field("", doc="Zone, such as us-central2-b.")
    type: str = field("", doc="Type of the slices, such as v5litepod-16 or v4-32.")
    version: str = field("", doc="Version of the TPU software, such as v2-alpha-tpuv5-lite.")
    capacity: str = field("spot", choices=("spot", "guaranteed", "best-effort", ""), doc="spot, guaranteed (reserved), best-effort; empty: on demand.")
    slices: int = field(1, low=1, doc="Slices, and tasks at a time.")
    folder: str = field(".", doc="Folder of the checkout on the workers, from which recipes and studies are named.")
    setup: str = field("", doc="A line for the workers' shell before each task, such as one that brings the checkout up to date.")
    restarts: int = field(100, low=0, doc="Times that a task is started again which was interrupted, or whose slice was lost.")
    retries: int = field(0, low=0, doc="Times that a task is started again which failed.")
    logs: str = field("runs/launch", doc="Folder on this machine for the tasks' output.")
    keep: bool = field(False, doc="Leave the slices when all is done.")

    def check(self, where: str) -> None:
        super().check(where)
        for name, example in (("zone", "us-central2-b"), ("type", "v5litepod-16"), ("version", "v2-alpha-tpuv5-lite")):
            if not vars(self)[name]:
                raise ConfigError(f"--{name}={example} is missing; launch/site.ini can hold it.")
            if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", vars(self)[name]):
                raise ConfigError(f"--{name}={vars(self)[name]} is no name of Cloud TPUs; give such as {example}.")
        for name in ("hosts", "devices", "cores", "memory", "time"):
            if vars(self)[name] != next(key.default for key in dataclasses.fields(command.Options) if key.name == name):
                raise ConfigError(f"--{name}={vars(self)[name]}: the type of a slice says what it has; leave it out and give --type.")


def script(options: Options, name: str, task: Task) -> str:
    """The shell script of a task on the slice called `name`."""
    at = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else []), "--quiet"]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    capacity = [f"--{options.capacity}"] if options.capacity else []
    create = [*queued, "create", name, f"--node-id={name}", f"--accelerator-type={options.type}", f"--runtime-version={options.version}", *capacity, *at]
    place = shell(["cd", options.folder.removeprefix("~/")]) if options.folder not in (".", "~") else "cd"  # a session begins in ~
    before = f"echo $$ >{FILE}; {place} && {f'{{ {options.setup}; }} && ' if options.setup else ''}exec"
    return f"""\
set -u
words=({shell(task.command)})
remote={shell([before])}$(printf ' %q' "${{words[@]}}")
log=$(mktemp)
ssh_all() {{ gcloud compute tpus tpu-vm ssh {name} --worker=all {shell(at)} --command="$1"; }}
stopped=0
child=
stop() {{ stopped=1; [ -z "$child" ] || ssh_all 'kill -TERM "$(cat {FILE})"' </dev/null; }}
trap stop TERM
while [ $stopped = 0 ]; do
  state=$({shell([*queued, "describe", name, *at, "--format=value(state.state)"])} 2>/dev/null || echo ABSENT)
  echo "slice {name}: $state"
  case "$state" in
  ACTIVE) break ;;
  ABSENT) {shell(create)} || exit 1 ;;
  FAILED | SUSPENDED) {shell(delete(options, name))} ;;
  esac
  sleep "${{PTM_LAUNCH_PAUSE:-30}}" & wait $!
done
[ $stopped = 0 ] || exit {INTERRUPTED}
ssh_all "bash -c $(printf %q "$remote"); echo {MARK}\\$?" 2>&1 </dev/null | tee "$log" & child=$!
wait $child; while kill -0 $child 2>/dev/null; do wait $child; done
code=$(sed -n 's/.*{MARK}\\([0-9][0-9]*\\).*/\\1/p' "$log" | sort -n | tail -n 1)
rm -f "$log"
[ -n "$code" ] || [ $stopped = 1 ] || sleep "${{PTM_LAUNCH_PAUSE:-30}}"
exit "${{code:-{INTERRUPTED}}}"
"""


def delete(options: Options, name: str) -> list[str]:
    """The command that gives a slice back."""
    at = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else []), "--quiet"]
    return ["gcloud", "compute", "tpus", "queued-resources", "delete", name, *at, "--force"]


def slices(job: Job, options: Options) -> list[Slot]:
    """The slices of a job, by name."""
    return [Slot(label(f"ptm-{job.name}-{n}", length=40, unique=(str(job.workdir),))) for n in range(min(options.slices, max(1, len(job.tasks))))]


def _begin(options: Options, task: Task, slot: Slot, log: IO[bytes]) -> subprocess.Popen:
    words = ["bash", "-c", script(options, slot.name, task)]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def start(job: Job, options: Options) -> int:
    """Runs the job on its slices, and gives them back; returns the exit code of all."""
    if shutil.which("gcloud") is None:
        raise ConfigError("there is no `gcloud` on this machine; install the Google Cloud CLI, or see the commands with --dry_run.")
    places = slices(job, options)
    try:
        begin = functools.partial(_begin, options)
        return pool.run(job, slots=places, begin=begin, restarts=options.restarts, retries=options.retries, logs=job.folder / options.logs)
    finally:
        for place in places if not options.keep else ():
            subprocess.run(delete(options, place.name), check=False)


def show(job: Job, options: Options) -> str:
    """The scripts that would run here, one a task."""
    places = slices(job, options)
    lines = [f"# {job.name}: {len(job.tasks)} tasks on {len(places)} slices {', '.join(place.name for place in places)}; shown for the first"]
    for task in job.tasks:
        lines += ["", f"# {task.name}" + (f", after {task.needs}" if task.needs else ""), script(options, places[0].name, task).rstrip()]
    return "\n".join([*lines, "", *([] if options.keep else [shell(delete(options, place.name)) for place in places])]).rstrip()


LAUNCHER = command.Launcher("tpu_pod", Options, start, show, shared=False)

if __name__ == "__main__":
    sys.exit(command.main(LAUNCHER))
