"""`ptm study` as a command: wrong usage, one run alone, and whole studies of seconds (tests/studies.py): shared, stopped, killed, searched."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ledger import tell
from made_studies import TESTS, finish

from ptm import cli
from ptm.study import folder, identity, prepare

STUDY = f"{TESTS}/studies.py"
pytestmark = pytest.mark.usefixtures("study_text")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "`ptm study` needs FILE.py[:WORDS]"),
        ([STUDY], "needs --workdir=DIR"),
        ([f"{STUDY}x", "--workdir=DIR"], "Did you mean 'studies.py'?"),
        ([STUDY, "--workdir=DIR", "--retries=-1"], "--retries=-1"),
        ([STUDY, "--workdir=DIR", "--dryrun"], "Did you mean '--dry_run'?"),
        ([STUDY, "--workdir=DIR", "more"], "unknown argument 'more' of `ptm study`"),
        ([STUDY, "--workdir=DIR", "--processes=2"], "give --run"),
        ([STUDY, "--workdir=DIR", "--dry_run", "--run=x"], "leave --run out"),
        ([STUDY, "--workdir=DIR", "--config.train.steps=3"], "--config.STAGE.SECTION.KEY=VALUE"),
    ],
)
def test_wrong_usage(words, told, tmp_path, capsys, monkeypatch):
    assert cli.main(["study", *(word.replace("DIR", str(tmp_path / "new")) for word in words)]) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("ptm: ") and not (tmp_path / "new").exists(), err


def test_a_dry_run_makes_nothing(tmp_path, capsys):
    assert cli.main(["study", STUDY, f"--workdir={tmp_path / 'new'}", "--dry_run"]) == 0
    assert "8 runs" in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_one_run_wants_the_words_of_its_study_and_its_parent(tmp_path, capsys):
    root = tmp_path / "new"
    prepare(STUDY, workdir=root)
    one = ["study", STUDY, f"--workdir={root}"]
    assert cli.main([*one, "--run=low/seed0/tune"]) == 2 and "which is not finished; run that one first" in capsys.readouterr().err
    assert cli.main([*one, "--run=low/seed0/pretrain", "--config.pretrain.train.steps=3"]) == 2 and "--run wants the same words" in capsys.readouterr().err
    assert cli.main([*one, "--run=low/seed9/pretrain"]) == 2 and "has no run 'low/seed9/pretrain'" in capsys.readouterr().err
    finish(root, "low/seed0/pretrain")
    assert cli.main([*one, "--run=low/seed0/pretrain"]) == 0 and "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["data", "tokenizer"])
def test_one_run_is_refused_where_what_it_reads_has_changed(kind, tmp_path, capsys):
    root = tmp_path / "new"
    prepare(STUDY, workdir=root)
    record = json.loads((root / "study.json").read_text())
    record["runs"]["low/seed0/pretrain"]["fingerprints"][kind] = "0" * 16
    (root / "study.json").write_text(json.dumps(record))
    assert cli.main(["study", STUDY, f"--workdir={root}", "--run=low/seed0/pretrain"]) == 2
    assert f"the {kind} of {root}/low/seed0/pretrain changed since the study was made: fingerprint 000000000000 -> " in capsys.readouterr().err


# Whole studies.


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "ptm.cli", "study", STUDY, f"--workdir={root}", *words]


def environment(text: Path) -> dict[str, str]:
    return os.environ | {"PTM_TEST_TEXT": str(text), "JAX_NUM_CPU_DEVICES": "1"}


def everything(root: Path) -> dict[str, str]:
    """What a study measured: the rows of all its runs."""
    return {run: (root / run / "metrics.jsonl").read_text() for run in folder.read(root).runs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, study_text) -> Path:
    """A study of two stages, two arms and two seeds that ran without an interruption."""
    root = tmp_path_factory.mktemp("whole")
    subprocess.run(command(root), env=environment(study_text), check=True)
    return root


@pytest.mark.runs
def test_a_study_from_end_to_end(whole, study_text):
    record = folder.read(whole)
    assert [folder.state(whole, run).name for run in record.runs] == ["finished"] * 8
    for run in record.runs:
        assert json.loads((whole / run / "config.json").read_text()) == json.loads(json.dumps(identity.unflatten(folder.placed(whole, run)))), (
            "what ran is what was recorded"
        )
        assert len(folder.state(whole, run).attempts) == 1
    assert folder.curve(whole, "low/seed0/tune", "validation/loss")[0][1] < folder.curve(whole, "low/seed0/pretrain", "validation/loss")[0][1], (
        "it began where the first stage ended"
    )
    final = {run: folder.final_metrics(whole, run)["validation/loss"] for run in record.runs}
    assert len(set(final.values())) == 8
    again = subprocess.run(command(whole), env=environment(study_text), capture_output=True, text=True, check=True)
    assert "8 of 8 runs finished" in again.stdout and "Run " not in again.stdout


@pytest.mark.runs
def test_a_study_is_checked_without_a_device(study_text, tmp_path):
    """A login node has none: to resolve and record a study asks for none."""
    env = environment(study_text) | {"JAX_PLATFORMS": "nothing"}
    subprocess.run(command(tmp_path, "--dry_run"), env=env, check=True)
    code = f"from ptm.study import prepare; prepare({STUDY!r}, workdir={str(tmp_path / 'new')!r})"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert len(folder.read(tmp_path / "new").runs) == 8


@pytest.mark.runs
def test_sigterm_is_passed_on(whole, study_text, tmp_path):
    """The runner ends with 75 once its run has saved, and the same command ends as if nothing had happened."""
    process = subprocess.Popen(command(tmp_path), env=environment(study_text), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("First step done"):
            process.send_signal(signal.SIGTERM)
            break
    out = process.stdout.read()
    assert process.wait() == 75 and "SIGTERM: finishing the step and saving." in out and "start the same command again" in out
    states = [folder.state(tmp_path, run) for run in folder.read(tmp_path).runs]
    assert [state.name for state in states].count("cut") == 1 and states[0].attempts[-1]["exit_code"] == 75
    subprocess.run(command(tmp_path), env=environment(study_text), check=True)
    assert everything(tmp_path) == everything(whole)


@pytest.mark.runs
def test_two_runners_share_the_work(whole, study_text, tmp_path):
    both = [subprocess.Popen(command(tmp_path), env=environment(study_text), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert everything(tmp_path) == everything(whole)
    assert all(len(folder.state(tmp_path, run).attempts) == 1 for run in folder.read(tmp_path).runs)
    assert all("Run " in out for out in outs)


@pytest.mark.runs
def test_a_rung_changes_nothing_of_those_that_go_on(study_text, tmp_path, whole):
    subprocess.run([*command(tmp_path)[:4], f"{STUDY}:halving", f"--workdir={tmp_path}"], env=environment(study_text), check=True)
    states = {run: folder.state(tmp_path, run) for run in folder.read(tmp_path).runs}
    stopped = {run for run, state in states.items() if state.name == "stopped"}
    assert len(stopped) == 4 and all(run.startswith("high/") for run in stopped), "the base stays, whichever is better"
    for run in set(states) - stopped:
        assert (tmp_path / run / "metrics.jsonl").read_text() == (whole / run / "metrics.jsonl").read_text()
    assert all(states[run].step == 6 for run in stopped if run.endswith("pretrain"))


@pytest.mark.runs
def test_a_search_goes_on(study_text, tmp_path):
    pytest.importorskip("optuna", reason="needs the extra search")
    words = [*command(tmp_path)[:4], f"{STUDY}:search", f"--workdir={tmp_path}"]
    out = subprocess.run(words, env=environment(study_text), check=True, capture_output=True, text=True).stdout
    record = folder.read(tmp_path)
    assert "best of 2 trials" in out and len(record.search.asked) == 2 and all(folder.is_finished(tmp_path, run) for run in record.runs)
    assert "best of 2 trials" in subprocess.run(words, env=environment(study_text), check=True, capture_output=True, text=True).stdout


def attempts(root: Path) -> list[dict]:
    """Those of all runs of a study so far; none before it has a folder."""
    return [attempt for run in folder.read(root).runs for attempt in folder.state(root, run).attempts] if (root / folder.FILE).is_file() else []


@pytest.mark.faults
def test_killed_at_random_moments(whole, study_text, tmp_path, long, record_property):
    """SIGKILL to the runner and its run, twice (five times), ends with exactly the figures of a study that nothing interrupted."""
    rng, kills = random.Random(1), 5 if long else 2
    tell(record_property, "1. SIGKILL at random moments: a study and its run", tried=kills)
    for _ in range(kills):
        before = len(attempts(tmp_path))
        process = subprocess.Popen(command(tmp_path), env=environment(study_text), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(attempts(tmp_path)) == before:  # the runner comes up, however busy the machine is
            assert process.poll() is None
            time.sleep(0.1)
        with pytest.raises(subprocess.TimeoutExpired):  # it is killed while it works
            process.wait(timeout=rng.uniform(0, 5))
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False).stdout.split()
        for pid in (process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert any(attempt["end"] is None for attempt in attempts(tmp_path)), "a kill hit a run"
    subprocess.run(command(tmp_path), env=environment(study_text), check=True)
    assert everything(tmp_path) == everything(whole)
    for run in folder.read(tmp_path).runs:
        for step, _ in folder.curve(tmp_path, run, "validation/loss"):
            assert [at for at, _ in folder.curve(tmp_path, run, "validation/loss")].count(step) == 1, "an evaluation stays with its step, once"
