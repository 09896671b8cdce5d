"""What hands and clocks do to a workdir: checkpoints that are deleted, and time that goes back."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import runs
from ledger import tell

from ptm import describe, lock
from ptm.checkpoint import Checkpoints
from ptm.specs import open_spec
from ptm.study import summary
from ptm.study.folder import State

STEPS = 14
# The best is the first one, so that what is kept for being the best is not what is kept for being new.
CHANGES = {"checkpoint__every": 3, "checkpoint__keep_latest": 2, "checkpoint__keep_best": 1, "checkpoint__mode": "max", "evals__validation__every": 3}
BEST, EARLIER, NEWEST = 3, 9, 11


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def config(text):
    return runs.tiny("concat", text=text, **CHANGES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert runs.run(config, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, config) -> Path:
    """A run that was stopped after step 11."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with runs.at_batch(NEWEST, runs.stop):
        assert runs.run(config, workdir) == 75
    assert Checkpoints.reader(workdir / "ckpt").steps() == [BEST, EARLIER, NEWEST]
    return workdir


@pytest.mark.faults
@pytest.mark.parametrize(
    ("deleted", "goes_on"), [([NEWEST], EARLIER), ([EARLIER], NEWEST), ([BEST], NEWEST), ([EARLIER, NEWEST], BEST), ([BEST, EARLIER, NEWEST], 0)]
)
def test_a_checkpoint_that_was_deleted(deleted, goes_on, config, stopped, whole, tmp_path, record_property):
    """The run goes on from the newest that is there, and ends as if nothing had happened; the best is one that is there."""
    tell(record_property, "10. checkpoints deleted by hand")
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    for step in deleted:
        shutil.rmtree(workdir / "ckpt" / str(step))
    assert runs.run(config, workdir) == 0
    assert describe.history(workdir)[-1]["from_step"] == goes_on
    runs.assert_same(workdir, whole, STEPS)
    _, (best,), _ = open_spec(f"ckpt:{workdir}@best")
    assert best in Checkpoints.reader(workdir / "ckpt").steps() and (best == BEST) == (BEST not in deleted or goes_on == 0)


@pytest.mark.faults
@pytest.mark.parametrize("step", [BEST, 6, EARLIER])
def test_a_checkpoint_that_is_deleted_while_the_run_is_on(step, config, whole, tmp_path, record_property):
    tell(record_property, "10. checkpoints deleted by hand")

    def delete() -> None:
        while not (tmp_path / "ckpt" / str(step)).is_dir():
            time.sleep(0.01)
        shutil.rmtree(tmp_path / "ckpt" / str(step))

    with runs.at_batch(11, delete):
        assert runs.run(config, tmp_path) == 0
    runs.assert_same(tmp_path, whole, STEPS)


@pytest.mark.faults
def test_a_clock_that_is_set_back(config, stopped, whole, tmp_path, monkeypatch, record_property):
    """By an hour at every look at it; what the workdir holds is from the future. Nothing is refused, nothing differs, no figure is negative."""
    tell(record_property, "10. the clock set back", tried=2)
    now = 2e9

    def back() -> float:
        nonlocal now
        now -= 3600
        return now

    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    for path in workdir.rglob("*"):
        os.utime(path, (4e9, 4e9))
    for folder in (tmp_path / "new", workdir):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", back)
            assert runs.run(config, folder) == 0
        runs.assert_same(folder, whole, STEPS)
        rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
        assert all(value >= 0 for row in rows for value in row.values() if value not in ("nan", "inf"))
    assert describe.history(workdir)[-1]["from_step"] == NEWEST


def test_a_clock_that_is_set_back_in_a_study(tmp_path, record_property):
    """A host that is gone is not taken for alive because its last sign of life is from the future, and no time is negative."""
    tell(record_property, "10. the clock set back")
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": 4e9}))
    (tmp_path / lock.ALIVE).touch()
    assert lock.held(tmp_path)
    os.utime(tmp_path / lock.ALIVE, (4e9, 4e9))
    assert not lock.held(tmp_path)
    attempts = [{"start": 100.0, "end": 160.0}, {"start": 4e9, "end": 200.0}, {"start": 200.0, "end": None}]
    assert summary._seconds(State("finished", 3, attempts, None)) == 60.0
