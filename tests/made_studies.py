"""Studies of two arms on the recipes of tests/runs.py, resolved into folders, and runs of them that look begun, finished or failed without having been run."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from ptm import lock, log
from ptm.fields import ConfigError
from ptm.study import Arm, Metric, Stage, Study, attempts, checks, folder, identity, resolution

TESTS = Path(__file__).resolve().parent
LOSS = "pretrain:validation/loss"


def study(**changes: Any) -> Study:
    """Two arms that differ in the rate of learning, two seeds; `changes` are fields."""
    fields = {
        "claim": "A higher rate is better.", "paper": "Nobody 2020, table 1", "stages": (Stage("pretrain", recipe=f"{TESTS}/runs.py:concat"),),
        "arms": (Arm("low"), Arm("high", {"optimizer.learning_rate": 0.02})), "base": "low", "differs": ("optimizer.*",), "seeds": (0, 1),
        "metrics": (Metric(LOSS, higher=False),),
    }  # fmt: skip
    return Study(**fields | changes)


TUNED = (Stage("pretrain", recipe=f"{TESTS}/runs.py:concat"), Stage("tune", recipe=f"{TESTS}/runs.py:window", after="pretrain", overrides={"train.steps": 4}))


def made(
    root: Path, *, overrides: dict[str, str] | None = None, write: bool = True, asked: dict | None = None, name: str = "made.py", **changes: Any
) -> folder.Record:
    """What `prepare` makes of a study in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolution, "load", lambda spec: checks.check(study(**changes), file=spec.partition(":")[0]))
        return resolution.prepare(name, workdir=root, overrides=overrides or {}, write=write, asked=asked)


def refusal(call: Any, *words: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*words, **options)
    return str(caught.value)


def begin(root: Path, run: str) -> None:
    """Lets a run look begun: its workdir holds the config of the study, as training writes it."""
    (root / run).mkdir(parents=True, exist_ok=True)
    (root / run / "config.json").write_text(json.dumps(identity.unflatten(folder.placed(root, run))))


def rows(root: Path, run: str, values: dict[int, dict[str, float]]) -> None:
    (root / run).mkdir(parents=True, exist_ok=True)
    (root / run / "metrics.jsonl").write_text("".join(log.row(step, cells) + "\n" for step, cells in values.items()))


def finish(root: Path, run: str, loss: float = 1.0) -> None:
    steps = folder.read(root).runs[run].steps
    begin(root, run)
    rows(root, run, {1: {"loss": 5.0}, steps: {"validation/loss": loss, "validation/tokens": 9.0}})
    (root / run / "ckpt" / str(steps)).mkdir(parents=True, exist_ok=True)


def attempt(root: Path, run: str, *codes: int | None) -> None:
    entries = [
        {"start": 10.0, "end": None if code is None else 20.0, "exit_code": code, "error": None if code in (None, 0, 75) else "it broke", "git": {}, "host": socket.gethostname(), "pid": 1}
        for code in codes
    ]  # fmt: skip
    attempts.write(root / run, identity="x", attempts=entries)


def elsewhere(root: Path, run: str, touched: float | None = None) -> None:
    """Lets a run look begun by a process of another host, which gave its last sign of life at `touched`, else now."""
    attempt(root, run, None)
    (root / run / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": 10.0}))
    (root / run / lock.ALIVE).touch()
    if touched is not None:
        os.utime(root / run / lock.ALIVE, (touched, touched))
