"""A run that was stopped, killed, moved or refused: what goes on is the run that was begun."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import runs
from ledger import tell

from ptm import describe, interrupts, log
from ptm.checkpoint import Checkpoints
from ptm.fields import ConfigError
from ptm.saved import owed, settled

KINDS = ("concat", "window", "mlm", "spans")
STEPS = 14


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """kind -> (workdir, hashes of its batches) of an uninterrupted run, made once."""
    made = {}

    def of(kind: str):
        if kind not in made:
            workdir = tmp_path_factory.mktemp("whole") / kind
            with runs.at_batch(0, runs.stop) as taken:
                assert runs.run(runs.tiny(kind, text=text), workdir) == 0
            made[kind] = workdir, taken
        return made[kind]

    return of


def in_mid_pack(kind: str, state: dict) -> bool:
    """Whether a stream has more to keep than a number of rows: a document half used up, visits of the one document, or rows partly filled."""
    packer = state["packer"]
    return packer["offset"] > 0 if kind == "concat" else packer["draw"] > 0 if kind == "window" else any(packer["rows"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_as_if_nothing_had_happened(kind, text, whole, tmp_path, capfd, record_property):
    """Stopped after step 4, off the schedule of checkpoints, then finished."""
    tell(record_property, "4. SIGTERM, SIGINT: steps")
    expected, batches = whole(kind)
    config = runs.tiny(kind, text=text)
    with runs.at_batch(4, runs.stop) as taken:
        assert runs.run(config, tmp_path) == 75
    assert taken == batches[:4] and sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["4"]
    saved = [json.loads(content) for content in runs.streams(tmp_path, 4).values()]
    assert len(saved) == 4 and any(in_mid_pack(kind, state) for state in saved), "the stop must come in mid-pack to test anything"
    with runs.at_batch(0, runs.stop) as taken:
        assert runs.run(config, tmp_path) == 0
    assert taken == batches[4:]
    runs.assert_same(tmp_path, expected, STEPS)
    told = capfd.readouterr().err
    assert f"Interrupted at step 4 of {STEPS}; saved." in told and f"Continuing {tmp_path} from step 4 of {STEPS}." in told


def test_a_crashed_run_ends_as_if_nothing_had_happened(text, whole, tmp_path, capfd):
    """Crashed in step 10: steps 7 to 9 and the rows of 7 and 8 are lost and made again."""
    expected, batches = whole("concat")
    config = runs.tiny("concat", text=text)
    with runs.at_batch(10, runs.crash) as taken, pytest.raises(runs.Crash):
        runs.run(config, tmp_path)
    assert taken == batches[:9] and '"step": 8' in runs.metrics(tmp_path)
    with runs.at_batch(0, runs.stop) as taken:
        assert runs.run(config, tmp_path) == 0
    assert taken == batches[6:]
    runs.assert_same(tmp_path, expected, STEPS)
    assert f"Continuing {tmp_path} from step 6 of {STEPS}." in capfd.readouterr().err


def test_the_whole_state_is_in_the_checkpoint(whole):
    """Guards the comparison above: what resuming could lose is there, and differs from its initial value."""
    workdir, _ = whole("concat")
    first, last = runs.leaves(workdir, 6), runs.leaves(workdir, STEPS)
    paths = list(last)
    assert int(last["step"]) == STEPS and int(last["window/count"]) == STEPS
    for part in ("params/", "ema/", "window/loss"):
        moved = [path for path in paths if path.startswith(part) and not np.array_equal(first[path], last[path])]
        assert moved, part
    moments = [path for path in paths if path.startswith("opt_state/") and last[path].ndim > 0]
    counts = [int(last[path]) for path in paths if path.startswith("opt_state/") and last[path].ndim == 0]
    assert len(moments) == 2 * sum(path.startswith("params/") for path in paths) and counts and set(counts) == {STEPS}


@pytest.mark.parametrize("begin, then", [(1, 8), (8, 1)])
def test_other_device_counts(begin, then, text, whole, tmp_path, record_property):
    """The same rows in the same order; the sums of a step are added in another order, so its loss agrees to 1e-4 relative only."""
    tell(record_property, f"9. resume on other devices: {begin} -> {then}")
    expected, batches = whole("concat")
    config = runs.tiny("concat", text=text)
    with runs.at_batch(7, runs.stop) as first:
        assert runs.run(config, tmp_path, devices=begin) == 75
    with runs.at_batch(0, runs.stop) as second:
        assert runs.run(config, tmp_path, devices=then) == 0
    assert first + second == batches
    assert runs.streams(tmp_path, STEPS) == runs.streams(expected, STEPS)
    ours, theirs = ([json.loads(line) for line in runs.metrics(workdir).splitlines()] for workdir in (tmp_path, expected))
    assert [(row["step"], row.get("rows")) for row in ours] == [(row["step"], row.get("rows")) for row in theirs]
    for name in ("loss", "validation/loss"):
        np.testing.assert_allclose([row[name] for row in ours if name in row], [row[name] for row in theirs if name in row], rtol=1e-4)
    devices = [session["devices"]["count"] for session in describe.history(tmp_path)]
    assert devices == [begin, then]


def wait_for(process, condition, *, seconds: float = 60.0) -> None:
    """Returns when `condition()` holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(0.005)


