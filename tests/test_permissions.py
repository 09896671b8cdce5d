"""Folders that may not be written to, for a child that is not root (root ignores modes): one line with the reason, an exit code, and what was saved stays as it was."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs

from ptm.checkpoint import Checkpoints

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to drop its user id")]
NOBODY = 65534
# The child keeps the right to read everything, since the interpreter may lie in a folder of root's, and none to write.
DROP = f"""
import ctypes, os, sys
libc, read = ctypes.CDLL(None), 1 << 2
assert libc.prctl(8, 1, 0, 0, 0) == 0, "PR_SET_KEEPCAPS"
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(read, read, 0, 0, 0, 0)) == 0, "CAP_DAC_READ_SEARCH"
from ptm import cli
sys.exit(cli.main(sys.argv[1:]))
"""


class Stranger:
    """Commands under another user id, and a folder that belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._env = os.environ | {
            "JAX_NUM_CPU_DEVICES": "1",
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PTM_TEST_TEXT": str(folder / "corpus.txt"),
        }
        self._env["PYTHONPATH"] = str(Path(__file__).parent.parent)

    def ptm(self, *words: str) -> tuple[int, str]:
        """The exit code of a command, and what it says of why."""
        done = subprocess.run([sys.executable, "-c", DROP, *words], env=self._env, cwd=self.folder, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.returncode, "\n".join(line for line in done.stderr.splitlines() if line.startswith("ptm: "))

    def train(self, workdir: Path, steps: int) -> tuple[int, str]:
        return self.ptm("train", f"--config={runs.__file__}:concat", f"--workdir={workdir}", f"--config.train.steps={steps}", "--config.schedule.name=constant")


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, NOBODY, NOBODY)
    runs.corpus(folder / "corpus.txt")
    os.chmod(folder / "corpus.txt", 0o644)
    yield Stranger(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def begun(stranger) -> Path:
    """A run of six steps, with a checkpoint of the last one."""
    workdir = stranger.folder / "begun"
    assert stranger.train(workdir, 6)[0] == 0
    return workdir


def taken(workdir: Path, target: Path, place: str) -> Path:
    """A copy of a run in which a place belongs to root."""
    shutil.copytree(workdir, target, symlinks=True)
    for path in (target, *target.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.chown(target / place, 0, 0)
    os.chmod(target / place, 0o755)
    return target


@pytest.mark.parametrize("place", ["ckpt", ".", "metrics.jsonl"])
def test_a_run_that_cannot_write_says_so(place, stranger, begun, record_property):
    workdir = taken(begun, stranger.folder / f"run-{place.strip('.')}", place)
    if place == "metrics.jsonl":
        os.chmod(workdir, 0o1777)  # as in a shared folder: what belongs to others cannot be replaced
        os.chown(workdir, 0, 0)
    code, told = stranger.train(workdir, 14)
    assert code == 1 and "ermi" in told and told.count("\n") == 0, (code, told)
    reader = Checkpoints.reader(workdir / "ckpt")
    assert reader.newest_valid() == 6 and [path.name for path in (workdir / "ckpt").iterdir() if "damaged" in path.name] == []
    for path in (workdir, *workdir.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.chmod(workdir, 0o755)
    assert stranger.train(workdir, 14)[0] == 0, "with the permission it goes on"
    assert Checkpoints.reader(workdir / "ckpt").newest_valid() == 14
    for name, value in (("fault", f"3. permission denied: {place} of a run"), ("tried", 1), ("lost", 0)):
        record_property(name, value)


def test_predictions_that_cannot_be_written_are_told(stranger, begun, record_property):
    closed = stranger.folder / "closed"
    closed.mkdir(mode=0o755)
    for place in (closed / "x.jsonl", closed / "new" / "x.jsonl"):
        code, told = stranger.ptm("evaluate", f"--workdir={begun}", "--evals=perplexity", f"--predictions={place}")
        assert code == 2 and "Permission denied" in told and told.count("\n") == 0, (code, told)
    assert not list(closed.iterdir())
    code, told = stranger.train(closed / "run", 6)
    assert code == 1 and "ermi" in told and told.count("\n") == 0 and not list(closed.iterdir()), (code, told)
    for name, value in (("fault", "3. permission denied: predictions, a new workdir"), ("tried", 3), ("lost", 0)):
        record_property(name, value)
