"""Several processes are one run: real ones on this machine, joined through the command line, against one process with as many devices."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import runs
from ledger import tell
from test_imports import ROOT, _files, imports

from ptm import cli, processes
from ptm.fields import ConfigError
from ptm.processes import Place
from ptm.saved import owed, steps_in

LIMIT = 300.0  # seconds after which children count as hanging and are killed
STEPS = 8
SHORT = {"train.steps": STEPS, "train.microbatches": 1, "checkpoint.every": 3, "evals.validation.every": STEPS, "log.every": 1}
WORDS = tuple(f"--config.{key}={value}" for key, value in SHORT.items())
CHANGES = {key.replace(".", "__"): value for key, value in SHORT.items()}
several = pytest.mark.hosts


class Ended(NamedTuple):
    """The exit code of a process and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def start(
    folder: Path, *words: str, processes: int, devices: int, own: Sequence[Sequence[str]] | None = None, launcher: Callable[[int], dict[str, str]] | None = None,
    **env: str,
) -> list[subprocess.Popen]:  # fmt: skip
    """`ptm WORDS` in so many processes of so many devices each; their output goes to files in `folder`.

    `own` are words of single processes; `launcher` gives the variables of each in place of flags.
    """
    folder.mkdir(exist_ok=True)
    port, env = free_port(), os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | env
    children = []
    for number in range(processes):
        place = [] if launcher else [f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={number}"]
        command = [sys.executable, "-m", "ptm.cli", *words, *place, *(own[number] if own else ())]
        with open(folder / f"{number}.out", "w") as out, open(folder / f"{number}.err", "w") as err:
            found = env | (launcher(number) | {"JAX_COORDINATOR_PORT": str(port)} if launcher else {})
            children.append(subprocess.Popen(command, env=found, cwd=ROOT, stdout=out, stderr=err))
    return children


def finish(children: list[subprocess.Popen], folder: Path) -> list[Ended]:
    """What became of the processes. Kills all and fails if they take too long."""
    until = time.monotonic() + LIMIT
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    hanging = [number for number, child in enumerate(children) if child.poll() is None]
    for child in children:
        child.kill()
        child.wait()
    ended = [Ended(child.returncode, *((folder / f"{n}.{kind}").read_text() for kind in ("out", "err"))) for n, child in enumerate(children)]
    assert not hanging, f"processes {hanging} hang: {ended}"
    return ended


def together(folder: Path, *words: str, **options) -> list[Ended]:
    return finish(start(folder, *words, **options), folder)


def train(kind: str, workdir: Path, text: Path, *words: str, processes: int, devices: int = 1, recipe: str = runs.__file__, **options) -> list[Ended]:
    """`ptm train` of a kind of tests/runs.py."""
    command = ("train", f"--config={recipe}:{kind}", f"--workdir={workdir}", *WORDS, *words)
    return together(workdir.with_name(f"{workdir.name}.log"), *command, processes=processes, devices=devices, PTM_TEST_TEXT=str(text), **options)


def alone(kind: str, workdir: Path, text: Path, *, devices: int, **changes) -> None:
    """The same in this process."""
    assert runs.run(runs.tiny(kind, text=text, **CHANGES | changes), workdir, devices=devices) == 0


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in runs.metrics(workdir).splitlines()]


