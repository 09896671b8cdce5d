"""Rows on disk, truncation on resume, trackers, progress, step time, throughput and compile events."""

import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from ptm import log
from ptm.fields import ConfigError


def test_rows_are_strict_json_in_a_fixed_order_and_exact():
    third = np.float32(1) / np.float32(3)
    line = log.row(7, {"loss": third, "accuracy": jnp.float32(0.5), "rows": np.int64(3), "bad": float("nan"), "worse": -np.inf})
    assert list(json.loads(line, parse_constant=pytest.fail)) == ["step", "accuracy", "bad", "loss", "rows", "worse"]
    assert np.float32(json.loads(line)["loss"]) == third and '"loss": 0.3333333432674408' in line
    assert '"rows": 3' in line and '"bad": "nan"' in line and '"worse": "-inf"' in line


def test_log_writes_and_reads_back(tmp_path):
    with log.Log(str(tmp_path / "run")) as rows:
        rows.metrics(10, {"loss": 2.5, "norm": float("inf")})
        rows.timing(10, {"step_time": 0.1})
    assert log.read(str(tmp_path / "run" / log.METRICS)) == [{"step": 10, "loss": 2.5, "norm": float("inf")}]
    (timing,) = log.read(str(tmp_path / "run" / log.TIMING))
    assert timing["step_time"] == 0.1 and timing["time"] > 1.6e9
    assert "time" not in (tmp_path / "run" / log.METRICS).read_text()
    rows.close()
    assert log.read(str(tmp_path / "nothing")) == []


def test_equal_runs_write_equal_metrics(tmp_path):
    for name in "ab":
        with log.Log(str(tmp_path / name)) as rows:
            rows.metrics(1, {"b": np.float32(0.1), "a": 1e-45})
    assert (tmp_path / "a" / log.METRICS).read_bytes() == (tmp_path / "b" / log.METRICS).read_bytes() != b""


def test_flush_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(log.os, "fsync", synced.append)
    rows = log.Log(str(tmp_path))
    rows.metrics(1, {"loss": 1.0})
    assert not synced
    rows.flush()
    assert len(synced) == 1  # of the one that is there
    assert len(log.read(str(tmp_path / log.METRICS))) == 1
    rows.close()


def test_resume_drops_later_and_torn_rows_and_keeps_the_bytes(tmp_path):
    path = tmp_path / log.METRICS
    kept = '{"step": 10, "loss": 0.1000}\n{"step": 10, "validation/loss": "nan"}\n'
    path.write_text(kept + '{"step": 11, "loss": 1.0}\n{"step": 10, "lo')
    assert [cells["step"] for cells in log.read(str(path))] == [10, 10, 11]
    log.truncate(str(path), 10)
    assert path.read_text() == kept
    with log.Log(str(tmp_path), resume_step=10) as rows:
        rows.metrics(11, {"loss": 0.5})
    assert path.read_text() == kept + '{"step": 11, "loss": 0.5}\n'
    log.Log(str(tmp_path)).close()
    assert path.read_text() == ""


def test_lines_end_alike_for_all_who_read_them(tmp_path):
    """A carriage return ends no line: it stands within one that was damaged, or before the end of one that an editor saved."""
    path = tmp_path / "metrics.jsonl"
    for content, steps in ((b'{"step": 1}\n{\r"step": 2}\n', [1, 2]), (b'{"step": 1}\r\n{"step": 2}\r\0\n', [1]), (b'{"step": 1}\r{"step": 2}\n', [])):
        path.write_bytes(content)
        assert [row["step"] for row in log.read(str(path))] == steps and log.last_step(str(path)) == (steps[-1] if steps else None)
        log.truncate(str(path), 5)
        assert [row["step"] for row in log.read(str(path))] == steps


def test_a_torn_row_does_not_swallow_the_next(tmp_path):
    path = tmp_path / log.METRICS
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')  # complete but for its end: not known to be whole
    with log.Log(str(tmp_path), resume_step=5) as rows:
        rows.metrics(6, {"loss": 0.5})
    assert [cells["step"] for cells in log.read(str(path))] == [1, 6]


def test_other_processes_write_nothing(tmp_path):
    with log.Log(str(tmp_path / "run"), writers=("tensorboard",), primary=False) as rows:
        rows.metrics(1, {"loss": 1.0})
        rows.flush()
    assert not (tmp_path / "run").exists()


def events(folder) -> list[Event]:
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder) -> list[tuple[str, int, float]]:
    return [(value.tag, event.step, value.simple_value) for event in events(folder) for value in event.summary.value]


