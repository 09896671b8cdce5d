"""The Pallas kernels for TPUs against plain attention, interpreted on CPU: every kind of mask, bias and layout that they claim. Compiled for TPUs in `plan`."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.experimental import pallas as pl

from ptm import config, parallel
from ptm.fields import ConfigError
from ptm.nn import attention, pallas
from ptm.nn.context import Context
from ptm.nn.masks import Mask, cross_mask, self_mask

ROWS, LENGTH, HEADS, WIDTH = 2, 200, 2, 24


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels are interpreted, in blocks of 128, and the mesh passes for one of TPUs."""
    plain = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **options: plain(*args, **(options | {"interpret": True})))
    monkeypatch.setattr(pallas, "BLOCK", 128)
    monkeypatch.setattr(attention, "platform", lambda context: "tpu")


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def inputs(*, keys=LENGTH, kv_heads=HEADS, width=WIDTH, heads=HEADS):
    return random(ROWS, LENGTH, heads, width), random(ROWS, keys, kv_heads, width, seed=1), random(ROWS, keys, kv_heads, width, seed=2)


PACKED = np.repeat(np.array([[1, 2, 3, 0], [1, 2, 2, 2]], np.int32), 50, axis=1)
PREFIX = np.tile((np.arange(50) < 30).astype(np.int32), (2, 4)) * (PACKED > 0)
PREFIX[1, 100:] = 0  # a segment's prefix is its beginning
RANK = np.stack([np.random.default_rng(n).permutation(LENGTH) for n in range(2)]).astype(np.int32)
BATCH = {"segments_BL": PACKED, "prefix_BL": PREFIX, "rank_BL": RANK}
INPUTS = np.repeat(np.array([[1, 2, 3, 0], [1, 2, 2, 0]], np.int32), 75, axis=1)
BIAS, ROW_BIAS = random(1, HEADS, LENGTH, LENGTH, seed=3), random(ROWS, HEADS, LENGTH, LENGTH, seed=3)
CASES = {
    "splash, full": ("splash", self_mask("full", BATCH), None, {}),
    "splash, causal": ("splash", self_mask("causal", BATCH), None, {}),
    "splash, prefix": ("splash", self_mask("prefix", BATCH), None, {}),
    "splash, causal with a window": ("splash", self_mask("causal", BATCH).replace(window=(40, 40)), None, {}),
    "splash, full with a window": ("splash", self_mask("full", BATCH).replace(window=(40, 20)), None, {}),
    "splash, grouped": ("splash", self_mask("causal", BATCH), None, {"heads": 4}),
    "splash, cross": ("splash", cross_mask({"segments_BL": PACKED, "input_segments_BI": INPUTS}), None, {"keys": 300}),
    "splash, wide heads": ("splash", self_mask("causal", BATCH), None, {"width": 136}),
    "flash, full": ("flash", self_mask("full", BATCH), None, {}),
    "flash, causal": ("flash", self_mask("causal", BATCH), None, {}),
    "flash, grouped": ("flash", self_mask("causal", BATCH), None, {"heads": 4}),
    "flash, cross": ("flash", cross_mask({"segments_BL": PACKED, "input_segments_BI": INPUTS}), None, {"keys": 300}),
    "flash, wide heads": ("flash", self_mask("full", BATCH), None, {"width": 136}),
    "flash, full, bias": ("flash", self_mask("full", BATCH), BIAS, {}),
    "flash, causal, bias": ("flash", self_mask("causal", BATCH), BIAS, {}),
    "flash, causal with a window, bias": ("flash", self_mask("causal", BATCH).replace(window=(40, 0)), BIAS, {}),
    "flash, prefix, bias": ("flash", self_mask("prefix", BATCH), BIAS, {}),
    "flash, causal, bias of each row": ("flash", self_mask("causal", BATCH), ROW_BIAS, {}),
    "flash, order of prediction, bias of each row": ("flash", self_mask("permutation", BATCH), ROW_BIAS, {}),
}


def gradients(backend, mask, layout, *arrays):
    """(output, gradients of all arrays) under fixed cotangents; what padding makes of padding is left out."""
    counted = np.asarray(mask.query_segments_BL > 0)[:, :, None, None]

    def run(*arrays):
        out = attention.attend(*arrays[:3], context=Context(layout, attention=backend), mask=mask, bias_BHLT=arrays[3], scale=0.3)[0] * counted
        return jnp.sum(out * random(*out.shape, seed=4)), out

    wanted = tuple(n for n, array in enumerate(arrays) if array is not None)
    (_, out), grads = zoo.jit(jax.value_and_grad(run, argnums=wanted, has_aux=True))(*arrays)
    return out, *grads


def check_equal(first, second):
    for one, other in zip(first, second, strict=True):
        largest = float(jnp.max(jnp.abs(other)))
        assert largest > 1e-3
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)


@pytest.mark.parametrize("case", list(CASES))
def test_kernel_equals_plain_attention(case, interpreted):
    backend, mask, bias, options = CASES[case]
    arrays = (*inputs(**options), bias)
    check_equal(gradients(backend, mask, zoo.layout(), *arrays), gradients("xla", mask, zoo.layout(), *arrays))


