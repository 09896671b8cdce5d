"""Tiny runs that the tests of training share; also their recipe for child processes: `--config=tests/runs.py:KIND`."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import ml_collections
import numpy as np

from ptm import config, describe, registry, train
from ptm.checkpoint import Checkpoints
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.loader import Loader
from ptm.evals import loss
from ptm.models import bert, gpt, t5, xlnet
from ptm.objectives import causal, mlm, permutation, span_corruption

SHAPE = {"num_layers": 2, "width": 16, "num_heads": 2, "vocab_size": 272, "dropout": 0.1}
WORDS = ("the", "of", "a", "word", "under", "which", "every", "small", "model", "must", "learn", "to", "guess", "more", "text", "than", "it", "has", "seen")


def corpus(path: Path, *, documents: int = 160, seed: int = 0) -> Path:
    """A text file of `documents` lines of 1 to 12 words."""
    rng = random.Random(seed)
    path.write_text("".join(" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + "\n" for _ in range(documents)), encoding="utf-8")
    return path


def tiny(kind: str, *, text: Path, **changes: Any) -> ml_collections.ConfigDict:
    """A config of seconds. Kinds: concat and window (GPT), mlm (BERT, first-fit), memory (XLNet, concat), spans (T5, paired first-fit).

    All have dropout, two microbatches, moving averages and a window for spikes, so that resuming has something to lose. `changes` are
    section__key=value.
    """
    data = {"source": (f"text:{text}",), "length": 16, "streams": 4, "packing_bins": 4}
    if kind in ("concat", "window"):
        model, objective = gpt.Config(**SHAPE, max_length=16, attention_dropout=0.0), causal.Config()
        data |= {"packing": "window", "document": "file", "holdout_by": "tail"} if kind == "window" else {}
    elif kind == "mlm":
        model, objective = bert.BertConfig(**SHAPE, max_length=48, attention_dropout=0.0), mlm.Config()
        data |= {"packing": "first_fit", "length": 48}
    elif kind == "memory":
        model, objective = xlnet.Config(**SHAPE, attention_dropout=0.0), permutation.Config(memory_length=12, partial=3)
        data |= {"streams": None}
    else:
        model = t5.Config(**SHAPE, head_dim=8, mlp_width=32, num_buckets=8, max_distance=20)
        objective = span_corruption.Config(input_length=64)
        data |= {"length": 24}
    cfg = config.base(
        model=model,
        objective=objective,
        evals={"validation": loss.Config(every=7)},
        train=Train(steps=14, batch_size=16, microbatches=2, ema_decay=0.9, skip_sigma=50.0, skip_window=4),
        data=Data(**data),
        tokenizer=Tokenizer(kind="bytes", sentinels=8 if kind == "spans" else 0),
        optimizer=Optimizer(learning_rate=1e-2),
        schedule=Schedule(name="constant", warmup_steps=1),
        checkpoint=Checkpoint(every=6, keep_latest=3),
        log=Log(every=2, writers=(), norms=True),
    )
    for key, value in changes.items():
        text_of = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        config.override(cfg, key.replace("__", "."), text_of, registry.REGISTRIES)
    return cfg


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The recipe of child processes; the text comes from the environment."""
    return tiny(argument, text=Path(os.environ["PTM_TEST_TEXT"]))


def run(cfg: Any, workdir: Path, *, devices: int = 1, sample: bool = False, **options: Any) -> int:
    """`train` on the first devices; without the sample at its end, which takes longer than the training, unless it is asked for."""
    with contextlib.nullcontext() if sample else mock.patch.object(describe, "sample", return_value=""):
        return train.train(cfg, workdir=workdir, devices=jax.devices()[:devices], **options)


class Crash(Exception):
    """Stands for whatever ends a process in the middle of a step."""


@contextlib.contextmanager
def at_batch(number: int, action: Callable[[], None]) -> Iterator[list[str]]:
    """Calls `action` when batch `number` (from 1) is asked for; gives the list that collects a hash of every batch handed out."""
    taken: list[str] = []
    original = Loader.__next__

    def wrapped(self: Loader) -> dict[str, np.ndarray]:
        if threading.current_thread() is threading.main_thread() and len(taken) + 1 == number:
            action()
        batch = original(self)
        taken.append(hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
        return batch

    Loader.__next__ = wrapped
    try:
        yield taken
    finally:
        Loader.__next__ = original


def stop() -> None:
    """What a scheduler does."""
    signal.raise_signal(signal.SIGTERM)


def crash() -> None:
    raise Crash


def leaves(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of the state of a checkpoint, by path."""
    reader = Checkpoints.reader(workdir / "ckpt")
    state, _, _ = reader.restore(step, reader.structure(step))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def streams(workdir: Path, step: int) -> dict[str, bytes]:
    """The files of data state of a checkpoint."""
    return {path.name: path.read_bytes() for path in (workdir / "ckpt" / str(step) / "data").glob("*.json")}


def metrics(workdir: Path) -> str:
    return (workdir / "metrics.jsonl").read_text()


def assert_same(actual: Path, expected: Path, step: int) -> None:
    """Two workdirs hold the same run up to `step`, bit for bit: state, data state and metrics."""
    ours, theirs = leaves(actual, step), leaves(expected, step)
    assert list(ours) == list(theirs)
    different = [path for path in theirs if ours[path].dtype != theirs[path].dtype or ours[path].tobytes() != theirs[path].tobytes()]
    assert not different, f"leaves that differ: {different}"
    assert streams(actual, step) == streams(expected, step) != {}
    assert metrics(actual) == metrics(expected)


def child(kind: str, workdir: Path, text: Path, *overrides: str) -> subprocess.Popen:
    """The command `ptm train` of a kind in a process of its own, on one device; its stdout and stderr come through one pipe."""
    command = [sys.executable, "-m", "ptm.cli", "train", f"--config={__file__}:{kind}", f"--workdir={workdir}", *overrides]
    env = os.environ | {"PTM_TEST_TEXT": str(text), "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
