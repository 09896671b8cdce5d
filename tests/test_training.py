"""What training does to the numbers: it learns, it repeats itself, and it does not depend on where its arrays lie."""

import contextlib
import json
import random
import string
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import runs

from ptm import config, optim, state
from ptm import run as run_lib

PLAIN = {"train__microbatches": 1, "train__ema_decay": None, "train__skip_sigma": None, "log__norms": False, "model__dropout": 0.0}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def first_batch(run: run_lib.Run) -> dict[str, jax.Array]:
    size = run.config.train.batch_size
    with contextlib.closing(run.loader()) as loader:
        return run.to_device(next(loader), batch_size=size, rows=list(range(size)))


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, runs.metrics(workdir).splitlines()) if "loss" in row]


@pytest.mark.parametrize("kind", ["concat", "mlm", "spans"])
def test_one_batch_is_overfit(kind, tmp_path):
    """Each family memorises a batch under its home objective: the loss falls from about log 263 to below 0.02."""
    rng = random.Random(0)
    # Every document begins with a letter of its own, so that no two places have the same context and other continuations.
    lines = [letter + "".join(rng.choices(string.digits, k=11)) for letter in string.ascii_letters]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    own = {"data__packing": "none", "objective__boundaries": False} if kind == "concat" else {}
    options = runs.tiny(
        kind, text=tmp_path / "lines.txt", **PLAIN, **own, model__width=32, train__batch_size=8, data__holdout=0.0, optimizer__learning_rate=5e-3
    )
    run = run_lib.setup(options, devices=jax.devices()[:1])
    batch, values, seen = first_batch(run), run.init_state(run.init_params()), []
    for _ in range(200):
        values, metrics = run.train_step(values, batch)
        seen.append(float(metrics["loss"]))
    assert abs(seen[0] - np.log(263)) < 1.5 and seen[-1] < 0.02


def test_equal_configs_give_equal_runs_and_other_seeds_other_ones(text, tmp_path):
    for name in ("a", "b"):
        assert runs.run(runs.tiny("concat", text=text, train__steps=6), tmp_path / name) == 0
    runs.assert_same(tmp_path / "a", tmp_path / "b", 6)
    assert runs.run(runs.tiny("concat", text=text, train__steps=6, seed=1), tmp_path / "c") == 0
    one, other = runs.leaves(tmp_path / "a", 6), runs.leaves(tmp_path / "c", 6)
    kernels = [path for path in one if path.startswith("params/") and path.endswith(("kernel", "embedding"))]
    assert kernels and all(np.mean(one[path] != other[path]) > 0.99 for path in kernels)
    assert runs.streams(tmp_path / "a", 6) != runs.streams(tmp_path / "c", 6)