def silent(ended: Ended) -> bool:
    """Whether a process wrote nothing; the library of its collectives tells of connections, from several threads at once."""
    return not re.sub(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|[\d\s]", "", ended.out + ended.err)


# What needs no second process.

NOTHING = dict.fromkeys(processes.flags())
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these variables of launchers."""

    def set_to(**variables: str) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "PMI_", "KUBERNETES_")) or name in (*processes.VARIABLES.values(), processes.INDEXED):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_to()
    return set_to


def test_places(environment):
    """Flags win over JAX's variables, these over the launcher's; alone means that nothing is asked."""
    assert processes.place(NOTHING) == Place() and processes.launched() is None
    environment(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    assert processes.place(NOTHING) == Place(coordinator="a:1", processes=4, process=3)
    given = NOTHING | {"processes": "5", "join_timeout": "9", "heartbeat": "8"}
    assert processes.place(given) == Place(coordinator="a:1", processes=5, process=3, join_timeout=9, heartbeat=8)
    environment(**SRUN)
    assert processes.place(NOTHING) == Place(processes=2, process=1) and processes.announced(processes.place(NOTHING))
    assert not processes.announced(processes.place(NOTHING | {"processes": "1"}))
    environment(**{name: value for name, value in SRUN.items() if name != processes.STEP})
    assert processes.place(NOTHING) == Place(), "a batch script is not what srun starts"
    environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_SIZE="2")
    assert processes.place(NOTHING) == Place(processes=2, process=0) and processes.on_this_host() == 2
    environment(**SRUN, SLURM_STEP_TASKS_PER_NODE="4(x3),2")
    assert processes.on_this_host() == 4


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"coordinator": "node1"}, "--coordinator=node1 is not of the form HOST:PORT"),
        ({"processes": "2", "process": "2"}, "--process=2 of --processes=2; allowed: 0 to 1"),
        ({"processes": "two"}, "--processes=two cannot be read"),
        ({"processes": "0"}, "allowed: 1 or more"),
    ],
)
def test_wrong_places(flags, told, environment):
    with pytest.raises(ConfigError, match=told):
        processes.place(NOTHING | flags)


def test_commands_of_one_process(environment, capsys):
    environment(**SRUN)
    for command in ("predict", "convert", "analyze", "submission"):
        assert cli.main([command]) == 2
        assert f"`ptm {command}` works in one process, and was started in 2 by SLURM" in capsys.readouterr().err
    environment(JAX_NUM_PROCESSES="1", **SRUN)
    assert cli.main(["predict"]) == 2 and "needs --model" in capsys.readouterr().err


def test_too_little_is_refused(environment, capsys):
    """Before anything is joined: what is neither given nor detected."""
    environment()
    recipe = f"--config={ROOT / 'configs/quickstart.py'}:gpt,tiny"
    assert cli.main(["train", recipe, "--process=1", "--processes=2"]) == 2
    assert "add --coordinator" in capsys.readouterr().err
    assert cli.main(["train", recipe, "--processes=1", "--print_config"]) == 0


def test_a_pod_of_an_indexed_job(environment, capsys):
    """JAX cannot ask for the others here: it must not start as if it were alone, unless it is told to."""
    environment(JOB_COMPLETION_INDEX="1", KUBERNETES_SERVICE_HOST="10.0.0.1")
    recipe = f"--config={ROOT / 'configs/quickstart.py'}:gpt,tiny"
    assert cli.main(["train", recipe, "--print_config"]) == 2 and "one of an indexed Job" in capsys.readouterr().err
    assert cli.main(["train", recipe, "--print_config", "--processes=1"]) == 0


def test_collective_code_stays_in_one_module():
    """Three functions of ptm/hosts.py talk to other processes; all else that is not a compiled step goes through them."""
    private = ("jax.experimental.multihost_utils", "jax._src", "jax.distributed")
    assert not [item for item in imports("ptm") if item.module.startswith(private) and item.file != "ptm/hosts.py"]
    names = {"process_allgather", "sync_global_devices", "broadcast_one_to_all", "multihost_utils", "distributed", "wait_at_barrier", "key_value_set", "key_value_dir_get"}
    for file in _files("ptm"):
        used = {node.attr for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Attribute)} & names
        assert not used or file == "ptm/hosts.py", (file, used)


# Two processes and four.


@several
def test_two_processes_train_as_one(text, tmp_path):
    """Of a device each: parameters, moments, data and metrics of one process with two devices, bit for bit (the sum of two numbers has one order)."""
    first, second = train("concat", tmp_path / "two", text, processes=2)
    assert first.code == second.code == 0, (first, second)
    alone("concat", tmp_path / "one", text, devices=2)
    runs.assert_same(tmp_path / "two", tmp_path / "one", STEPS)
    assert silent(second) and first.out.count("Finished gpt") == 1 and first.err.count(f"step {STEPS}/{STEPS}") == 1
    listed = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert next(listed) == next(listed), "no file is left or lacking"
    assert json.loads((tmp_path / "two/env.json").read_text())["history"][0]["devices"] == {"kind": "cpu", "count": 2, "processes": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """(kind, processes, devices of each) -> workdir of an uninterrupted run through the command line, made once."""
    made = {}

    def of(kind: str, processes: int, devices: int) -> Path:
        if (kind, processes, devices) not in made:
            workdir = tmp_path_factory.mktemp("whole") / f"{kind}-{processes}-{devices}"
            if processes == 1:
                alone(kind, workdir, text, devices=devices)
            else:
                ended = train(kind, workdir, text, processes=processes, devices=devices)
                assert [one.code for one in ended] == [0] * processes, ended
            made[kind, processes, devices] = workdir
        return made[kind, processes, devices]

    return of


@several
@pytest.mark.parametrize("kind", ["memory", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("concat", "mlm", "spans"))])
def test_four_devices(kind, whole):
    """In two processes or four the same bits; in one process the devices' sums are added in another order, and nothing else differs."""
    two, four, one = whole(kind, 2, 2), whole(kind, 4, 1), whole(kind, 1, 4)
    runs.assert_same(four, two, STEPS)
    assert runs.streams(two, STEPS) == runs.streams(one, STEPS)
    ours, theirs = rows(two), rows(one)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs):
        for key in ("rows", "epoch", "padding_share", "bad_records"):
            assert key not in other or mine[key] == other[key]
        for key in ("loss", "validation/loss"):
            assert key not in other or np.isclose(mine[key], other[key], rtol=1e-5)


