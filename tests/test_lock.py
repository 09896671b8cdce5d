"""Who has a folder: one process, until it ends, however it ends; and what other hosts see of it."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import runs
from ledger import tell

from ptm import lock

HOLD = """
import sys, time
from pathlib import Path
from ptm import lock

with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen]:
    """Another process that has a folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(lock, "TRIES", 2)
    monkeypatch.setattr(lock, "PATIENCE", 1.0)


def foreign(folder: Path) -> None:
    """A process of another host was at the folder, and did not say that it ended."""
    folder.mkdir()
    (folder / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": 0.0}))
    (folder / lock.ALIVE).touch()


@pytest.mark.parametrize("ending", ["kill", "end"])
def test_one_process_has_a_folder(ending, tmp_path, record_property):
    tell(record_property, "10. two runs in a workdir")
    with holder(tmp_path) as process:
        assert lock.held(tmp_path) and lock.owner(tmp_path)["pid"] == process.pid
        with pytest.raises(lock.Busy, match=f"is being run by process {process.pid} of {socket.gethostname()}, since 20"), lock.hold(tmp_path):
            pass
        assert lock.owner(tmp_path)["pid"] == process.pid, "who is refused changes nothing"
        process.kill() if ending == "kill" else process.stdin.close()
        process.wait()
        assert not lock.held(tmp_path) and (lock.owner(tmp_path) is None) == (ending == "end")
    with lock.hold(tmp_path):
        assert lock.owner(tmp_path)["pid"] == os.getpid()


def test_a_process_may_hold_what_it_has(tmp_path):
    with lock.hold(tmp_path / "a"):
        with lock.hold(tmp_path / "b/../a"):
            pass
        assert lock.held(tmp_path / "a")
    assert not lock.held(tmp_path / "a")


def test_another_host_is_taken_for_gone_by_its_silence(tmp_path, record_property):
    """Whatever its clock says."""
    tell(record_property, "10. stale locks")
    foreign(tmp_path / "a")
    os.utime(tmp_path / "a" / lock.ALIVE, (2e9, 2e9))
    told = []
    with lock.hold(tmp_path / "a", told.append):
        assert lock.owner(tmp_path / "a")["pid"] == os.getpid()
    assert "last run by process 7 of elsewhere: waiting up to 1 s" in told[0]


def test_another_host_that_lives(tmp_path, record_property):
    tell(record_property, "10. two runs in a workdir")
    foreign(tmp_path / "a")
    os.utime(tmp_path / "a" / lock.ALIVE, (1.0, 1.0))  # a clock that is wrong
    threading.Timer(0.3, lambda: os.utime(tmp_path / "a" / lock.ALIVE, (2.0, 2.0))).start()
    with pytest.raises(lock.Busy, match="process 7 of elsewhere"), lock.hold(tmp_path / "a"):
        pass
    assert lock.owner(tmp_path / "a")["host"] == "elsewhere"


def test_without_locks_signs_of_life_must_do(tmp_path, monkeypatch, record_property):
    """A file system that has none: another process of this host is noticed all the same."""
    tell(record_property, "10. two runs in a workdir")

    def refused(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    with lock.hold(tmp_path), monkeypatch.context() as patch:
        patch.setattr(lock, "_held", set())
        sign = threading.Timer(0.3, lambda: os.utime(tmp_path / lock.ALIVE, (2.0, 2.0)))
        sign.start()
        with pytest.raises(lock.Busy), lock.hold(tmp_path):
            pass
        sign.join()


def test_a_second_run_in_one_workdir_is_refused(tmp_path, record_property):
    tell(record_property, "10. two runs in a workdir")
    config = runs.tiny("concat", text=runs.corpus(tmp_path / "corpus.txt"))
    with holder(tmp_path / "run") as process:
        with pytest.raises(lock.Busy, match=f"run by process {process.pid} "):
            runs.run(config, tmp_path / "run")
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {lock.LOCK, lock.ALIVE}
    assert runs.run(config, tmp_path / "run") == 0
