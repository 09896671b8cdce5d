"""A real scheduler on this machine (tests/slurm_cluster.py): arrays, dependencies, signals; two tasks as one JAX program; a study cut in the middle."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import slurm_cluster

from launch import command, local, slurm
from launch.job import Job, Resources, Task
from launch.progress import progress
from ptm.fields import ConfigError

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"no SLURM can be started here: {slurm_cluster.missing()}")]

ROOT = Path(__file__).parent.parent
LIMIT = 240.0  # seconds in which what is waited for has to happen


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env


@pytest.fixture(autouse=True)
def _inside(cluster, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster[name])
    monkeypatch.chdir(ROOT)


def wait(ready: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + LIMIT
    while not (found := ready()):
        assert time.monotonic() < until, f"waited {LIMIT:.0f} s for {what}: {queue()}"
        time.sleep(0.1)
    return found


def queue() -> str:
    return subprocess.run(["squeue", "--array", "--format=%i %j %T %r %S"], capture_output=True, text=True).stdout


def record(workdir: Path) -> dict[str, str]:
    """Task -> the job that was submitted for it last."""
    entries = json.loads((workdir / "launch/slurm.json").read_text())
    return {name: f"{entry['id']}_{number}" for entry in entries for number, name in entry["tasks"].items()}


def over(workdir: Path) -> bool:
    return not slurm.queued_jobs([entry["id"] for entry in json.loads((workdir / "launch/slurm.json").read_text())])


def log(workdir: Path, task: str) -> str:
    path = workdir / f"launch/{record(workdir)[task]}.log"
    return path.read_text() if path.is_file() else ""


def scancel(workdir: Path, task: str, *words: str) -> None:
    subprocess.run(["scancel", *words, record(workdir)[task]], check=True)


def job_of(workdir: Path, **lines: str) -> Job:
    """Tasks by name, each a line of shell in WORKDIR; STAGE_NAME is the form of names, STAGE_NAME__NEEDS of those that need another."""
    workdir.mkdir(parents=True, exist_ok=True)
    made = []
    for key, line in lines.items():
        name, _, needs = key.partition("__")
        words = ("bash", "-c", f'echo "start $SLURM_RESTART_COUNT"; {line}', "bash", f"{name} $HOME `pwd` 'q' \"d\"\n* two")
        made.append(Task(name=name, command=words, stage=name.partition("_")[0], workdir=workdir / name, needs=needs or None))
    return Job(name="a job", tasks=tuple(made), workdir=workdir, folder=workdir)


def test_arrays_signals_and_dependencies(tmp_path, capsys):
    """In a folder whose name a shell or sbatch would read as something else."""
    workdir = tmp_path / "a 'b\" #x%A $HOME é"
    waits = "[ -e {0} ] && exit 0; trap 'touch {0}; exit 75' TERM; while :; do sleep 0.05; done"
    lines = {
        "first_cut": waits.format("cut"), "first_ok": 'printf %s "$1" >said', "first_bad": "exit 3", "first_killed": waits.format("never"),
        "second_cut__first_cut": "[ -e cut ]", "second_ok__first_ok": "true", "second_more__first_ok": "true", "second_bad__first_bad": "true",
    }  # fmt: skip
    job, options = job_of(workdir, **lines), slurm.Options()
    assert slurm.start(job, options) == 0
    found = record(workdir)
    # The tasks of the second array have the numbers of those that they need; what needs the same one is in a third array.
    assert [found[name].partition("_")[2] for name in ("second_cut", "second_ok", "second_bad", "second_more")] == ["0", "1", "2", "1"]
    wait(
        lambda: all("RUNNING" in line for line in queue().splitlines() if line.startswith((found["first_cut"] + " ", found["first_killed"] + " "))),
        "both to run",
    )
    wait(lambda: "start" in log(workdir, "first_cut") and "start" in log(workdir, "first_killed"), "both to start")
    wait(lambda: "second_bad" not in (states := status(job, capsys)) or states["second_bad"] == "GONE", "the one that needs the failed one to be given up")
    expected = {"first_cut": "RUNNING", "first_killed": "RUNNING", "first_bad": "ENDED", "second_cut": "PENDING", "second_bad": "GONE"}
    assert status(job, capsys).items() >= expected.items()

    # What is in the queue is not submitted again; the rest is.
    assert slurm.start(job_of(workdir, **{key: line for key, line in lines.items() if key != "first_bad" and "bad" not in key}), options) == 0
    assert record(workdir)["first_cut"] == found["first_cut"] and record(workdir)["first_killed"] == found["first_killed"]
    scancel(workdir, "first_cut", "--signal=TERM")  # as before the end of its time
    wait(lambda: (workdir / f"launch/{found['first_cut']}.code").is_file(), "the first attempt to end")
    assert (workdir / f"launch/{found['first_cut']}.code").read_text() == "75\n"
    scancel(workdir, "first_killed")  # by a person
    wait(lambda: over(workdir), "all to end")
    assert status(job, capsys) == {
        "first_cut": "FINISHED", "first_ok": "FINISHED", "first_bad": "ENDED", "first_killed": "GONE",
        "second_cut": "FINISHED", "second_ok": "FINISHED", "second_more": "FINISHED", "second_bad": "GONE",
    }  # fmt: skip
    starts = {name: [line for line in log(workdir, name).splitlines() if line.startswith("start")] for name in ("first_cut", "first_bad", "first_killed")}
    assert starts == {"first_cut": ["start ", "start 1"], "first_bad": ["start "], "first_killed": ["start "]}, "75 alone goes back into the queue"
    assert (workdir / "said").read_text() == "first_ok $HOME `pwd` 'q' \"d\"\n* two"


def status(job: Job, capsys) -> dict[str, str]:
    """Task -> state, of the table that is printed."""
    capsys.readouterr()
    assert slurm.status(job, slurm.Options(), False) == 0
    return {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]}


def test_cancel(tmp_path, capsys):
    job = job_of(tmp_path / "w", first_a="trap 'exit 75' TERM; touch there; while :; do sleep 0.05; done", second_a__first_a="true")
    slurm.start(job, slurm.Options())
    wait(lambda: (tmp_path / "w/there").exists(), "the task to start")
    with pytest.raises(ConfigError, match="needs 'first_a', which is in the queue as"):
        slurm.start(job_of(tmp_path / "w", first_a="true", third_a__first_a="true"), slurm.Options())
    assert slurm.cancel(job, slurm.Options(), True) == 0 and capsys.readouterr().out.splitlines()[-1].startswith("scancel ")
    assert slurm.cancel(job, slurm.Options(), False) == 0
    wait(lambda: over(tmp_path / "w"), "it to be gone")
    time.sleep(1.0)
    assert status(job, capsys)["first_a"] != "PENDING" and over(tmp_path / "w"), "what is cancelled stays so, though it ended with 75"


@pytest.mark.parametrize(
    ("changes", "resources", "told"),
    [
        ({"partition": "none"}, {}, "Invalid partition name specified"),
        ({}, {"devices": 8}, "Invalid generic resource (gres) specification"),
        ({}, {"cores": 99}, "Requested node configuration is not available"),
        ({}, {"hosts": 3}, "Requested node configuration is not available"),
    ],
)
def test_what_the_cluster_refuses(changes, resources, told, tmp_path):
    job = job_of(tmp_path / "w", first_a="true")
    job = Job(name=job.name, tasks=job.tasks, workdir=job.workdir, folder=job.folder, resources=Resources(**resources))
    with pytest.raises(ConfigError, match="sbatch refused: ") as refused:
        slurm.start(job, slurm.Options(**changes, **resources))
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert slurm.status(job, slurm.Options(), False) == 0, "nothing is in the queue"


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    path = runs.corpus(tmp_path / "corpus.txt")
    monkeypatch.setenv("PTM_TEST_TEXT", str(path))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    return path


def launch(launcher: Any, *words: str) -> int:
    return command.main(launcher.LAUNCHER, list(words))


def test_two_tasks_are_one_run(text, tmp_path, capfd, monkeypatch):
    """`srun` of two tasks is one program of two processes, which JAX finds by itself, cut once; against one process with two devices."""
    steps = 240
    words = [
        f"--config={runs.__file__}:concat",
        f"--config.train.steps={steps}",
        "--config.log.every=1",
        "--config.train.microbatches=1",
        "--config.checkpoint.every=90",
    ]
    words += ["--config.evals.validation.every=120", "--config.mesh.data=2"]
    assert launch(slurm, *words, f"--workdir={tmp_path / 'two'}", "--tasks_per_host=2") == 0, capfd.readouterr().err
    wait(lambda: (progress(tmp_path / "two").step or 0) > 30, "some steps")
    scancel(tmp_path / "two", "runs", "--signal=TERM")
    wait(lambda: over(tmp_path / "two"), "the run to end")
    told = log(tmp_path / "two", "runs")
    assert "Interrupted at step" in told and "Continuing" in told and told.count("exit code 75") >= 1, told
    history = json.loads((tmp_path / "two/env.json").read_text())["history"]
    assert len(history) == 2 and [start["devices"]["processes"] for start in history] == [2, 2], history
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    assert launch(local, *words, f"--workdir={tmp_path / 'one'}") == 0
    runs.assert_same(tmp_path / "two", tmp_path / "one", steps)


STUDY = """
from ptm.study import Arm, Metric, Stage, Study