FAULTY = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import runs
from pathlib import Path
from ptm import interrupts, run
from ptm.data.loader import Loader
from ptm.fields import ConfigError

kind, _, fault = os.environ["PTM_TEST_FAULT"].partition(" ")
mine = "--process=1" in sys.argv
taken = 0
original_next = Loader.__next__

def next_batch(self):
    global taken
    taken += 1
    if taken == 4:
        if fault.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[fault])
            return original_next(self)
        raise {{"config": ConfigError, "bug": ZeroDivisionError}}[fault]("this is what went wrong")
    return original_next(self)

def setup(*args, **options):
    if fault == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    raise ConfigError("this is what went wrong")

polled, polls = interrupts.poll, 0

def poll():
    global polls
    polls += 1
    if polls == 2:
        os.kill(os.getpid(), signal.Signals[fault])
    polled()

if mine and kind == "eval":
    interrupts.poll = poll
if mine and kind == "batch":
    Loader.__next__ = next_batch
if mine and kind == "setup":
    run.setup = setup

def get_config(argument):
    return runs.tiny(argument, text=Path(os.environ["PTM_TEST_TEXT"]))
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> str:
    """A recipe that goes wrong in process 1, at set-up, at the fourth batch or in the first evaluation, as PTM_TEST_FAULT says."""
    path = tmp_path_factory.mktemp("recipe") / "faulty.py"
    path.write_text(FAULTY.format(tests=str(ROOT / "tests")))
    return str(path)


@several
@pytest.mark.parametrize(
    ("kind", "begin", "then", "like"),
    [
        ("concat", (2, 1), (1, 2), (1, 2)),
        pytest.param("mlm", (2, 1), (2, 1), (1, 2), marks=pytest.mark.slow),
        ("spans", (1, 2), (2, 1), (1, 2)),
        ("concat", (2, 2), (4, 1), (2, 2)),
    ],
)
def test_other_numbers_of_processes(kind, begin, then, like, text, faulty, whole, tmp_path, record_property):
    """Stopped by a signal to one process at its fourth batch, gone on with in another number of processes: the run that nothing interrupted."""
    tell(record_property, f"9. resume on other processes and devices: {begin[0]} x {begin[1]} -> {then[0]} x {then[1]}")
    expected, workdir = whole(kind, *like), tmp_path / "run"
    if begin[0] == 1:
        with runs.at_batch(5, runs.stop):
            assert runs.run(runs.tiny(kind, text=text, **CHANGES), workdir, devices=begin[1]) == 75
    else:
        ended = train(kind, workdir, text, processes=begin[0], devices=begin[1], recipe=faulty, PTM_TEST_FAULT="batch SIGTERM")
        assert [one.code for one in ended] == [75] * begin[0] and all(map(silent, ended[1:])), ended
        assert "Another process was asked to stop." in ended[0].err and f"Interrupted at step 5 of {STEPS}; saved." in ended[0].err, ended
    assert sorted(path.name for path in (workdir / "ckpt").iterdir()) == ["3", "5"]
    if then[0] == 1:
        alone(kind, workdir, text, devices=then[1])
    else:
        ended = train(kind, workdir, text, processes=then[0], devices=then[1])
        assert [one.code for one in ended] == [0] * then[0] and f"Continuing {workdir} from step 5 of {STEPS}." in ended[0].err, ended
    runs.assert_same(workdir, expected, STEPS)


