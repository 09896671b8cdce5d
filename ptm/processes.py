"""How a process knows that it is one of several: flags, JAX's environment variables, and what launchers set. Light: nothing here waits for JAX."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping

from ptm import fields
from ptm.fields import ConfigError, field

# Of a flag the variable that says the same; the first is JAX's own, the others have its names.
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
# Launchers that tell each process how many there are and which it is: (how many, which). JAX detects where process 0 is for the first two.
RANKS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "MPI": ("PMI_SIZE", "PMI_RANK"),
}
STEP = "SLURM_STEP_NODELIST"  # set in what srun starts, not in a batch script, which has the other variables too
INDEXED = "JOB_COMPLETION_INDEX"  # of the pods of an indexed Job of Kubernetes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Which of how many processes this one is, and where they meet; None is left to what can be detected."""

    coordinator: str | None = field(None, doc=f"HOST:PORT at which process 0 can be reached by all; also {VARIABLES['coordinator']}.")
    processes: int | None = field(None, low=1, doc=f"Number of processes of the run, 1 = detect no others; also {VARIABLES['processes']}.")
    process: int | None = field(None, low=0, doc=f"Number of this process, from 0; also {VARIABLES['process']}.")
    join_timeout: int = field(300, low=1, unit="seconds", doc="How long to wait for the other processes.")
    heartbeat: int = field(100, low=2, unit="seconds", doc="How long a process may give no sign of life before the others end.")

    def check(self, where: str) -> None:
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ConfigError(f"--coordinator={self.coordinator} is not of the form HOST:PORT, such as node1:1234.")
        if None not in (self.processes, self.process) and self.process >= self.processes:
            raise ConfigError(f"--process={self.process} of --processes={self.processes}; allowed: 0 to {self.processes - 1}, each once.")


def flags() -> dict[str, tuple[str, str]]:
    """Flag -> (what stands for its value, its meaning)."""
    shown = {"coordinator": "HOST:PORT", "processes": "N", "process": "I", "join_timeout": "SECONDS", "heartbeat": "SECONDS"}
    assert shown.keys() == fields.annotations(Place).keys()
    return {key.name: (shown[key.name], key.metadata["doc"]) for key in dataclasses.fields(Place)}


def place(given: Mapping[str, str | None]) -> Place:
    """What flags say of this process, else the environment. Raises ConfigError for what cannot be."""
    values = {name: given[name] for name in flags() if given[name] is not None}
    for name, variable in VARIABLES.items():
        if name not in values and os.environ.get(variable):
            values[name] = os.environ[variable]
    known = launched()
    if known is not None and not values.keys() & {"processes", "process"}:
        values |= {"processes": str(known[1]), "process": str(known[2])}
    annotations = fields.annotations(Place)
    found = Place(**{name: fields.parse(text, annotations[name], f"--{name}") for name, text in values.items()})
    fields.check(found, "")
    return found


def launched() -> tuple[str, int, int] | None:
    """(launcher, processes, number of this one) where a launcher has started this process beside others; None for one that it knows to be alone."""
    for launcher, (count, number) in RANKS.items():
        if {count, number} <= os.environ.keys() and (launcher != "SLURM" or STEP in os.environ) and int(os.environ[count]) > 1:
            return launcher, int(os.environ[count]), int(os.environ[number])
    return None


def announced(given: Place) -> bool:
    """Whether anything says that there may be other processes, so that JAX is to be asked. Of a TPU all hosts run the same program."""
    if given.processes == 1:
        return False
    some = (given.coordinator, given.processes, given.process) != (None, None, None)
    return some or INDEXED in os.environ or importlib.util.find_spec("libtpu") is not None


def require_alone(command: str) -> None:
    """Raises ConfigError where a command that works in one process was started in several."""
    found = place(dict.fromkeys(flags()))
    if found.processes is not None and found.processes > 1:
        by = next((f" by {launcher}" for launcher in filter(None, [launched() and launched()[0]])), "")
        raise ConfigError(
            f"`ptm {command}` works in one process, and was started in {found.processes}{by}: start it once, or set {VARIABLES['processes']}=1 where each is to work for itself."
        )


def on_this_host() -> int:
    """Processes that the launcher started on this host, 1 where it does not say."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(size)
    if STEP in os.environ and (listed := os.environ.get("SLURM_STEP_TASKS_PER_NODE")):
        return max(int(count) for count in re.sub(r"\(x\d+\)", "", listed).split(","))  # such as 2(x3),1
    return 1