def test_tensorboard_gets_all_rows(tmp_path):
    with log.Log(str(tmp_path), writers=("tensorboard",)) as rows:
        rows.metrics(3, {"loss": 0.5})
        rows.timing(3, {"step_time": 0.25})
    assert scalars(tmp_path / "tb") == [("loss", 3, 0.5), ("timing/step_time", 3, 0.25)]
    with log.Log(str(tmp_path), writers=("tensorboard",), resume_step=3) as rows:
        rows.metrics(4, {"loss": 0.25})
    assert ("loss", 3, 0.5) in scalars(tmp_path / "tb") and ("loss", 4, 0.25) in scalars(tmp_path / "tb")
    assert [event.step for event in events(tmp_path / "tb") if event.HasField("session_log")] == [4]  # readers purge steps from there on
    log.Log(str(tmp_path), writers=("tensorboard",)).close()
    assert scalars(tmp_path / "tb") == []


@pytest.mark.parametrize(("name", "extra"), [("wandb", r"ptm\[wandb\]"), ("trackio", r"ptm\[trackio\]"), ("tensorboard", "tensorboardX")])
def test_a_missing_package_names_what_to_install_and_costs_no_rows(tmp_path, monkeypatch, name, extra):
    (tmp_path / log.METRICS).write_text('{"step": 1}\n')
    monkeypatch.setitem(sys.modules, "tensorboardX" if name == "tensorboard" else name, None)
    with pytest.raises(ConfigError, match=f"log.writers: '{name}' needs .*pip install '{extra}'"):
        log.Log(str(tmp_path), writers=(name,))
    assert (tmp_path / log.METRICS).read_text() == '{"step": 1}\n'


def test_an_unknown_writer_names_the_known(tmp_path):
    with pytest.raises(ConfigError, match="unknown log.writers 'tensorbord'.*Did you mean 'tensorboard'"):
        log.Log(str(tmp_path), writers=("tensorbord",))


class FakeRun:
    def __init__(self):
        self.rows, self.finished = [], False

    def define_metric(self, *_, **__):
        pass

    def log(self, values, step=None):
        self.rows.append((values, step))

    def finish(self):
        self.finished = True


def test_wandb_and_trackio_get_rows_and_find_their_run_again(tmp_path, monkeypatch):
    run, calls = FakeRun(), {}
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=lambda name_=name, **keys: calls.setdefault(name_, []).append(keys) or run))
    workdir = str(tmp_path / "my-run")
    for resume_step in (None, 1, None):
        with log.Log(workdir, writers=("wandb", "trackio"), resume_step=resume_step, config={"seed": 1}) as rows:
            rows.metrics(2, {"loss": np.float32(0.5)})
    assert run.rows[:2] == [({"step": 2, "loss": 0.5}, None), ({"loss": 0.5}, 2)] and run.finished
    first, second, third = (call["id"] for call in calls["wandb"])
    assert first == second != third
    assert all(call["name"] == "my-run" and call["config"] == {"seed": 1} for call in (*calls["wandb"], *calls["trackio"]))
    assert [call["resume"] for call in calls["trackio"]] == ["never", "allow", "never"]


def test_durations_and_counts():
    said = {0.0123: "12 ms", 12.34: "12.3 s", 59.99: "1m 00s", 185: "3m 05s", 3599.7: "1h 00m", 7620: "2h 07m", 356_400: "4d 03h"}
    assert {seconds: log.duration(seconds) for seconds in said} == said
    said = {0: "0", 999: "999", 12.5: "12.5", 1234: "1.23k", 999_600: "1M", 45_600_000: "45.6M", 1.3e12: "1.3T", 2e15: "2P"}
    assert {number: log.count(number) for number in said} == said


def test_progress_line():
    line = log.progress_line(250, steps=1000, loss=3.21456, tokens_per_second=45_230, seconds_left=75)
    assert line == "step 250/1,000 (25 %)  loss 3.2146  45.2k tokens/s  1m 15s left"
    assert log.progress_line(1, steps=4) == "step 1/4 (25 %)"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_writes_few_plain_lines_when_not_on_a_terminal():
    now, stream = [0.0], io.StringIO()
    progress = log.Progress(100, stream=stream, every=5.0, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 1.0
        progress.update(step, loss=1.0, step_time=1.0)
    progress.message("saved")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/100", "6/100", "11/100"]
    assert lines[-2].startswith("step 100/100") and lines[-1] == "saved" and len(lines) == 22
    assert "1m 39s left" in lines[0] and "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_progress_rewrites_its_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    now, stream = [0.0], Terminal()
    progress = log.Progress(3, stream=stream, clock=lambda: now[0])
    for step in (1, 2):
        progress.update(step, loss=1.0)
    progress.message("eval")
    progress.update(3, loss=1.0)
    progress.close()
    progress.close()
    text = stream.getvalue()
    assert "2/3" not in text and text.count("\n") == 2
    assert text == "\rstep 1/3 (33 %)  lo\x1b[K\r\x1b[Keval\n\rstep 3/3 (100 %)  l\x1b[K\n"