@several
def test_sigusr1_to_one_process_saves_once(text, faulty, whole, tmp_path):
    """All save after the same step, one later than the signal, and go on."""
    ended = train("concat", tmp_path / "run", text, "--config.checkpoint.keep_latest=9", processes=2, recipe=faulty, PTM_TEST_FAULT="batch SIGUSR1")
    assert [one.code for one in ended] == [0, 0], ended
    assert sorted(int(path.name) for path in (tmp_path / "run/ckpt").iterdir()) == [3, 5, 6, STEPS]
    runs.assert_same(tmp_path / "run", whole("concat", 2, 1), STEPS)


@several
def test_a_signal_to_one_process_during_an_evaluation(text, faulty, whole, tmp_path, record_property):
    """All give it up after the same batch, and make it when they go on."""
    tell(record_property, "8. 2 processes: one is asked to stop")
    several_batches = "--config.evals.validation.batch_size=2"
    ended = train("concat", tmp_path / "run", text, several_batches, processes=2, recipe=faulty, PTM_TEST_FAULT="eval SIGTERM")
    assert [one.code for one in ended] == [75, 75] and "The evaluation validation of step " in ended[0].err and silent(ended[1]), ended
    (step,) = [step for step in steps_in(tmp_path / "run/ckpt") if owed(tmp_path / "run/ckpt", step)]
    ended = train("concat", tmp_path / "run", text, several_batches, processes=2)
    assert [one.code for one in ended] == [0, 0] and f"from step {step} of" in ended[0].err, ended
    ours, theirs = ([row for row in rows(workdir) if "validation/loss" in row] for workdir in (tmp_path / "run", whole("concat", 2, 1)))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    np.testing.assert_allclose([row["validation/loss"] for row in ours], [row["validation/loss"] for row in theirs], rtol=1e-5)


@several
def test_a_damaged_checkpoint(text, whole, tmp_path, record_property):
    """All processes go on from the step before it."""
    tell(record_property, "8. 2 processes: a damaged checkpoint")
    workdir = tmp_path / "run"
    shutil.copytree(whole("concat", 2, 1), workdir)
    shutil.rmtree(workdir / "ckpt" / str(STEPS))
    (workdir / "ckpt/6/data/stream-00003.json").write_text("{}")
    ended = train("concat", workdir, text, processes=2)
    assert [one.code for one in ended] == [0, 0], ended
    assert "it is kept as 6.damaged-1" in ended[0].err and f"Continuing {workdir} from step 3 of {STEPS}." in ended[0].err and silent(ended[1])
    runs.assert_same(workdir, whole("concat", 2, 1), STEPS)


@several
@pytest.mark.parametrize(
    ("fault", "code"),
    [("setup config", 2), ("setup SIGTERM", 75), ("batch config", 2), ("batch bug", 1)],
)
def test_a_fault_of_one_process_ends_all(fault, code, text, faulty, tmp_path, record_property):
    """With its exit code and one message."""
    tell(record_property, "8. 2 processes: one fails")
    begun = time.monotonic()
    ended = train("concat", tmp_path / "run", text, processes=2, recipe=faulty, PTM_TEST_FAULT=fault)
    assert [one.code for one in ended] == [code, code] and time.monotonic() - begun < 60, ended
    told, what = ended[0].err, "SIGTERM before the first step" if fault == "setup SIGTERM" else "this is what went wrong"
    assert f"ptm: process 1 ({socket.gethostname()}) failed:" in told and silent(ended[1]), ended
    assert told.count(what) == (2 if fault == "batch bug" else 1), ended  # a traceback quotes the line
    assert ("Traceback" in told) == (fault == "batch bug")


@several
def test_what_differs_is_refused(text, tmp_path):
    """Workdirs that are not shared, other data, another config: one line on process 0, exit code 2 on all."""
    for name, own, told in (
        ("workdir", [[], [f"--workdir={tmp_path / 'elsewhere'}"]], "is not one folder for all processes: process 1"),
        ("config", [[], ["--config.seed=5"]], "has another config than process 0"),
        ("data", [[], [f"--config.data.source=text:{runs.corpus(tmp_path / 'other.txt', seed=1)}"]], "has another config and another data than process 0"),
    ):
        ended = train("concat", tmp_path / name, text, processes=2, own=own)
        assert [one.code for one in ended] == [2, 2] and told in ended[0].err and silent(ended[1]), (name, ended)
        assert not (tmp_path / name / "config.json").exists()