def rows(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def signalled(number: int, kind: str, workdir: Path, text: Path, *overrides: str, after: int) -> tuple[int, str]:
    """Exit code and output of `ptm train` that got a signal when it had written `after` rows more."""
    process = runs.child(kind, workdir, text, *overrides)
    before = rows(workdir)
    wait_for(process, lambda: rows(workdir) >= before + after)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_signals_of_the_command_line(text, tmp_path, capfd, record_property):
    """SIGTERM and SIGINT finish the step, save and exit 75; the same command goes on, finishes, and then says that it is finished."""
    tell(record_property, "4. SIGTERM, SIGINT: steps", tried=2)
    many = ("--config.train.steps=3000", "--config.checkpoint.every=100000", "--config.evals.validation.every=100000", "--config.log.every=1")
    reached = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        code, output = signalled(number, "concat", tmp_path, text, *many, after=3)
        assert code == 75, output
        assert f"{number.name}: finishing the step and saving." in output
        if reached:
            assert f"Continuing {tmp_path} from step {reached} of 3000." in output
        [*_, newest] = sorted(int(path.name) for path in (tmp_path / "ckpt").iterdir())
        assert f"Interrupted at step {newest} of 3000; saved. Start the same command again to continue." in output
        assert reached < newest < 3000 and rows(tmp_path) == newest
        reached = newest
    with pytest.raises(ConfigError, match=f"at step {reached} already, train.steps=3 is less"):
        runs.run(runs.tiny("concat", text=text, train__steps=3), tmp_path)
    config = runs.tiny("concat", text=text, train__steps=reached + 3)
    assert runs.run(config, tmp_path) == 0
    assert f"Continuing {tmp_path} from step {reached} of {reached + 3}." in capfd.readouterr().err
    before = runs.metrics(tmp_path)
    assert runs.run(config, tmp_path) == 0
    told = capfd.readouterr()
    assert f"{tmp_path} is finished: step {reached + 3} of {reached + 3}." in told.err
    assert "Finished gpt / causal" in told.out and "validation loss" in told.out and str(tmp_path) in told.out
    assert runs.metrics(tmp_path) == before
    history = describe.history(tmp_path)
    assert len(history) == 4 and [session["from_step"] for session in history][2:] == [reached, reached + 3]
    assert history[2]["changes"]["train.steps"] == [3000, reached + 3] and history[3]["changes"] == {}


def test_a_signal_before_the_first_step_leaves_nothing_behind(text, tmp_path, record_property):
    tell(record_property, "4. SIGTERM: before the first step")
    workdir = tmp_path / "run"
    process = runs.child("concat", workdir, text)
    wait_for(process, workdir.exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "SIGTERM before the first step" in output
    assert not (workdir / "metrics.jsonl").exists()


# The compiler of the training step takes a minute. Another thread is given the signal: as deep in a call this one would not hear it.
STUCK = """
import signal, sys, time
import jax
from jax._src import compiler
from ptm import cli, interrupts

compiled, interrupts.GRACE = compiler.backend_compile_and_load, 1.0

def slow(backend, module, *args):
    if "train_step" in module.operation.attributes["sym_name"].value:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        print("compiling", flush=True)
        time.sleep(60)
    return compiled(backend, module, *args)

compiler.backend_compile_and_load = slow
sys.exit(cli.main())
"""


def test_a_signal_while_the_step_is_compiled_ends_the_process(text, whole, tmp_path, record_property):
    """What is deep in the compiler hears no handler; the last checkpoint stays as it is."""
    tell(record_property, "4. SIGTERM: compiling")
    expected, _ = whole("concat")
    shutil.copytree(expected, tmp_path / "run", ignore=shutil.ignore_patterns(str(STEPS)))
    arguments = ["train", f"--config={runs.__file__}:concat", f"--workdir={tmp_path / 'run'}"]
    env = os.environ | {"PTM_TEST_TEXT": str(text), "JAX_NUM_CPU_DEVICES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with subprocess.Popen([sys.executable, "-c", STUCK, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        told = list(itertools.takewhile(lambda line: line != "compiling\n", process.stdout))
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "SIGTERM while a program was compiled: nothing was saved since the last checkpoint" in output, told
    assert time.monotonic() - begun < 15
    assert runs.run(runs.tiny("concat", text=text), tmp_path / "run") == 0
    runs.assert_same(tmp_path / "run", expected, STEPS)


def test_sigusr1_saves_and_the_run_goes_on(text, whole, tmp_path, capfd, record_property):
    tell(record_property, "4. SIGUSR1")
    expected, batches = whole("concat")
    config = runs.tiny("concat", text=text, checkpoint__keep_latest=9)
    with runs.at_batch(4, lambda: signal.raise_signal(signal.SIGUSR1)) as taken:
        assert runs.run(config, tmp_path) == 0
    assert taken == batches and "SIGUSR1: saving after the step." in capfd.readouterr().err
    runs.assert_same(tmp_path, expected, STEPS)
    assert sorted(int(path.name) for path in (tmp_path / "ckpt").iterdir()) == [4, 6, 12, STEPS]


@pytest.mark.parametrize("step", [7, STEPS])
def test_a_signal_during_an_evaluation_gives_it_up(step, text, whole, tmp_path, monkeypatch, capfd, record_property):
    """The step is saved; the evaluation is made when the run goes on, as the run without a stop made it, though a kill comes between."""
    tell(record_property, "4. SIGTERM: evaluation")
    expected, _ = whole("concat")
    config, polled = runs.tiny("concat", text=text), interrupts.poll

    def poll() -> None:
        if log.last_step(str(tmp_path / "metrics.jsonl")) >= step - 1:
            signal.raise_signal(signal.SIGTERM)
        polled()

    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "poll", poll)
        assert runs.run(config, tmp_path) == 75
    assert f"The evaluation validation of step {step} is given up" in capfd.readouterr().err
    folder = tmp_path / "ckpt"
    assert owed(folder, step) == ["validation"] and not settled(folder, step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(log.row(step, {"validation/loss": 9.0}) + "\n")  # of a start that was killed before it could say that it is no more owed
    assert runs.run(config, tmp_path) == 0
    runs.assert_same(tmp_path, expected, STEPS)
    saved, whole_ones = Checkpoints.reader(folder), Checkpoints.reader(expected / "ckpt")
    assert not owed(folder, step) and settled(folder, STEPS)
    assert saved.metrics(STEPS) == whole_ones.metrics(STEPS) and saved.best() == whole_ones.best()


def killed(kind: str, workdir: Path, text: Path, *overrides: str, moments: Iterable[str], seed: int) -> None:
    """Starts a run as often as there are moments, and kills it at a random one of each kind; it must not end by itself before."""
    rng = random.Random(seed)
    for moment in moments:
        process = runs.child(kind, workdir, text, *overrides)
        if moment == "save":
            seen = set(workdir.glob("ckpt/*"))
            wait_for(process, lambda seen=seen: any("tmp" in path.name and path not in seen for path in workdir.glob("ckpt/*")))
        elif moment == "step":
            goal = rows(workdir) + rng.randint(1, 20)
            wait_for(process, lambda goal=goal: rows(workdir) >= goal)
        else:  # it may be starting, compiling, restoring
            time.sleep(rng.uniform(0.5, 4.0))
        time.sleep(rng.random() * 0.03)
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output


MOMENTS = ("save", "step", "any")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["concat", "mlm", "spans"])
def test_killed_at_random_moments(kind, text, tmp_path, long, record_property):
    """And then finished, in another process: the run that nothing interrupted. 6 kills over the kinds of run, and each kind of moment, 50 in the long suite."""
    first = ("concat", "mlm", "spans").index(kind)
    moments = [MOMENTS[(first + number) % len(MOMENTS)] for number in range((17, 17, 16)[first] if long else 2)]
    tell(record_property, f"1. SIGKILL at random moments: {kind}", tried=len(moments))
    changes = {"train.steps": 30 * len(moments) + 150, "checkpoint.every": 8, "evals.validation.every": 30, "log.every": 1, "optimizer.learning_rate": 1e-3}
    config = runs.tiny(kind, text=text, **{key.replace(".", "__"): value for key, value in changes.items()})
    assert runs.run(config, tmp_path / "whole") == 0
    killed(kind, tmp_path / "killed", text, *(f"--config.{key}={value}" for key, value in changes.items()), moments=moments, seed=first)
    assert runs.run(config, tmp_path / "killed") == 0
    assert len(describe.history(tmp_path / "killed")) > len(moments) // 2, "most kills came when the run had begun"
    runs.assert_same(tmp_path / "killed", tmp_path / "whole", changes["train.steps"])


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("concat", {"model__width": 32}, r"model\.width: 16 -> 32"),
        ("concat", {"objective__z_loss": 0.1}, r"objective\.z_loss: 0\.0 -> 0\.1"),
        ("concat", {"data__length": 8}, r"data\.length: 16 -> 8"),
        ("concat", {"tokenizer__kind": "chars"}, r"tokenizer\.kind: 'bytes' -> 'chars'"),
        ("concat", {"seed": 1}, r"seed: 0 -> 1"),
        ("mlm", {}, r"model\.name: 'gpt' -> 'bert'"),
        ("concat", {"optimizer__learning_rate": 0.5}, r"learning_rate: 0\.01 -> 0\.5   \(allowed with --allow_change=optimizer\.learning_rate\)"),
        ("concat", {"train__batch_size": 32}, r"train\.batch_size: 16 -> 32   \(allowed with"),
    ],
)
def test_a_changed_config_is_refused(kind, changes, message, text, whole):
    workdir, _ = whole("concat")
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=message) as error:
        runs.run(runs.tiny(kind, text=text, **changes), workdir)
    assert "use a new --workdir" in str(error.value)
    assert before == {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}


