"""Checkpoints: exact round trips, damage, kills, keeping, errors, other meshes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ledger import tell

from ptm import checkpoint
from ptm.checkpoint import CheckpointError, Checkpoints
from ptm.fields import ConfigError
from ptm.specs import open_spec, parse_spec


def make_state(seed: int = 0) -> dict:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "decoder": {"layers": {"kernel": jax.random.normal(keys[0], (2, 8, 16)), "scale": jax.random.normal(keys[1], (16,)).astype(jnp.bfloat16)}},
        "embed": jax.random.normal(keys[2], (24, 8)),
    }
    moments = jax.tree.map(lambda leaf: leaf * 2, params)
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": ({"mu": moments, "count": jnp.int32(7)}, (), None),
        "ema": jax.tree.map(lambda leaf: leaf + 1, params),
        "carry": None,
        "seen": np.arange(3, dtype=np.int32) + seed,
    }


def abstract(state: dict, sharding=None) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(actual)}[jax.tree_util.keystr(path)]
        assert other.dtype == leaf.dtype and np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


def opened(folder: Path, **options) -> Checkpoints:
    return Checkpoints(folder, **({"keep_latest": 3, "keep_best": 0, "metric": "loss", "mode": "min"} | options))


def filled(folder: Path, *steps: int, **options) -> None:
    with opened(folder, keep_latest=len(steps), **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), streams={0: {"at": step}}, meta={"step": step})


def test_round_trip_is_bit_equal(tmp_path):
    state = make_state(3)
    streams = {0: {"record": 5}, 12: [1, 2, {"bins": []}], 100000: None}
    meta = {"config": {"lr": 0.1}, "tokenizer": "ab12", "step": 3}
    with opened(tmp_path) as checkpoints:
        assert checkpoints.save(3, state, streams=streams, meta=meta, metrics={"loss": np.float32(0.5)})
        checkpoints.wait()
        restored, read_streams, read_meta = checkpoints.restore(3, abstract(state))
        assert_same(restored, state)
        assert read_streams == streams and read_meta == meta and checkpoints.metrics(3) == {"loss": 0.5}
        assert json.loads((tmp_path / "3/data/stream-00012.json").read_text()) == [1, 2, {"bins": []}]
    manifest = json.loads((tmp_path / "3" / "manifest.json").read_text())["files"]
    on_disk = {str(p.relative_to(tmp_path / "3")) for item in ("state", "data", "meta") for p in (tmp_path / "3" / item).rglob("*") if p.is_file()}
    assert set(manifest) == on_disk and "data/stream-00000.json" in manifest


def test_structure_names_every_leaf(tmp_path):
    filled(tmp_path, 1)
    structure = Checkpoints.reader(tmp_path).structure(1)
    assert structure["opt_state"]["0"]["mu"]["decoder"]["layers"]["scale"] == jax.ShapeDtypeStruct((16,), jnp.bfloat16)
    assert set(structure) == {"step", "params", "opt_state", "ema", "seen"}
    assert_same(Checkpoints.reader(tmp_path).restore_params(1, structure["params"]), make_state(1)["params"])


def test_restore_onto_other_meshes(tmp_path):
    devices = jax.devices()
    if len(devices) < 4:
        pytest.skip("needs 4 devices; set JAX_NUM_CPU_DEVICES=8 before jax starts")
    wide = NamedSharding(jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:4]), P("x"))
    narrow = NamedSharding(jax.make_mesh((2,), ("y",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2]), P(None, "y"))
    value = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jax.device_put(value, wide)}}, streams={}, meta={})
        checkpoints.wait()
        for sharding in (wide, narrow, NamedSharding(wide.mesh, P()), jax.sharding.SingleDeviceSharding(devices[3])):
            restored = checkpoints.restore(1, {"params": {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)}})[0]
            assert restored["params"]["w"].sharding == sharding
            np.testing.assert_array_equal(restored["params"]["w"], value)


def test_buffers_may_be_donated_and_overwritten_after_save(tmp_path):
    devices = jax.devices()
    sharding = NamedSharding(jax.make_mesh((len(devices),), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), P("x"))
    value = np.arange(len(devices) * 500_000, dtype=np.float32)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    state = {"a": jax.device_put(value, sharding), "b": jnp.asarray(value), "c": jnp.ones(3, jnp.bfloat16)}
    host = value.copy()
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {**state, "host": host}, streams={}, meta={})
        host[:] = -1
        for _ in range(3):
            state = jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        restored = checkpoints.restore(1, abstract({**state, "host": host}))[0]
    for name in ("a", "b", "host"):
        np.testing.assert_array_equal(restored[name], value)
    np.testing.assert_array_equal(restored["c"], np.ones(3, jnp.bfloat16))


def flip(path: Path, rng: random.Random | None = None) -> None:
    """One bit, of the middle or anywhere."""
    data = bytearray(path.read_bytes())
    place, bit = (rng.randrange(len(data)), rng.randrange(8)) if rng else (len(data) // 2, 0)
    data[place] ^= 1 << bit
    path.write_bytes(data)


DAMAGE = {
    "flipped": (flip, "changed"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes instead of"),
    "emptied": (lambda path: path.write_bytes(b""), "0 bytes instead of"),
    "removed": (lambda path: path.unlink(), "is missing"),
}


def largest(step: Path) -> Path:
    return max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_step_is_set_aside_and_the_one_before_restored(tmp_path, kind):
    damage, reason = DAMAGE[kind]
    filled(tmp_path, 1, 2, 3)
    damage(largest(tmp_path / "3"))
    damage(tmp_path / "2/data/stream-00000.json")
    reader = Checkpoints.reader(tmp_path)
    assert reason in reader.valid(3) and reason in reader.valid(2) and reader.valid(1) is None
    with pytest.warns(UserWarning, match="skipped"):
        assert reader.newest_valid() == 1
    assert reader.steps() == [1, 2, 3]
    with opened(tmp_path) as checkpoints:
        with pytest.warns(UserWarning) as seen:
            assert checkpoints.newest_valid() == 1
        texts = [str(warning.message) for warning in seen]
        assert any(reason in text and "3.damaged-1" in text for text in texts) and any("2.damaged-1" in text for text in texts)
        assert checkpoints.steps() == [1] and largest(tmp_path / "3.damaged-1").parent.is_dir()
        assert_same(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))


UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")  # of Orbax, beside the manifest; nothing needs them


@pytest.mark.faults
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damaged_file(kind, tmp_path, long, record_property):
    """Of all files of a step, the manifest among them: the step before is restored, loudly, and what is left of the bad one is kept. Bits flip at random places."""
    damage, _ = DAMAGE[kind]
    filled(tmp_path / "sound", 1, 2)
    files = {str(path.relative_to(tmp_path / "sound/2")) for path in (tmp_path / "sound/2").rglob("*") if path.is_file()}
    names = sorted(files.difference(UNREAD))
    assert {"manifest.json", "meta/meta.json", "data/stream-00000.json"} < set(names)
    tries = [(name, number) for name in names for number in range(10 if long and kind == "flipped" else 1)]
    tell(record_property, f"2. {kind} files of a checkpoint", tried=len(tries))
    rng = random.Random(kind)
    for name, number in tries:
        named = "" if name == "manifest.json" and kind == "flipped" else re.escape(name)  # a bit of it may be in the name or hash of another file
        folder = tmp_path / f"{name.replace('/', '-')}-{number}"
        shutil.copytree(tmp_path / "sound", folder)
        path = folder / "2" / name
        flip(path, rng) if kind == "flipped" else damage(path)
        left = {str(file.relative_to(folder / "2")): file.read_bytes() for file in (folder / "2").rglob("*") if file.is_file()}
        with opened(folder) as checkpoints:
            with pytest.warns(UserWarning, match=rf"checkpoint {folder / '2'} is damaged: .*{named}.*; it is kept as 2\.damaged-1 and an earlier one"):
                assert checkpoints.newest_valid() == 1
            assert_same(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))
        aside = folder / "2.damaged-1"
        assert left == {str(file.relative_to(aside)): file.read_bytes() for file in aside.rglob("*") if file.is_file()}, "what is bad is never deleted"
    for name in files.intersection(UNREAD):
        damage(tmp_path / "sound/2" / name)
    with opened(tmp_path / "sound") as checkpoints:
        assert_same(checkpoints.restore(checkpoints.newest_valid(), abstract(make_state(2)))[0], make_state(2))


def test_every_flipped_file_is_noticed_even_after_a_check(tmp_path):
    filled(tmp_path, 1)
    reader = Checkpoints.reader(tmp_path)
    assert reader.valid(1) is None
    for name in json.loads((tmp_path / "1/manifest.json").read_text())["files"]:
        path = tmp_path / "1" / name
        before = path.read_bytes()
        flip(path)
        assert name in reader.valid(1)
        with pytest.raises(ConfigError, match="damaged"):
            reader.restore(1, abstract(make_state(1)))
        path.write_bytes(before)
        assert reader.valid(1) is None


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]", '{"files": 3}', '{"files": {}}', '{"files": {"state/_METADATA": {"size": 3}}}'])
def test_without_a_sound_manifest_no_step_is_valid(tmp_path, text):
    filled(tmp_path, 1)
    path = tmp_path / "1/manifest.json"
    path.unlink() if text is None else path.write_text(text)
    assert "manifest.json" in Checkpoints.reader(tmp_path).valid(1)


CHILD = """
import sys, jax, jax.numpy as jnp
from ptm.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep_latest=2, keep_best=0, metric="loss", mode="min") as checkpoints:
    start = checkpoints.newest_valid() or 0
    for step in range(start + 1, start + 1000):
        checkpoints.save(step, {"params": {str(i): jnp.full((500, 100), step + i, jnp.float32) for i in range(4)}}, streams={0: step}, meta={"step": step})
        print(step, flush=True)
