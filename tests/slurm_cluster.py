"""A real SLURM of one machine in a folder of its own: munged, slurmctld and slurmd, started for tests and ended after them."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
PATIENCE = 30.0  # seconds in which the daemons must be up

CONF = """
ClusterName=ptm
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
MinJobAge=20
MaxArraySize=1001
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here, or an empty string."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: install Debian's slurm-wlm and munge"
    return "" if os.getuid() == 0 else "the daemons of SLURM are started by root alone"


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find the cluster, which is there within the body alone."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=socket.gethostname().partition(".")[0], ports=_ports(2)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    files = {name: str(folder / f"munge.{name}") for name in ("sock", "pid", "log", "seed")}
    commands = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={files['sock']}",
            f"--pid-file={files['pid']}",
            f"--log-file={files['log']}",
            f"--seed-file={files['seed']}",
        ],
        ["slurmctld", "-D", "-c", "-f", env["SLURM_CONF"]],
        ["slurmd", "-D", "-f", env["SLURM_CONF"]],
    ]
    children: list[subprocess.Popen] = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "w") as out:
                children.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))
            if command[0] == "munged":
                _wait(lambda: Path(files["sock"]).exists(), children, folder)
        _wait(lambda: "idle" in subprocess.run(["sinfo", "--noheader", "--format=%t"], env=env, capture_output=True, text=True).stdout, children, folder)
        yield env
    finally:
        _empty(env)
        for child in reversed(children):  # one after the other: they speak to each other until they have ended
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()


def _empty(env: dict[str, str]) -> None:
    """Ends all jobs, whose processes would outlive the daemons."""
    until = time.monotonic() + PATIENCE
    while subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True).stdout.strip() and time.monotonic() < until:
        subprocess.run(["scancel", "--full", "--user=root"], env=env, capture_output=True)
        time.sleep(0.5)


def _wait(ready, children: list[subprocess.Popen], folder: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not ready():
        dead = [child.args[0] for child in children if child.poll() is not None]
        if dead or time.monotonic() > until:
            logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")) + sorted(folder.glob("*.out")))
            raise RuntimeError(f"SLURM did not come up; ended: {dead}\n{logs}")
        time.sleep(0.2)
