"""Files that are replaced (ptm/atomic.py): whole, or as they were."""

import multiprocessing
import os

import pytest

from ptm import atomic


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "study.json"
    for content in ("first\n", "zweite Zeile: ä\r\n", ""):
        atomic.write(path, content)
        assert path.read_bytes() == content.encode() and os.listdir(tmp_path) == ["study.json"]


def test_a_block_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    atomic.write(path, "old\n")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as file:
        file.write("new\n" * 100_000)
        raise ZeroDivisionError
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_folder_that_is_gone_is_an_error_of_storage(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic.write(tmp_path / "gone" / "file", "")


def _killed(path):
    with atomic.replacing(path) as file:
        file.write("new\n" * 100_000)
        file.flush()
        os._exit(9)


def _writes(path, letter):
    for _ in range(50):
        atomic.write(path, letter * 5000)


def test_killed_in_the_middle_and_written_by_several(tmp_path):
    path = tmp_path / "run.json"
    atomic.write(path, "old\n")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_killed, args=(path,))] + [spawn.Process(target=_writes, args=(tmp_path / "both", letter)) for letter in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [9, 0, 0] and path.read_text() == "old\n"
    assert (tmp_path / "both").read_text() in ("a" * 5000, "b" * 5000)
