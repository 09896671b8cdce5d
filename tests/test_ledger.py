"""The table of faults: what tests tell is added up, and a test that fails has lost what it tried."""

import subprocess
import sys
from pathlib import Path

from ledger import Told, table, text


def entry(fault: str, **values: int) -> list[tuple[str, object]]:
    return [("fault", fault), *values.items()]


def test_faults_are_added_up_in_their_order():
    tests = [Told(entry("10. locks", tried=2), True), Told([*entry("2. flipped", tried=5, lost=1), *entry("10. locks")], True), Told([("seconds", 3)], False)]
    rows = table(tests)
    assert rows == [("2. flipped", 5, 4, 1), ("10. locks", 3, 3, 0)]
    assert text(rows, markdown=True).splitlines()[-2:] == ["| 10. locks | 3 | 3 | 0 |", "| all | 8 | 7 | 1 |"]
    assert len({len(line) for line in text(rows).splitlines()}) == 1


def test_what_a_failed_test_tried_is_lost():
    assert table([Told(entry("1. SIGKILL", tried=6), False), Told(entry("1. SIGKILL", tried=4), True)]) == [("1. SIGKILL", 10, 4, 6)]


TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_one(number, record_property):
    record_property("fault", "3. made up")
    record_property("tried", 2)
    assert number < 2

def test_other(long):
    assert not long
"""


def test_the_summary_of_a_run_of_tests(tmp_path):
    """From processes of its own; --long makes what tells of faults one of them, and nothing else."""
    tests = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((tests / "conftest.py").read_text())
    (tmp_path / "test_made.py").write_text(TESTS)
    (tmp_path / "setup.cfg").write_text(f"[tool:pytest]\npythonpath = {tests}\nmarkers =\n    faults: x\n    runs: x\n")
    command = [sys.executable, "-m", "pytest", "-q", f"--ledger={tmp_path / 'ledger.md'}", str(tmp_path)]
    for words, counts in ((["-n", "1"], "1 failed, 3 passed"), (["-n", "0", "-m", "faults", "--long"], "1 failed, 2 passed, 1 deselected")):
        found = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode == 1 and counts in found.stdout, found.stdout + found.stderr
        assert ["3.", "made", "up", "6", "4", "2"] in [line.split() for line in found.stdout.splitlines()]
        assert "| 3. made up | 6 | 4 | 2 |" in (tmp_path / "ledger.md").read_text().splitlines()
