"""One of several processes is gone, hangs or is slow: the others end with one line and are started again, or say which it is."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import runs
from ledger import tell
from test_hosts import LIMIT, STEPS, WORDS, alone, finish, silent, start, train

pytestmark = pytest.mark.hosts
HEARTBEAT = 10  # seconds

# A recipe in which a process sends itself a signal at its seventh batch, when one checkpoint is there and the next is being written, or is slow to make batches.
FAULTY = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import runs
from ptm.data.loader import Loader

victim, fault = os.environ.get("PTM_TEST_LOST", "none none").split()
original, taken = Loader.__next__, 0

def next_batch(self):
    global taken
    taken += 1
    if fault == "slow":
        time.sleep(0.3)
    elif taken == 7:
        Path(os.environ["PTM_TEST_AT"]).touch()
        os.kill(os.getpid(), signal.Signals[fault])
    return original(self)

if f"--process={{victim}}" in sys.argv:
    Loader.__next__ = next_batch

def get_config(argument):
    return runs.tiny(argument, text=Path(os.environ["PTM_TEST_TEXT"]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "faulty.py"
    path.write_text(FAULTY.format(tests=os.path.dirname(runs.__file__)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """processes -> workdir of an uninterrupted run of a device each, made once."""
    made: dict[int, Path] = {}

    def of(processes: int) -> Path:
        if processes not in made:
            workdir = tmp_path_factory.mktemp("whole") / str(processes)
            if processes == 2:  # the sum of two numbers has one order
                alone("concat", workdir, text, devices=2)
            else:
                assert [one.code for one in train("concat", workdir, text, processes=processes)] == [0] * processes
            made[processes] = workdir
        return made[processes]

    return of


SOON = [(2, 1, "SIGKILL"), (2, 0, "SIGSTOP")]
LATE = [(2, 0, "SIGKILL"), (2, 1, "SIGSTOP"), (4, 0, "SIGKILL"), (4, 3, "SIGKILL"), (4, 0, "SIGSTOP"), (4, 2, "SIGSTOP")]


@pytest.mark.parametrize(("processes", "victim", "fault"), [*SOON, *(pytest.param(*case, marks=pytest.mark.slow) for case in LATE)])
def test_a_process_that_is_lost(processes, victim, fault, text, recipe, whole, tmp_path, record_property):
    """The others end within the limit with the code after which launchers start them again; then the run ends as if nothing had happened."""
    tell(record_property, f"8. {processes} processes: one {'is killed' if fault == 'SIGKILL' else 'hangs'}")
    workdir, logs, at = tmp_path / "run", tmp_path / "log", tmp_path / "at"
    command = ("train", f"--config={recipe}:concat", f"--workdir={workdir}", *WORDS, f"--heartbeat={HEARTBEAT}")
    children = start(logs, *command, processes=processes, devices=1, PTM_TEST_TEXT=str(text), PTM_TEST_LOST=f"{victim} {fault}", PTM_TEST_AT=str(at))
    others = [child for number, child in enumerate(children) if number != victim]
    until = time.monotonic() + LIMIT
    while any(child.poll() is None for child in others) and time.monotonic() < until:
        time.sleep(0.05)
    seconds = time.time() - at.stat().st_mtime if at.exists() else 0.0
    children[victim].kill()  # one that hangs never ends by itself
    ended = finish(children, logs)
    assert ended[victim].code == -signal.SIGKILL and [one.code for number, one in enumerate(ended) if number != victim] == [75] * (processes - 1), ended
    assert 0.0 < seconds < HEARTBEAT + 10, "a second is for looking, the others are for a busy machine"
    for number, one in enumerate(ended):
        if number == victim or victim and number:
            continue  # process 0 alone says it, where it is there
        (line,) = [line for line in one.err.splitlines() if line.startswith("ptm: ")]
        assert line.startswith(f"ptm: process {victim}") and "Start the same command again" in line and "Traceback" not in one.err, ended
    ended = train("concat", workdir, text, processes=processes)
    assert [one.code for one in ended] == [0] * processes and any(f"from step {step} of {STEPS}" in ended[0].err for step in (3, 6)), ended
    runs.assert_same(workdir, whole(processes), STEPS)


def test_a_process_that_is_slow_is_named(text, recipe, whole, tmp_path, record_property):
    """Once, and with its clocks in timing.jsonl; the run is the same."""
    tell(record_property, "8. 2 processes: one is slow")
    ended = train("concat", tmp_path / "run", text, processes=2, recipe=str(recipe), PTM_TEST_LOST="1 slow")
    assert [one.code for one in ended] == [0, 0] and silent(ended[1]), ended
    assert ended[0].err.count(f"Process 1 ({socket.gethostname()}) keeps the others waiting: its host takes 3") == 1, ended
    rows = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    last = [row for row in rows if "slowest_process" in row][-1]
    assert last["slowest_process"] == 1 and last["slowest_host_seconds"] > 0.3 > last["host_seconds"]
    runs.assert_same(tmp_path / "run", whole(2), STEPS)