def trained_steps(options, *, steps: int, devices: int = 1) -> tuple[list[float], dict[str, jax.Array]]:
    """Losses of the first steps of a config and the state after them, by path, without a workdir."""
    run = run_lib.setup(options, devices=jax.devices()[:devices])
    values, seen = run.init_state(run.init_params()), []
    with contextlib.closing(run.loader()) as loader:
        for _ in range(steps):
            values, metrics = run.train_step(values, run.to_device(next(loader), batch_size=16, rows=list(range(16))))
            seen.append(float(metrics["loss"]))
    return seen, {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


def test_bfloat16_trains_near_float32(text):
    """Activations in bfloat16: parameters stay float32, the losses of 14 steps agree to 1 %."""
    wide, _ = trained_steps(runs.tiny("concat", text=text), steps=14)
    narrow, values = trained_steps(runs.tiny("concat", text=text, compute__dtype="bfloat16"), steps=14)
    np.testing.assert_allclose(narrow, wide, rtol=0.01)
    assert narrow != wide and narrow[-1] < 0.8 * narrow[0]
    assert {leaf.dtype for path, leaf in values.items() if path.startswith(("params/", "ema/"))} == {np.dtype(np.float32)}


def test_a_sharded_run_is_the_run_of_one_device(text):
    """fsdp x tensor x data = 2 x 2 x 2 devices: the losses of 6 steps agree to 1e-4, the moved parameters to a tenth of a step of 0.01."""
    one, single = trained_steps(runs.tiny("concat", text=text), steps=6)
    eight, sharded = trained_steps(runs.tiny("concat", text=text, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), steps=6, devices=8)
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    for path, leaf in single.items():
        if path.startswith(("params/", "ema/", "window/")):
            np.testing.assert_allclose(np.asarray(sharded[path]), np.asarray(leaf), rtol=1e-4, atol=1e-3, err_msg=path)
    assert not sharded["params/token_embed/embedding"].sharding.is_fully_replicated


# Optimizers and schedules.


@pytest.fixture(scope="module")
def plain(text):
    """(run on one device, its compiled (parameters, batch) -> (loss, gradient), a batch, initial parameters)."""
    options = runs.tiny("concat", text=text, **PLAIN)
    run = run_lib.setup(options, devices=jax.devices()[:1])
    gradient = jax.jit(lambda params, batch: state.gradients(run.model, run.objective, params, batch, microbatches=1, rng=None, carry=None, train=False)[:2])
    return run, gradient, first_batch(run), run.init_params()


RATES = {"adamw": 3e-3, "adafactor": 0.3, "lamb": 1e-2, "lion": 1e-3, "sgd": 0.1, "muon": 3e-3}


def options_of(name: str) -> config.Optimizer:
    return config.Optimizer(name=name, learning_rate=RATES[name])


SCHEDULES = ("constant", "linear", "cosine", "rsqrt", "wsd")


def trained(plain, name: str, schedule: str) -> tuple[list[float], list]:
    """Losses of 8 steps on one batch, and (gradient, parameters, optimizer state) after each update."""
    _, gradient, batch, params = plain
    optimizer = optim.make(options_of(name), config.Schedule(name=schedule, warmup_steps=1), steps=8, params=params)
    step, kept = jax.jit(optimizer.transform.update), optimizer.transform.init(params)
    losses, history = [], []
    for _ in range(8):
        loss, grads = gradient(params, batch)
        updates, kept = step(grads, kept, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
        history.append((grads, params, kept))
    return losses, history


def assert_decreasing(losses: list[float]) -> None:
    assert losses[0] == losses[1], "the first step of a warm-up from 0 changes nothing"
    assert all(after < before for before, after in zip(losses[1:], losses[2:]))
    assert losses[-1] < losses[0] - 0.04


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_with_every_schedule(name, schedule, plain):
    assert_decreasing(trained(plain, name, schedule)[0])


@pytest.mark.parametrize("name, schedule", list(zip(RATES, (*SCHEDULES, "constant"))))
def test_optimizers_learn_and_do_not_depend_on_sharding(name, schedule, plain, text):
    """The loss falls at every step; with the same gradients on fsdp x tensor x data = 2 x 2 x 2 devices, parameters and every leaf of
    the optimizer's state agree after 3 updates to 1e-4 of the leaf's largest entry."""
    losses, history = trained(plain, name, schedule)
    assert_decreasing(losses)
    changes = {"optimizer__name": name, "optimizer__learning_rate": RATES[name], "schedule__name": schedule, "train__steps": 8}
    run = run_lib.setup(runs.tiny("concat", text=text, **PLAIN, **changes, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), devices=jax.devices())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.abstract_state)

    def step(values: dict, grads: dict) -> dict:
        updates, kept = run.optimizer.transform.update(grads, values["opt_state"], values["params"])
        return values | {"params": optax.apply_updates(values["params"], updates), "opt_state": kept}

    compiled = jax.jit(step, out_shardings=shardings)
    values = run.init_state(jax.device_put(jax.device_get(plain[3]), shardings["params"]))
    for grads, _, _ in history[:3]:
        values = compiled(values, jax.device_put(jax.device_get(grads), shardings["params"]))
    _, params, kept = history[2]
    for part, expected in (("params", params), ("opt_state", kept)):
        ours, theirs = jax.tree_util.tree_leaves_with_path(values[part]), jax.tree.leaves(expected)
        assert len(ours) == len(theirs)
        for (path, leaf), other in zip(ours, theirs):
            scale = float(np.max(np.abs(other)))
            np.testing.assert_allclose(np.asarray(leaf), np.asarray(other), rtol=0, atol=1e-4 * scale + 1e-12, err_msg=f"{part}{jax.tree_util.keystr(path)}")
    split = [leaf for leaf in jax.tree.leaves(values["opt_state"]) if not leaf.sharding.is_fully_replicated]
    assert len(split) >= 10, "moments of kernels and embeddings lie split over the devices"
