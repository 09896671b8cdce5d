"""The loop of `ptm study` beside made-up children: what is started, in which order, again or not; and what a person is shown."""

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from made_studies import LOSS, TUNED, attempt, begin, elsewhere, finish, made, refusal, rows, study

from ptm import lock, log
from ptm.study import Arm, Halving, Ordering, attempts, checks, folder, halving, resolution, runner, summary

pytestmark = pytest.mark.usefixtures("study_text")


def test_the_plan(tmp_path):
    record = made(tmp_path, stages=TUNED, orderings=(Ordering(better="low", worse="high", metric=LOSS),))
    states = {run: folder.state(tmp_path, run) for run in record.runs}
    page = summary.plan(record, states)
    for words in (
        "Study made: A higher rate is better.", "Nobody 2020, table 1", "from the final checkpoint of pretrain", "low   the base",
        "high  pretrain:optimizer.learning_rate 0.01 -> 0.02", "8 runs (2 arms, 2 stages, seeds 0, 1)", f"to do: {4 * (14 + 4) * 256:,} tokens",
        "not known before a run of stage pretrain is finished",
    ):  # fmt: skip
        assert words in page, words
    for run in states:
        if run.endswith("seed0/pretrain") or run == "low/seed0/tune":
            finish(tmp_path, run)
            attempt(tmp_path, run, 0)  # ten seconds
    page = summary.plan(record, {run: folder.state(tmp_path, run) for run in record.runs})
    assert "; 3 done" in page and "to do: " in page and f"one run after the other: {log.duration(2 * 10 + 3 * 10)}" in page


def test_versions_of_the_code():
    def state(*commits: str) -> folder.State:
        return folder.State("cut", 1, [{"git": {"commit": commit * 40, "dirty": False}} if commit else {"git": {}} for commit in commits], None)

    record = dataclasses.make_dataclass("Record", ["runs"])({"x": None, "y": None})
    clean, dirty = {"commit": "a" * 40, "dirty": False}, {"commit": "a" * 40, "dirty": True}
    assert summary.mix(record, {"x": state("a", "a"), "y": state("")}, current=clean) is None
    assert summary.mix(record, {"x": state("a"), "y": state("a")}, current={}) is None
    assert "aaaaaaaaaaaa (1 run, this one); bbbbbbbbbbbb (2 runs)" in summary.mix(record, {"x": state("b"), "y": state("b", "a")}, current=clean)
    assert "not committed" in summary.mix(record, {"x": state(), "y": state()}, current=dirty)
    done = {run: dataclasses.replace(state("b"), name=name) for run, name in (("x", folder.FINISHED), ("y", folder.STOPPED))}
    assert summary.mix(record, done, current=dirty) is None, "nothing is left to be made by what is here"
    assert summary.mix(record, done | {"y": state("b")}, current=clean)