def get_study(argument: str = "") -> Study:
    lengths = {{"train.steps": 200, "log.every": 1, "checkpoint.every": 80, "evals.validation.every": 100}}
    return Study(
        claim="A higher rate is better.", paper="None, section 0",
        stages=(Stage("first", recipe="{recipe}:concat", overrides=lengths), Stage("second", recipe="{recipe}:concat", after="first", overrides=lengths)),
        arms=(Arm("low", {{}}), Arm("high", {{"second:optimizer.learning_rate": 0.02}})), base="low", differs=("second:optimizer.*",), seeds=(0, 1),
        metrics=(Metric("second:validation/loss", higher=False, label="loss"),),
    )
"""


def test_a_study_that_is_cut_and_killed(text, tmp_path, capfd):
    """Arrays of two stages: one run is asked to stop, requeued and goes on; one is killed, which ends it, and goes on when the study is launched again."""
    (tmp_path / "study.py").write_text(STUDY.format(recipe=runs.__file__))
    study, one, two = f"{tmp_path}/study.py", tmp_path / "one", tmp_path / "two"
    assert launch(slurm, study, f"--workdir={two}") == 0, capfd.readouterr().err
    names = list(record(two))
    assert set(names) == {run for seed in (0, 1) for run in (f"low/seed{seed}/first", f"low/seed{seed}/second", f"high/seed{seed}/second")}
    cut, killed = "low/seed0/first", "high/seed1/second"
    wait(lambda: (progress(two / cut).step or 0) > 30, "some steps of the first stage")
    scancel(two, cut, "--signal=TERM")
    wait(lambda: (two / killed / "ckpt/80").is_dir(), "a checkpoint of the second stage")
    subprocess.run(["scancel", "--signal=KILL", f"{record(two)[killed]}.0"], check=True)  # the step, not the job
    wait(lambda: over(two), "all to end")
    told = log(two, cut)
    assert "Interrupted at step" in told and "Continuing" in told, told
    code = (two / f"launch/{record(two)[killed]}.code").read_text().strip()
    assert code not in ("0", "75") and "Continuing" not in log(two, killed), "what was killed is not put back"
    capfd.readouterr()
    assert launch(slurm, study, f"--workdir={two}", "--status") == 0
    assert f"exit code {code}" in capfd.readouterr().out
    assert launch(slurm, study, f"--workdir={two}") == 0
    assert "submitted 1 of second" in capfd.readouterr().out
    wait(lambda: over(two), "the killed one to end")
    assert "Continuing" in log(two, killed)
    assert launch(slurm, study, f"--workdir={two}") == 0 and "All 6 runs" in capfd.readouterr().out

    assert launch(local, study, f"--workdir={one}", "--cores=1") == 0
    for name in names:
        runs.assert_same(two / name, one / name, 200)
    ended = [
        subprocess.run(
            [sys.executable, "-m", "ptm.cli", "study", study, f"--workdir={folder}"], env=dict(os.environ), capture_output=True, text=True
        ).returncode
        for folder in (one, two)
    ]
    assert ended == [0, 0], "nothing is left to do"
