"""A disk that is full or cannot be written to: the run ends with the reason, loses nothing that was saved, and goes on when that is mended."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from ledger import tell

from ptm import cli
from ptm.checkpoint import Checkpoints

STEPS = 14


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert runs.run(runs.tiny("concat", text=text), workdir) == 0
    return workdir


class Disk:
    """A file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, "tmpfs", str(self.folder)], check=True, capture_output=True)

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True, capture_output=True)

    def fill(self) -> None:
        with contextlib.suppress(OSError), open(self.folder / "filled", "wb", buffering=0) as file:
            while True:
                file.write(bytes(512))

    def empty(self) -> None:
        (self.folder / "filled").unlink()


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    made.folder.mkdir()
    try:
        made.mount("-t", "tmpfs", "-o", "size=16m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here: needs root")
    yield made
    subprocess.run(["umount", "-l", str(made.folder)], check=True)


def train(workdir: Path, text: Path, capfd) -> tuple[int, str]:
    """The command, and what it says on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTM_TEST_TEXT", str(text))
        capfd.readouterr()
        code = cli.main(["train", f"--config={runs.__file__}:concat", f"--workdir={workdir}", "--config.mesh.data=1"])
    return code, capfd.readouterr().err


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """That of the run that nothing disturbs."""
    import jax

    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)


def refused(code: int, error: str) -> str:
    assert code == 1 and "Traceback" not in error, error
    (line,) = [line for line in error.splitlines() if line.startswith("ptm: ")]
    return line


@pytest.mark.faults
@pytest.mark.parametrize(("size", "kept"), [("300k", []), ("520k", [6])])
def test_a_disk_that_is_too_small(size, kept, text, whole, disk, capfd, record_property):
    """The save that does not fit is told; the one before it stays; with more room the run goes on as if nothing had happened."""
    tell(record_property, "3. disk full: a save that does not fit")
    disk.remount(f"size={size}")
    line = refused(*train(disk.folder / "run", text, capfd))
    assert "failed: No space left on device" in line and f"Steps that are there: {', '.join(map(str, kept)) or 'none'}." in line
    assert Checkpoints.reader(disk.folder / "run/ckpt").steps() == kept
    disk.remount("size=16m")
    assert train(disk.folder / "run", text, capfd)[0] == 0
    runs.assert_same(disk.folder / "run", whole, STEPS)


@pytest.mark.faults
def test_a_disk_that_is_full_in_the_middle(text, whole, disk, capfd, record_property):
    """After step 7, whatever is written next: a row of metrics, or a checkpoint."""
    tell(record_property, "3. disk full: in the middle of steps")
    workdir = disk.folder / "run"

    def fill() -> None:
        while not (workdir / "ckpt/6").is_dir():
            time.sleep(0.01)
        disk.fill()

    with runs.at_batch(8, fill):
        assert "No space left on device" in refused(*train(workdir, text, capfd))
    assert Checkpoints.reader(workdir / "ckpt").newest_valid() == 6
    disk.empty()
    assert train(workdir, text, capfd)[0] == 0
    runs.assert_same(workdir, whole, STEPS)


@pytest.mark.faults
def test_a_workdir_that_cannot_be_made(text, disk, capfd, record_property):
    tell(record_property, "3. a read-only disk")
    disk.remount("ro")
    assert "Read-only file system" in refused(*train(disk.folder / "run", text, capfd))
    assert not os.listdir(disk.folder)
