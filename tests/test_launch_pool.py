"""Tasks as processes of this machine (launch.local), and on slices of TPUs beside a gcloud that runs here (launch.tpu_pod): order, signals, failures, arguments."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch import local, pool, slurm, tpu_pod
from launch.job import Array, Job, Task, shell
from launch.progress import Live, Progress, progress
from ptm.fields import ConfigError

NASTY = (
    "", " ", "a b", "it's", '"', "$(touch pwned)", "`touch pwned`", "$HOME", "x;y", "*", "a\\b", "line\nline", "é", "#", "%A", "{a,b}", "--run=50 %/seed0/ft", "!"
)  # fmt: skip
SLICES = tpu_pod.Options(zone="z", type="v4-8", version="v")


def programs(folder: Path, **texts: str) -> None:
    """Shell scripts called by these names, in FOLDER/bin."""
    (folder / "bin").mkdir()
    for name, text in texts.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)


def tasks_of(tmp_path: Path, **lines: str) -> Job:
    """Tasks by name, each a line of shell; NAME__NEEDS needs another one."""
    made = []
    for key, line in lines.items():
        name, _, needs = key.partition("__")
        made.append(Task(name=name, command=("bash", "-c", line), stage="s", workdir=tmp_path / name, needs=needs or None))
    return Job(name="job", tasks=tuple(made), workdir=tmp_path, folder=tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(pool, "LOOK", 0.02)


def test_order_failures_and_what_needs_them(tmp_path, capsys):
    cores = sorted(os.sched_getaffinity(0))
    say = "python3 -S -c 'import os; print(sorted(os.sched_getaffinity(0)), os.environ.get(\"CUDA_VISIBLE_DEVICES\"))'"
    job = tasks_of(tmp_path, a=f"{say}; echo a >>order", b="exit 3", c__a="echo c >>order", d__b="echo d >>order", e__d="echo e >>order", f="echo f >>order")
    assert local.start(job, local.Options(devices=0, cores=1, parallel=1)) == 1
    assert (tmp_path / "order").read_text().split() == ["a", "c", "f"]
    out = capsys.readouterr().out
    assert (
        "job: 3 finished, 1 failed, 2 not started." in out
        and f"b failed: see {tmp_path}/launch/b.log" in out
        and "a: running on cores 0" in out.replace(str(cores[0]), "0", 1)
    )
    assert (tmp_path / "launch/a.log").read_text() == f"[{cores[0]}] {os.environ.get('CUDA_VISIBLE_DEVICES')}\n"


def test_seventy_five_is_started_again_and_failures_as_often_as_asked(tmp_path):
    count = "echo x >>{0}; [ $(wc -l <{0}) = 3 ]"
    job = tasks_of(tmp_path, a=f"{count.format('a.txt')} || exit 75", b=f"{count.format('b.txt')} || exit 1")
    assert local.start(job, local.Options(cores=1, devices=0, parallel=1, retries=1)) == 1
    assert (tmp_path / "a.txt").read_text() == "x\n" * 3 and (tmp_path / "b.txt").read_text() == "x\n" * 2
    assert local.start(tasks_of(tmp_path, b=f"{count.format('b.txt')} || exit 1"), local.Options(cores=1, devices=0, parallel=1)) == 0


def test_a_task_that_cannot_be_started_ends_no_other(tmp_path, capsys):
    job = tasks_of(tmp_path, a="echo a >>order", b="exit 0", c__b="echo c >>order", d="echo d >>order")
    tasks = tuple(dataclasses.replace(task, command=("/nowhere/ptm",)) if task.name == "b" else task for task in job.tasks)
    assert local.start(dataclasses.replace(job, tasks=tasks), local.Options(cores=1, devices=0, parallel=1)) == 1
    assert (tmp_path / "order").read_text().split() == ["a", "d"]
    out = capsys.readouterr().out
    assert "job: 2 finished, 1 failed, 1 not started." in out and "b failed: [Errno 2] No such file or directory: '/nowhere/ptm'" in out


def test_a_damaged_record_of_what_was_submitted(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/slurm.json").write_text("[{")
    with pytest.raises(ConfigError, match="slurm.json, what was submitted, is damaged"):
        slurm.show(tasks_of(tmp_path, a="true"), slurm.Options())


def after(path: Path, action: Any) -> threading.Thread:
    """Does something once a file is there."""

    def wait() -> None:
        until = time.monotonic() + 20
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_sigterm_is_passed_on(tmp_path, capsys):
    job = tasks_of(tmp_path, a="trap 'echo told; exit 75' TERM; touch there; while :; do sleep 0.02; done", b__a="touch b")
    watcher = after(tmp_path / "there", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert local.start(job, local.Options(cores=1, devices=0)) == 75
    watcher.join()
    assert (tmp_path / "launch/a.log").read_text() == "told\n" and not (tmp_path / "b").exists()
    assert "1 interrupted, 1 waiting" in capsys.readouterr().out


def test_a_second_signal_kills(tmp_path):
    job = tasks_of(tmp_path, a="trap 'touch told' TERM; touch there; while :; do sleep 0.02; done")
    watchers = [after(tmp_path / name, lambda: os.kill(os.getpid(), signal.SIGINT)) for name in ("there", "told")]
    assert local.start(job, local.Options(cores=1, devices=0)) == 75
    assert all(watcher.join() is None for watcher in watchers)


def test_one_at_a_workdir(tmp_path):
    job = tasks_of(tmp_path, a="touch there; while [ ! -e go ]; do sleep 0.02; done")
    errors: list[str] = []

    def second() -> None:
        try:
            local.start(job, local.Options(cores=1, devices=0))
        except ConfigError as error:
            errors.append(str(error))
        (tmp_path / "go").touch()

    watcher = after(tmp_path / "there", second)
    assert local.start(job, local.Options(cores=1, devices=0)) == 0
    watcher.join()
    assert len(errors) == 1 and "another launch.local works on" in errors[0]


# Progress.


def test_progress_of_a_run(tmp_path):
    assert progress(tmp_path) == Progress()
    (tmp_path / "config.json").write_text('{"train": {"steps": 20}}')
    (tmp_path / "timing.jsonl").write_text(
        "".join(f'{{"step": {n}, "tokens_per_second": {n}.5, "pad": "{"x" * 99}"}}\n' for n in range(99)) + '{"step": 99, "tok'
    )
    assert progress(tmp_path) == Progress(98, 20, 98.5)


def test_the_table_on_a_terminal_is_drawn_over():
    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    now, terminal = [0.0], Terminal()
    live = Live(terminal, clock=lambda: now[0])
    live.show({"a": ("running", "", "", "", ""), "b": ("waiting", "", "", "", "")})
    live.show({"a": ("running", "", "1 of 2", "", ""), "b": ("waiting", "", "", "", "")})
    assert terminal.text.count("running") == 1, "nothing has changed, and the last picture is fresh"
    now[0] = 5.0
    live.show({"a": ("running", "", "1 of 2", "", ""), "b": ("waiting", "", "", "", "")})
    assert "\x1b[3A\r" in terminal.text and terminal.text.count("\n") == 6 and "1 of 2" in terminal.text


# Slices of TPUs, beside a gcloud that runs here.

GCLOUD = r"""
echo "$@" >>"$HOME/calls"
case "$*" in
*" describe "*) [ -e "$HOME/state" ] && cat "$HOME/state" ;;
*" create "*) echo ACTIVE >"$HOME/state" ;;
*" delete "*) rm -f "$HOME/state" ;;
*" ssh "*) [ -e "$HOME/lost" ] && { rm "$HOME/lost" "$HOME/state"; exit 255; }
  for word; do last=$word; done; cd "$HOME"; bash -c "${last#--command=}" ;;
