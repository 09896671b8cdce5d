"""A run that hangs: the stacks say where, the run says so, and goes on or ends."""

import os
import subprocess
import sys
import time

import pytest
import runs
from ledger import tell

from ptm import watchdog
from ptm.sections import Train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def stuck_in_the_loader() -> None:
    time.sleep(4.0)


def test_a_step_that_hangs(text, tmp_path, capfd, record_property):
    """Told once, with the line that hangs; the run goes on as if nothing had happened."""
    tell(record_property, "11. a step that hangs")
    config = runs.tiny("concat", text=text, train__hang_seconds=1.0, train__hang_factor=2.0)
    with runs.at_batch(10, stuck_in_the_loader):
        assert runs.run(config, tmp_path / "hung") == 0
    told = capfd.readouterr().err
    assert told.count("A step has not ended for 1") == 1 and "(usually " in told and "A step has ended, after " in told
    stacks = (tmp_path / "hung/hang-0.txt").read_text()
    assert "in stuck_in_the_loader" in stacks and "in train\n" in stacks and "Thread" in stacks
    assert runs.run(runs.tiny("concat", text=text), tmp_path / "whole") == 0
    runs.assert_same(tmp_path / "hung", tmp_path / "whole", 14)
    assert not (tmp_path / "whole/hang-0.txt").exists()


HANGING = """
import sys, time
import runs
from ptm import cli

with runs.at_batch(10, lambda: time.sleep(300)):
    sys.exit(cli.main())
"""


def test_a_run_may_end_by_itself(text, tmp_path, record_property):
    """With the code after which launchers start it again."""
    tell(record_property, "11. a step that hangs")
    arguments = ["train", f"--config={runs.__file__}:concat", f"--workdir={tmp_path / 'run'}", "--config.train.hang_exit=True"]
    arguments += ["--config.train.hang_seconds=1", "--config.train.hang_factor=2"]
    env = os.environ | {"PTM_TEST_TEXT": str(text), "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(runs.__file__)])}
    ended = subprocess.run([sys.executable, "-c", HANGING, *arguments], capture_output=True, text=True, env=env, timeout=200)
    assert ended.returncode == 75 and "Ended by train.hang_exit; start the same command again" in ended.stderr, ended.stderr
    assert "in <lambda>" in (tmp_path / "run/hang-0.txt").read_text()
    assert runs.run(runs.tiny("concat", text=text), tmp_path / "run") == 0, "and then the run goes on, with other patience"


def test_limits():
    """What was never done has ten times the least; what is usually long has a multiple of that."""
    dog = watchdog.Watchdog(Train(hang_seconds=10.0, hang_factor=3.0))
    assert dog.limit("A step") == 100.0
    dog._usual["A step"].extend([1.0, 2.0, 50.0])
    dog._usual["A save"].extend([20.0, 30.0, 1.0])
    assert (dog.limit("A step"), dog.limit("A save")) == (10.0, 60.0)


def test_a_process_that_was_stopped_does_not_hang(tmp_path, monkeypatch, record_property):
    """Time in which nothing ran at all is not counted."""
    tell(record_property, "11. a machine that slept")
    told, clock = [], [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    options = Train(hang_seconds=10.0, hang_factor=1.0)
    dog = watchdog.Watchdog(options)
    dog._usual["A step"].append(1.0)
    dog.now("A step")

    class Event:
        jumps = iter([0.5, 0.5, 3600.0, 0.5])

        def wait(self, _: float) -> bool:
            clock[0] += (jump := next(self.jumps, 0.0))
            return jump == 0.0

    watchdog._watch(dog, options, tmp_path / "stacks", told.append, Event())
    assert not told
    Event.jumps = iter([0.5] * 30)
    watchdog._watch(dog, options, tmp_path / "stacks", told.append, Event())
    assert len(told) == 1