def test_steps_may_grow_and_an_optimizer_key_change_if_it_is_named(text, tmp_path):
    assert runs.run(runs.tiny("concat", text=text, train__steps=2), tmp_path) == 0
    grown = runs.tiny("concat", text=text, train__steps=4, optimizer__learning_rate=0.002, log__every=1)
    assert runs.run(grown, tmp_path, allow_change=("optimizer.learning_rate",)) == 0
    history = describe.history(tmp_path)
    assert [session["from_step"] for session in history] == [0, 2]
    assert history[1]["changes"] == {"train.steps": [2, 4], "optimizer.learning_rate": [0.01, 0.002], "log.every": [2, 1]}
    trained = [json.loads(line) for line in runs.metrics(tmp_path).splitlines() if '"loss"' in line]
    assert [row["step"] for row in trained] == [1, 2, 3, 4] and trained[-1]["learning_rate"] == pytest.approx(0.002)
    assert runs.run(grown, tmp_path) == 0, "the workdir's config is now the changed one"


def test_changed_data_is_refused(tmp_path, record_property):
    tell(record_property, "7. wrong configs: changed data on resume")
    text = runs.corpus(tmp_path / "corpus.txt")
    config = runs.tiny("concat", text=text, train__steps=2)
    assert runs.run(config, tmp_path / "run") == 0
    with open(text, "a") as file:
        file.write("one more line\n")
    with pytest.raises(ConfigError, match="the data of .* changed since step 2: fingerprint .* -> .*"):
        runs.run(config, tmp_path / "run")