esac
"""


@pytest.fixture
def slices(tmp_path, monkeypatch) -> tpu_pod.Options:
    programs(tmp_path, gcloud=GCLOUD)
    for name, value in {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PTM_LAUNCH_PAUSE": "0.01"}.items():
        monkeypatch.setenv(name, value)
    return dataclasses.replace(SLICES, logs=str(tmp_path / "logs"))


def test_a_slice_is_asked_for_used_and_given_back(slices, tmp_path):
    assert tpu_pod.start(tasks_of(tmp_path, a="echo hello from $PWD; touch done", b__a="exit 0"), slices) == 0
    assert f"hello from {tmp_path}\n" in (tmp_path / "logs/a.log").read_text() and not (tmp_path / "state").exists()
    calls = (tmp_path / "calls").read_text()
    assert calls.count(" create ") == 1 and calls.count(" ssh ") == 2 and calls.count(" delete ") == 1


def test_a_lost_slice_is_asked_for_again_and_75_goes_on(slices, tmp_path):
    (tmp_path / "lost").touch()
    job = tasks_of(tmp_path, a="echo x >>tries; [ $(wc -l <tries) = 2 ] || exit 75")
    assert tpu_pod.start(job, slices) == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count(" create ") == 2 and calls.count(" ssh ") == 3 and (tmp_path / "tries").read_text() == "x\nx\n"


def test_a_failure_on_a_slice_is_one(slices, tmp_path):
    assert tpu_pod.start(tasks_of(tmp_path, a="exit 2", b__a="touch b"), slices) == 1
    assert not (tmp_path / "b").exists()


def test_sigterm_reaches_the_workers(slices, tmp_path):
    job = tasks_of(tmp_path, a="trap 'touch told; exit 75' TERM; touch there; while :; do sleep 0.02; done")
    watcher = after(tmp_path / "there", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert tpu_pod.start(job, slices) == 75
    watcher.join()
    assert (tmp_path / "told").exists()


def test_arguments_reach_a_command_as_they_are(tmp_path):
    """Through the batch script of an array and the script of a slice, which shells read up to three times."""
    seen = tmp_path / "seen.py"
    seen.write_text("import sys, json; json.dump(sys.argv[1:], open(sys.argv[1], 'w'))")
    out = tmp_path / "it's $HOME.json"
    task = Task(name="a", command=(sys.executable, "-S", str(seen), str(out), *NASTY), stage="s", workdir=tmp_path)
    job = Job(name="j", tasks=(task,), workdir=tmp_path, folder=tmp_path)
    programs(tmp_path, srun='while [[ "$1" == --* ]]; do shift; done; "$@"', gcloud=GCLOUD)
    job.launch.mkdir()
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "PTM_LAUNCH_PAUSE": "0.01"}
    text = tpu_pod.script(dataclasses.replace(SLICES, folder=str(tmp_path)), "slice", task)
    for script, more in ((slurm.script(job, slurm.Options(), Array("s", {3: task})), {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "1"}), (text, {})):
        subprocess.run(["bash", "-c", script], env=env | more, cwd=tmp_path, check=True, timeout=20, stdout=subprocess.DEVNULL)
        assert json.loads(out.read_text()) == [str(out), *NASTY]
        out.unlink()
    assert not list(tmp_path.rglob("pwned")) and shlex.split(shell(NASTY)) == list(NASTY)