class Fake:
    """In the place of the child processes: notes which runs were started, and what each start ends with."""

    def __init__(self, root: Path, ends: dict[str, list[int]] | None = None) -> None:
        self.root, self.ends, self.started, self.pid = root, ends or {}, [], 1

    def __call__(self, command: list[str], **_: Any) -> "Fake":
        self.run = command[-1].removeprefix("--run=")
        self.started.append(self.run)
        return self

    def wait(self) -> int:
        code = self.ends[self.run].pop(0) if self.ends.get(self.run) else 0
        if code == 0:
            finish(self.root, self.run)
        if code >= 0:
            found = attempts.read(self.root / self.run)["attempts"]
            attempt(self.root, self.run, *(entry["exit_code"] for entry in found), code)
        return code


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Runs a study with made-up children; gives the exit code and the runs that were started."""

    def go(ends: dict[str, list[int]] | None = None, *, retries: int = 1, same_code: bool = False, **changes: Any) -> tuple[int, list[str]]:
        fake = Fake(tmp_path, ends)
        monkeypatch.setattr(resolution, "load", lambda spec: checks.check(study(**changes), file=spec))
        monkeypatch.setattr(runner.subprocess, "Popen", fake)
        monkeypatch.setattr(runner.describe, "git_state", lambda: {"commit": "a" * 40, "dirty": False})
        return runner.run("made.py", workdir=tmp_path, overrides={}, same_code=same_code, retries=retries), fake.started

    return go


def test_finished_runs_are_skipped_and_cut_ones_go_on(loop, tmp_path, capsys):
    code, started = loop({"high/seed0/pretrain": [75]})
    assert (code, started) == (75, ["low/seed0/pretrain", "high/seed0/pretrain"])
    code, started = loop()
    assert (code, started) == (0, ["high/seed0/pretrain", "low/seed1/pretrain", "high/seed1/pretrain"])
    assert "goes on after step" in capsys.readouterr().out
    assert loop() == (0, [])
    assert "4 of 4 runs finished." in capsys.readouterr().out


def test_what_failed_is_tried_again_at_the_end_up_to_a_limit(loop, capsys):
    code, started = loop({"low/seed0/pretrain": [1, 0], "high/seed0/pretrain": [1, 1, 1]})
    assert code == 1 and started == [
        "low/seed0/pretrain",
        "high/seed0/pretrain",
        "low/seed1/pretrain",
        "high/seed1/pretrain",
        "low/seed0/pretrain",
        "high/seed0/pretrain",
    ]
    assert "3 of 4 runs finished, 1 failed." in (told := capsys.readouterr().out) and "high/seed0/pretrain failed 2 times: it broke" in told
    assert loop() == (1, []), "not more often than that"
    assert loop(retries=2) == (0, ["high/seed0/pretrain"])


def test_what_is_refused_is_not_tried_again_at_once(loop):
    assert loop({"low/seed0/pretrain": [2, 2]}, retries=3)[1].count("low/seed0/pretrain") == 1


def test_interrupted_by_others(loop):
    """A run that ends with 75 though this process was not asked to stop ends the study with 75 too: whoever asked it meant the machine."""
    assert loop({"low/seed0/pretrain": [75]}) == (75, ["low/seed0/pretrain"])


def test_a_child_that_is_killed_is_noted(loop, tmp_path):
    code, started = loop({"low/seed0/pretrain": [-signal.SIGKILL, -signal.SIGKILL]}, seeds=(0,), stages=TUNED)
    assert code == 1 and started.count("low/seed0/pretrain") == 2 and "low/seed0/tune" not in started and "high/seed0/tune" in started
    state = folder.state(tmp_path, "low/seed0/pretrain")
    assert [(one["exit_code"], one["error"]) for one in state.attempts] == [(137, "ended by SIGKILL")] * 2
    assert folder.state(tmp_path, "low/seed0/tune").name == "waiting"


def test_a_run_of_another_process_is_waited_for(loop, tmp_path, monkeypatch, capsys):
    """The runner takes what is left, and goes on with the other one when its process is gone."""
    loop({"low/seed0/pretrain": [75]})
    elsewhere(tmp_path, "low/seed0/pretrain")
    monkeypatch.setattr(runner.time, "sleep", lambda _: os.utime(tmp_path / "low/seed0/pretrain" / lock.ALIVE, (0, 0)))
    code, started = loop()
    assert (code, started) == (0, ["high/seed0/pretrain", "low/seed1/pretrain", "high/seed1/pretrain", "low/seed0/pretrain"])
    assert "Waiting for low/seed0/pretrain: another process is at work there." in capsys.readouterr().out


def test_a_signal_during_the_last_run_that_still_ends(loop):
    """Nothing is left: that is no interruption. Before the last one it is, and nothing more is started."""

    class Signalled(Fake):
        def wait(self) -> int:
            if self.run == last:
                signal.raise_signal(signal.SIGTERM)
            return super().wait()

        def send_signal(self, number: int) -> None:
            self.passed = number

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Fake", Signalled)
        last = "high/seed0/pretrain"
        assert loop() == (75, ["low/seed0/pretrain", "high/seed0/pretrain"])
        last = "high/seed1/pretrain"
        assert loop() == (0, ["low/seed1/pretrain", "high/seed1/pretrain"])


def test_a_run_that_another_runner_has_claimed_is_left_alone(loop, tmp_path, monkeypatch):
    """Between its start and its lock a run looks ready; a claim tells."""
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(attempts.claimed(tmp_path / "low/seed0/pretrain"))
        monkeypatch.setattr(runner.time, "sleep", lambda _: stack.close())
        code, started = loop()
    assert (code, started) == (0, ["high/seed0/pretrain", "low/seed1/pretrain", "high/seed1/pretrain", "low/seed0/pretrain"])
    with attempts.claimed(tmp_path / "x") as first, attempts.claimed(tmp_path / "x") as second:
        assert (first, second) == (True, False)


def test_a_process_that_finds_its_run_taken_is_no_interruption(loop, tmp_path):
    """A launcher's process may have the run: its child ends with 75 and notes nothing, and the study goes on."""

    class Taken(Fake):
        def wait(self) -> int:
            if self.started == ["low/seed0/pretrain"]:
                return 75
            return super().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Fake", Taken)
        code, started = loop()
    assert code == 0 and started[:2] == ["low/seed0/pretrain"] * 2


def test_a_workdir_of_another_config_is_refused(loop, tmp_path):
    loop({"low/seed0/pretrain": [75]})
    begin(tmp_path, "high/seed0/pretrain")
    path = tmp_path / "high/seed0/pretrain/config.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.02', '"learning_rate": 0.5'))
    assert "high/seed0/pretrain holds a run of another config" in (told := refusal(loop)) and "optimizer.learning_rate: 0.5 -> 0.02" in told


def test_a_mix_of_versions_is_warned_of_or_refused(loop, tmp_path, capsys):
    loop({"low/seed0/pretrain": [75]})
    found = attempts.read(tmp_path / "low/seed0/pretrain")["attempts"]
    attempts.write(tmp_path / "low/seed0/pretrain", identity="x", attempts=[{**found[0], "git": {"commit": "b" * 40, "dirty": False}}])
    assert "different versions of the code" in refusal(loop, same_code=True)
    assert loop()[0] == 0 and "warning: the runs of this study are made by different versions of the code" in capsys.readouterr().err


def test_hopeless_arms_end_at_a_rung(loop, tmp_path):
    """Each run is started to the rung, then the better ones to their end."""
    arms = tuple(Arm(name, {"optimizer.learning_rate": rate}) for name, rate in (("low", 0.01), ("bad", 0.02), ("good", 0.03)))
    losses = {"low": 2.0, "bad": 3.0, "good": 1.0}
    options = {"arms": arms, "seeds": (0,), "halving": Halving(metric=LOSS, rungs=(7,), keep=1 / 3)}

    class Rungs(Fake):
        def wait(self) -> int:
            until = halving.limit(tmp_path, folder.read(tmp_path), self.run)
            if until is None:
                return super().wait()
            rows(tmp_path, self.run, {until: {"validation/loss": losses[self.run.partition("/")[0]]}})
            (tmp_path / self.run / "ckpt" / str(until)).mkdir(parents=True)
            attempt(tmp_path, self.run, 0)
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Fake", Rungs)
        code, started = loop(**options)
    assert code == 0 and started == [f"{arm}/seed0/pretrain" for arm in ("low", "bad", "good", "low", "good")]
    assert folder.state(tmp_path, "bad/seed0/pretrain").name == "stopped"