def test_a_refused_start_leaves_no_tokenizer_to_the_next(text, tmp_path):
    """The first start trains a tokenizer and is refused after that; the second, under another tokenizer, must not find the first one's."""
    refused = runs.tiny("concat", text=text, tokenizer__kind="chars", model__vocab_size=3)
    with pytest.raises(ConfigError, match="vocab_size=3 is smaller"):
        runs.run(refused, tmp_path)
    assert runs.run(runs.tiny("concat", text=text, train__steps=2), tmp_path) == 0
    assert json.loads((tmp_path / "tokenizer/meta.json").read_text())["kind"] == "bytes"


def test_a_damaged_newest_checkpoint_costs_steps_not_the_run(text, whole, tmp_path, record_property):
    tell(record_property, "2. damaged checkpoints: a run goes on from the one before")
    expected, _ = whole("concat")
    config = runs.tiny("concat", text=text)
    with runs.at_batch(9, runs.stop):
        assert runs.run(config, tmp_path) == 75
    (tmp_path / "ckpt/9/state/manifest.ocdbt").write_bytes(b"")
    with pytest.warns(UserWarning, match="9 is damaged"):
        assert runs.run(config, tmp_path) == 0
    assert [session["from_step"] for session in describe.history(tmp_path)] == [0, 6]
    runs.assert_same(tmp_path, expected, STEPS)