"""


def test_kill_in_the_middle_of_saves_leaves_a_valid_step(tmp_path, long, record_property):
    rng = random.Random(0)
    delays = [rng.uniform(0.0, 0.3) for _ in range(30)] if long else [0.02, 0.07, 0.11]
    tell(record_property, "2. SIGKILL during a save", tried=len(delays))
    shape = {"params": {str(i): jax.ShapeDtypeStruct((500, 100), jnp.float32) for i in range(4)}}
    last = 0
    for delay in delays:
        command = [sys.executable, "-c", CHILD, str(tmp_path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})
        started = [int(child.stdout.readline()) for _ in range(4)]
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        started += [int(line) for line in child.communicate()[0].split()]
        assert started[0] == last + 1 or started[0] == last + 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill leaves nothing that looks damaged
            with opened(tmp_path) as checkpoints:
                last = checkpoints.newest_valid()
                assert last in (started[-1] - 1, started[-1], started[-1] + 1)
                state, streams, meta = checkpoints.restore(last, shape)
        assert streams == {0: last} and meta == {"step": last}
        assert all((np.asarray(leaf) == last + int(i)).all() for i, leaf in state["params"].items())
        assert [path.name for path in tmp_path.iterdir() if not path.name.isdecimal()] == []


def test_leftovers_of_killed_saves_are_removed_unless_read_only(tmp_path):
    filled(tmp_path, 1)
    names = ["2.orbax-checkpoint-tmp", "1.deleting"]
    for name in names:
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert Checkpoints.reader(tmp_path).steps() == [1] and all((tmp_path / name).exists() for name in names)
    opened(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "notes"]


@pytest.mark.parametrize("mode, best", [("min", 3), ("max", 2)])
def test_keeps_the_newest_and_the_best_across_restarts(tmp_path, mode, best):
    losses = {1: 5.0, 2: 9.0, 3: 1.0, 4: float("nan"), 5: 4.0, 6: 3.0}
    for steps in ((1, 2, 3), (4, 5, 6)):
        with opened(tmp_path, keep_latest=2, keep_best=1, mode=mode) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"w": jnp.ones(2)}, streams={}, meta={}, metrics={"loss": losses[step]} if step != 5 else None)
    assert checkpoints.steps() == [best, 5, 6] and checkpoints.best() == best
    reader = Checkpoints.reader(tmp_path)
    assert reader.best() == best and (reader.metric, reader.mode) == ("loss", mode)


def test_the_step_just_saved_always_stays(tmp_path):
    filled(tmp_path, 10, 20)
    with opened(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(5, make_state(5), streams={}, meta={})
    assert checkpoints.steps() == [5, 20]


def test_best_is_none_without_the_metric(tmp_path):
    filled(tmp_path, 1)
    assert Checkpoints.reader(tmp_path).best() is None
    assert opened(tmp_path, read_only=True).metrics(1) == {}


def test_second_save_of_a_step(tmp_path):
    filled(tmp_path, 1)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.save(1, make_state(9), streams={}, meta={}) is False
        assert_same(checkpoints.restore(1, abstract(make_state(1)))[0], make_state(1))
        flip(largest(tmp_path / "1"))
        with pytest.warns(UserWarning, match="1.damaged-1"):
            assert checkpoints.save(1, make_state(9), streams={}, meta={}) is True
        checkpoints.wait()
        assert_same(checkpoints.restore(1, abstract(make_state(9)))[0], make_state(9))
        (tmp_path / "2").write_text("in the way")
        with pytest.warns(UserWarning, match="2.damaged-1"):
            assert checkpoints.save(2, make_state(2), streams={}, meta={}) is True
        checkpoints.wait()
        assert checkpoints.valid(2) is None and (tmp_path / "2.damaged-1").read_text() == "in the way"


def test_background_errors_surface_at_the_next_call_and_saving_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with opened(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, make_state(1), streams={0: 1}, meta={})
        checkpoints.wait()
        for surface in (checkpoints.wait, lambda: checkpoints.save(3, make_state(3), streams={}, meta={})):
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "write", full)
                assert checkpoints.save(2, make_state(2), streams={0: 1}, meta={})
                checkpoints._thread.join()
            with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device"):
                surface()
            assert checkpoints.steps() == [1] == [checkpoints.newest_valid()]
        assert checkpoints.save(2, make_state(2), streams={0: 1}, meta={})
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_array_write_error_surfaces(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("disk is gone")

    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", broken)
        checkpoints.save(1, make_state(1), streams={}, meta={})
        with pytest.raises(CheckpointError, match="step 1 .*disk is gone"):
            checkpoints.wait()
        checkpoints.wait()
        assert checkpoints.newest_valid() is None


def test_save_waits_for_the_save_before_it(tmp_path, monkeypatch):
    written = []
    original = checkpoint._Step.finalize

    def slow(self, directory):
        time.sleep(0.3)
        original(self, directory)
        written.append(directory.name.split(".")[0])

    monkeypatch.setattr(checkpoint._Step, "finalize", slow)
    with opened(tmp_path) as checkpoints:
        start = time.perf_counter()
        checkpoints.save(1, make_state(1), streams={}, meta={})
        assert time.perf_counter() - start < 0.3 and written == []
        checkpoints.save(2, make_state(2), streams={}, meta={})
        assert written == ["1"] and checkpoints.steps() == [1]
    assert written == ["1", "2"] and checkpoints.steps() == [1, 2]


def test_differences_are_listed_before_reading(tmp_path):
    filled(tmp_path, 1)
    wanted = abstract(make_state(1))
    wanted["carry"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    wanted["params"]["embed"] = jax.ShapeDtypeStruct((25, 8), jnp.float32)
    wanted["seen"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    del wanted["ema"]["embed"]
    with pytest.raises(ConfigError) as error:
        Checkpoints.reader(tmp_path).restore(1, wanted)
    for line in ("missing +carry", "extra +ema/embed", r"shape +params/embed expected \(25, 8\), got \(24, 8\)", "dtype +seen expected float32, got int32"):
        assert re.search(line, str(error.value)), line


def test_dtypes_change_only_on_request(tmp_path):
    filled(tmp_path, 1)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), make_state(1)["params"])
    reader = Checkpoints.reader(tmp_path)
    with pytest.raises(ConfigError, match="expected bfloat16, got float32"):
        reader.restore_params(1, half)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_state(1)["params"])
    assert_same(reader.restore_params(1, half, cast=True), expected)


def test_parts_of_the_state(tmp_path):
    state = make_state(1)
    filled(tmp_path, 1)
    reader = Checkpoints.reader(tmp_path)
    shapes = abstract(state["params"])
    assert_same(reader.restore_params(1, shapes, which="ema"), state["ema"])
    with pytest.raises(ConfigError, match="extra +embed"):
        reader.restore_params(1, {"decoder": shapes["decoder"]})
    assert_same(reader.restore_params(1, {"decoder": shapes["decoder"]}, subset=True), {"decoder": state["params"]["decoder"]})
    with pytest.raises(ConfigError, match="missing +head"):
        reader.restore_params(1, {"head": shapes["embed"]}, subset=True)
    with pytest.raises(ConfigError, match="params, ema|ema, params"):
        reader.restore_params(1, shapes, which="opt_state")
    with pytest.raises(ConfigError, match="no checkpoint of step 4 .* 1"):
        reader.restore_params(4, shapes)


def test_average_is_the_float32_mean(tmp_path):
    filled(tmp_path, 1, 2, 3)
    shapes = abstract(make_state(1)["params"])
    average = Checkpoints.reader(tmp_path).average([1, 2, 3], shapes)
    trees = [make_state(step)["params"] for step in (1, 2, 3)]
    expected = jax.tree.map(lambda *leaves: np.mean([np.asarray(x, np.float32) for x in leaves], 0).astype(leaves[0].dtype), *trees)
    assert jax.tree.map(lambda leaf: leaf.dtype, average) == jax.tree.map(lambda leaf: leaf.dtype, shapes)
    for actual, mean in zip(jax.tree.leaves(average), jax.tree.leaves(expected)):
        rtol = 1e-2 if actual.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(mean, np.float32), rtol=rtol, atol=1e-6)
    with pytest.raises(ConfigError, match="no steps"):
        Checkpoints.reader(tmp_path).average([], shapes)


def test_specs(tmp_path):
    with opened(tmp_path / "run@1/ckpt", keep_best=1) as checkpoints:
        for step, loss in ((10, 1.0), (20, 2.0)):
            checkpoints.save(step, make_state(step), streams={}, meta={}, metrics={"loss": loss})
    folder = tmp_path / "run@1/ckpt"
    assert parse_spec(f"ckpt:{tmp_path}/run@1") == (folder, "latest", "params", 1) == parse_spec(f"ckpt:{folder}")
    assert parse_spec(f"ckpt:{folder}@10") == (folder, 10, "params", 1)
    assert parse_spec(f"ckpt:{folder}@avg5") == (folder, "latest", "params", 5)
    whole = {"": ([20], "params"), "@best": ([10], "params"), "@ema": ([20], "ema"), "@20": ([20], "params"), "@avg2": ([20, 10], "params")}
    for end, found in whole.items():
        assert open_spec(f"ckpt:{tmp_path}/run@1{end}")[1:] == found
    with pytest.raises(ConfigError, match="2 are valid, not 3; .*keep_latest=3"):
        open_spec(f"ckpt:{folder}@avg3")
    flip(largest(folder / "20"))
    with pytest.warns(UserWarning, match="20 is damaged"):
        reader, (step,), which = open_spec(f"ckpt:{folder}@ema")
    assert step == 10 and folder.joinpath("20").is_dir()
    assert_same(reader.restore_params(step, abstract(make_state(10)["params"]), which=which), make_state(10)["ema"])
    (tmp_path / "empty").mkdir()
    for spec, message in {
        "scratch": r"allowed: ckpt:DIR",
        "ckpt:": r"allowed: ckpt:DIR",
        f"ckpt:{folder}@bset": r"Did you mean 'best'",
        f"ckpt:{folder}@latest": r"allowed: ckpt:DIR",
        f"ckpt:{folder}@avg0": r"Did you mean 'avg5'",
        f"ckpt:{folder}@30": r"no step 30 .*10, 20",
        f"ckpt:{tmp_path}/rum@1/x": r"there is no folder",
        f"ckpt:{tmp_path}/emty": r"Did you mean 'empty'",
        f"ckpt:{tmp_path}/empty": r"no checkpoint in",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_spec(spec)
    with pytest.raises(ConfigError, match="damaged"):
        open_spec(f"ckpt:{folder}@20")
    shutil.rmtree(folder / "10")
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="none is valid"):
        open_spec(f"ckpt:{folder}")


def test_wrong_options(tmp_path):
    for options in ({"keep_latest": 0}, {"mode": "least"}, {"keep_best": -1}):
        with pytest.raises(ConfigError, match="allowed"):
            opened(tmp_path, **options)
    with pytest.raises(ConfigError, match="file system"):
        opened("gs://bucket/run")