MESHES = {
    "splash, causal, split lengths": ("splash", "causal", False, {"data": 2, "tensor": 2, "sequence": 2}),
    "splash, prefix, keys of fewer heads than devices": ("splash", "prefix", False, {"data": 1, "tensor": 4, "sequence": 2}),
    "splash, full, split lengths": ("splash", "full", False, {"data": 2, "tensor": 2, "sequence": 2}),
    "splash, whole lengths": ("splash", "causal", False, {"data": 2, "preset": "dp"}),
    "flash, bias, split lengths": ("flash", "causal", True, {"data": 2, "tensor": 2, "sequence": 2}),
    "flash, causal": ("flash", "causal", False, {"data": 2, "tensor": 4}),
    "chunked, causal, split lengths": ("chunked", "causal", False, {"data": 2, "tensor": 2, "sequence": 2}),
    "chunked, bias, split lengths": ("chunked", "prefix", True, {"data": 2, "tensor": 2, "sequence": 2}),
}


@pytest.mark.parametrize("case", list(MESHES))
def test_kernel_on_a_mesh(case, interpreted):
    """Rows, heads and queries split over eight devices, keys in two heads: output and gradients are those of one device."""
    backend, kind, bias, mesh = MESHES[case]
    mask, arrays = self_mask(kind, BATCH), (*inputs(heads=4), random(1, 4, LENGTH, LENGTH, seed=3) if bias else None)
    check_equal(gradients(backend, mask, zoo.layout(**mesh), *arrays), gradients("xla", mask, zoo.layout(), *arrays))


def test_rows_that_do_not_divide_stay_whole(interpreted):
    """Two rows on four devices, as one row is when parameters are drawn: every device computes both."""
    mask, arrays = self_mask("causal", BATCH), (*inputs(), None)
    check_equal(gradients("splash", mask, zoo.layout(data=4), *arrays), gradients("xla", mask, zoo.layout(), *arrays))


def test_a_packed_row_is_its_documents(interpreted):
    """Each document of a packed row, alone in a row: the same numbers from both kernels."""
    q, k, v = inputs()
    for backend in ("splash", "flash"):
        run = jax.jit(lambda q, k, v, segments, backend=backend: attention.attend(
            q, k, v, context=Context(zoo.layout(), attention=backend), mask=self_mask("causal", {"segments_BL": segments}), scale=0.3
        )[0])  # fmt: skip
        packed = run(q, k, v, PACKED)
        ends = np.flatnonzero(np.diff(PACKED[0])) + 1
        for start, stop in zip([0, *ends], ends):
            alone = (jnp.pad(x[:1, start:stop], [(0, 1), (0, LENGTH - stop + start), (0, 0), (0, 0)]) for x in (q, k, v))
            segments = np.tile((np.arange(LENGTH) < stop - start).astype(np.int32), (2, 1))
            np.testing.assert_allclose(run(*alone, segments)[0, : stop - start], packed[0, start:stop], atol=1e-5)


def test_the_end_of_a_prefix():
    mask = Mask(kind="prefix", query_segments_BL=PACKED, key_segments_BT=PACKED, key_prefix_BT=PREFIX)
    seen = np.asarray(mask.dense())[:, 0]
    last = np.where(seen.any(-1), LENGTH - 1 - np.argmax(seen[:, :, ::-1], axis=-1), -1)
    np.testing.assert_array_equal(mask.last_visible(), last)


@pytest.mark.parametrize(
    ("length", "parts", "expected"),
    [(1, 1, (128, 128)), (512, 1, (512, 512)), (520, 1, (384, 768)), (1000, 2, (512, 1024)), (1152, 1, (384, 1152)), (4096, 4, (512, 4096))],
)
def test_blocks(length, parts, expected):
    assert pallas.blocks_of(length, parts=parts) == expected


def test_refusal_names_the_device():
    with pytest.raises(ConfigError, match="compute.attention=splash is refused here: it needs a TPU and this is cpu"):
        attention.attend(*inputs(), context=Context(zoo.layout(), attention="splash"), mask=self_mask("causal", BATCH), scale=1.0)


@functools.cache
def topology(name: str):
    """Devices of a TPU that is not there, for the compiler."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    settings = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    return topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=(2, 2, 1), wrap=(False,) * 3, num_slices=1).devices


@pytest.mark.plan
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("backend", "kind", "bias", "width"),
    [("splash", "causal", False, 64), ("splash", "prefix", False, 128), ("flash", "full", True, 64), ("flash", "causal", False, 128)],
)
def test_compiles_for_tpus(backend, kind, bias, width, devices):
    """Forth and back, packed, as a real TPU would run it; the kernels are in the program, and no logits are."""
    found = topology("v5e:2x2")
    mesh = {"data": 2, "tensor": 2, "sequence": 1} if devices == 4 else {}
    layout = parallel.make_layout(config.Mesh(**{"data": 1, **mesh, "preset": "fsdp+tp"}), devices=list(found)[:devices])
    rows, length, heads = 2, 1024, 4

    def loss(q, k, v, bias_BHLT, segments):
        mask = self_mask(kind, {"segments_BL": segments, "prefix_BL": segments})
        return jnp.sum(attention.attend(q, k, v, context=Context(layout, attention=backend), mask=mask, bias_BHLT=bias_BHLT, scale=0.1)[0].astype(jnp.float32))

    whole, by_row = layout.replicated(), layout.batch()
    array = jax.ShapeDtypeStruct((rows, length, heads, width), jnp.bfloat16, sharding=by_row)
    added = jax.ShapeDtypeStruct((1, heads, length, length), jnp.float32, sharding=whole) if bias else None
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=by_row)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(array, array, array, added, segments).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3
    if not bias:
        assert compiled.memory_analysis().temp_size_in_bytes < rows * heads * length * length * 4 / 2
