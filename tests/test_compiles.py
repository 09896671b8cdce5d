"""What is compiled while a run goes on: counted, timed, and explained where a program is compiled again."""

import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.experimental.compilation_cache import compilation_cache

from ptm import compiles, log
from ptm import run as run_lib
from ptm.data.loader import Loader


@pytest.fixture
def events():
    found = compiles.CompileEvents()
    yield found
    found.close()


def test_compile_events_count_compilations_hits_and_misses(tmp_path, monkeypatch):
    keys = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {key: getattr(jax.config, key) for key in keys}
    array, events = jnp.arange(4.0), compiles.CompileEvents()
    try:
        for key, value in keys.items():
            jax.config.update(key, value)
        compilation_cache.reset_cache()
        counted = []
        for _ in range(2):
            jax.clear_caches()
            jax.jit(lambda x: x * 3 + 1)(array)
            counted.append(events.totals())
    finally:
        events.close()
        for key, value in before.items():
            jax.config.update(key, value)
        compilation_cache.reset_cache()
    first, second = counted
    assert first["compiles"] == first["cache_misses"] == 1 and first["cache_hits"] == 0 and first["compile_seconds"] > 0
    assert second["compiles"] == 2 and second["cache_hits"] == second["cache_misses"] == 1
    assert [found.cached for found in events.take()] == [False, True]
    jax.jit(lambda x: x * 5)(array)
    assert events.totals() == second
    assert events.take() == []


def scaled(values, batch, *, by):
    return jax.tree.map(lambda x: by * x.sum() * batch["tokens"].sum(), values)


def test_reasons(events):
    """The nearest earlier call and what is other than in it; nothing is told of programs that are there."""
    step = compiles.jit(functools.partial(scaled, by=2), arguments=("params", "batch"))

    def reasons(*shape: int, dtype: str = "int32", **more) -> list[str]:
        arrays = {"w": np.ones(2)}, {"tokens": np.ones(shape, dtype), **more}
        events.take()
        step(*arrays)
        return [found.reason for found in events.take() if found.function == "scaled"]

    assert reasons(4, 8) == ["first call"] and reasons(4, 8) == []
    assert reasons(4, 2) == ["batch/tokens int32[4,2], was int32[4,8]"]
    assert reasons(4, 2, dtype="float32") == ["batch/tokens float32[4,2], was int32[4,2]"]
    assert reasons(4, 2, ranks=np.ones(3)) == ["batch/ranks float32[3] is new"] and reasons(4, 2) == []
    jax.clear_caches()
    assert reasons(4, 8) == ["arguments of the same shapes that lie elsewhere, or other settings of JAX"]
    assert step.lower({"w": np.ones(2)}, {"tokens": np.ones(3)}).compile()


def test_reasons_of_many_differences(events):
    step = compiles.jit(lambda values, batch: batch["a0"].sum(), arguments=("params", "batch"))
    for size in (1, 2):
        step({}, {f"a{n}": np.ones(size, np.float32) for n in range(5)})
    last = events.take()[-1]
    assert last.again and last.reason == "; ".join(f"batch/a{n} float32[2], was float32[1]" for n in range(3)) + "; 2 more"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def test_a_run_whose_rows_change_says_why_it_compiles_again(text, tmp_path, monkeypatch, capfd):
    """From the fourth batch on rows are half as long: one line of the log, and the rows of compiles.jsonl; an eval is compiled where it is first due."""
    original, taken = run_lib.Run.to_device, []

    def shorter(run, batch, *, batch_size, rows):
        if "evals" not in taken:
            taken.append(batch)
        cut = {name: array[:, :8] if len(taken) > 3 and array.ndim == 2 else array for name, array in batch.items()}
        return original(run, cut, batch_size=batch_size, rows=rows)

    monkeypatch.setattr(run_lib.Run, "to_device", shorter)
    monkeypatch.setattr(run_lib.Run, "evaluate", lambda run, name, params, predictions: taken.append("evals") or {})
    config = runs.tiny("concat", text=text, train__steps=6, checkpoint__every=6, evals__validation__every=6, checkpoint__keep_best=0)
    assert runs.run(config, tmp_path) == 0
    rows = [row for row in map(json.loads, (tmp_path / "compiles.jsonl").read_text().splitlines()) if row["function"] == "train_step"]
    assert [(row["step"], row["during"]) for row in rows] == [(0, "train"), (3, "train")] and rows[0]["reason"] == "first call"
    assert "batch/targets_BL int32[16,8], was int32[16,16]" in rows[1]["reason"] and rows[1]["seconds"] > 0 and rows[1]["cached"] in (True, False)
    said = [line for line in capfd.readouterr().err.splitlines() if " again in " in line]
    assert len(said) == 1 and said[0].startswith("train_step ") and rows[1]["reason"] in said[0] and "Step 3, train." in said[0]


def test_evals_and_resumed_runs_in_the_log(text, tmp_path):
    config = runs.tiny("concat", text=text, train__steps=4, checkpoint__every=2, evals__validation__every=2)
    with runs.at_batch(3, runs.stop):
        assert runs.run(config, tmp_path) == 75
    assert runs.run(config, tmp_path) == 0
    rows = [json.loads(line) for line in (tmp_path / "compiles.jsonl").read_text().splitlines()]
    ours = [(row["step"], row["during"], row["function"]) for row in rows if row["reason"]]
    assert ours == [(0, "train", "train_step"), (2, "validation", "eval_step"), (3, "train", "train_step"), (4, "validation", "eval_step")]
    assert all(row["reason"] == "first call" for row in rows if row["reason"])


@pytest.mark.parametrize("slow", ["device", "host"])
def test_whether_the_devices_wait_for_the_host(slow, text, tmp_path, monkeypatch):
    """Batches are put on the devices while they are at the step before: only a host that needs longer than a step makes them wait."""

    @jax.jit
    def delay(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ y), jnp.full((400, 400), x * 0))[0, 0]

    delay(jnp.float32(1)).block_until_ready()
    original, made = Loader.__next__, run_lib.Run.train_step.func

    def late(loader):
        time.sleep(0.3)
        return original(loader)

    def long_step(run):
        step = made(run)

        def call(*args):
            state, metrics = step(*args)
            zero = delay(metrics["loss"])
            return state, metrics | {"loss": metrics["loss"] + zero, "skips": metrics["skips"] + zero.astype(jnp.int32)}

        return call

    if slow == "host":
        monkeypatch.setattr(Loader, "__next__", late)
    else:
        monkeypatch.setattr(run_lib.Run, "train_step", property(long_step))
    config = runs.tiny("concat", text=text, train__steps=10, checkpoint__every=10, log__every=10, data__prefetch=0, evals__validation__every=10)
    assert runs.run(config, tmp_path) == 0
    row = log.read(str(tmp_path / log.TIMING))[-1]
    assert row["devices_waited"] > 0.8 if slow == "host" else row["devices_waited"] < 0.4
    assert row["data_seconds"] > 0.3 if slow == "host" else row["data_seconds"] > 0