@several
def test_others_that_do_not_come(text, tmp_path):
    command = ("train", f"--config={runs.__file__}:concat", f"--workdir={tmp_path / 'run'}", "--join_timeout=3")
    children = start(tmp_path / "log", *command, processes=2, devices=1, PTM_TEST_TEXT=str(text))
    children[1].kill()
    ended = finish(children, tmp_path / "log")
    assert ended[0].code == 2 and "process 0 of 2 has waited 3 s for the others at localhost:" in ended[0].err and "--join_timeout" in ended[0].err, ended


@several
def test_tokenizer_is_trained_once(text, tmp_path):
    """The others read it from the workdir."""
    words = ("--config.tokenizer.kind=bpe", "--config.tokenizer.vocab_size=270")
    ended = train("concat", tmp_path / "two", text, *words, processes=2)
    assert [one.code for one in ended] == [0, 0], ended
    alone("concat", tmp_path / "one", text, devices=2, tokenizer__kind="bpe", tokenizer__vocab_size=270)
    runs.assert_same(tmp_path / "two", tmp_path / "one", STEPS)


@several
@pytest.mark.parametrize(
    "recipe",
    ["text.py:classify", "squad.py:squad2", "summarization.py:aeslc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ner.py:conll2003", "superglue.py:copa"))],
)
def test_answers(recipe, tmp_path):
    """Evaluation of two processes in the loop and by itself: metrics and predictions of one process with two devices, whole, in order, written once."""
    command = ("train", f"--config={ROOT / 'configs/finetune'}/{recipe},tiny", "--config.train.steps=2", "--config.schedule.warmup_steps=1")
    ended = together(tmp_path / "log", *command, f"--workdir={tmp_path / 'two'}", processes=2, devices=1)
    assert [one.code for one in ended] == [0, 0], ended
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    words = [sys.executable, "-m", "ptm.cli", *command, f"--workdir={tmp_path / 'one'}"]
    subprocess.run(words, env=env, cwd=ROOT, check=True, capture_output=True, timeout=LIMIT)
    predictions = {path.name: path.read_text() for path in (tmp_path / "one/predictions").iterdir()}
    assert predictions and predictions == {path.name: path.read_text() for path in (tmp_path / "two/predictions").iterdir()}
    assert runs.metrics(tmp_path / "two") == runs.metrics(tmp_path / "one")
    shutil.rmtree(tmp_path / "two/predictions")
    ended = together(tmp_path / "log", "evaluate", f"--workdir={tmp_path / 'two'}", processes=2, devices=1)
    assert [one.code for one in ended] == [0, 0] and silent(ended[1]), ended
    assert predictions.keys() == {path.name for path in (tmp_path / "two/predictions").iterdir()}
    assert predictions == {path.name: path.read_text() for path in (tmp_path / "two/predictions").iterdir()}
    measured = json.loads(ended[0].out.splitlines()[-1])
    assert {name: value for name, value in rows(tmp_path / "two")[-1].items() if name != "step"}.items() <= measured.items()


@several
def test_seeds(text, tmp_path):
    ended = train("concat", tmp_path / "runs", text, "--seeds=2", processes=2)
    assert [one.code for one in ended] == [0, 0] and silent(ended[1]), ended
    assert len(json.loads((tmp_path / "runs/seeds.json").read_text())["rows"]) == 2
    ended = train("concat", tmp_path / "runs", text, "--seeds=2", processes=2)
    assert [one.code for one in ended] == [0, 0] and ended[0].out.count("is finished") == 2, ended


@several
@pytest.mark.parametrize("launcher", ["SLURM", "Open MPI"])
def test_launchers(launcher, text, tmp_path):
    """What they set is enough: nothing is given."""

    def variables(number: int) -> dict[str, str]:
        if launcher == "SLURM":
            return SRUN | {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_TASKS_PER_NODE": "2"}
        mine = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(number)}
        return {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", **mine}

    ended = train("concat", tmp_path / "run", text, "--print_config", processes=2, launcher=variables)
    assert [one.code for one in ended] == [0, 0] and ended[0].out.count("  seed = 0") == 1 and silent(ended[1]), ended


@several
def test_show_and_stop(text, tmp_path):
    """What stops before the training is shown once."""
    for flag, told in (("--print_config", "seed = 0"), ("--show_batch=1", "row 0")):
        ended = train("concat", tmp_path / "run", text, flag, processes=2)
        assert [one.code for one in ended] == [0, 0] and told in ended[0].out and silent(ended[1]), ended
    assert jax.process_count() == 1
