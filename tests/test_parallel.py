"""Layouts: every family on eight devices gives the numbers of one, holds its share of the state, and shares a residual stream; what does not fit is refused."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo
from jax.sharding import PartitionSpec as P

from ptm import config, models, optim, parallel, state
from ptm import run as run_lib
from ptm.fields import ConfigError
from ptm.nn.context import Context
from ptm.nn.losses import cross_entropy_and
from ptm.objectives import OBJECTIVES
from ptm.plan import hlo

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices: JAX_NUM_CPU_DEVICES=8")

MESHES = {
    "dp": {"preset": "dp", "data": 8},
    "fsdp": {"preset": "fsdp", "fsdp": 8},
    "fsdp 2x4": {"preset": "fsdp", "data": 2, "fsdp": 4},
    "tp": {"preset": "tp", "data": 2, "tensor": 4},
    "fsdp+tp": {"preset": "fsdp+tp", "data": 2, "fsdp": 2, "tensor": 2},
    "fsdp+tp 4x2": {"preset": "fsdp+tp", "fsdp": 4, "tensor": 2},
    "sp": {"preset": "sp", "data": 2, "fsdp": 2, "tensor": 2},
    "sp 2x2x2": {"preset": "sp", "data": 2, "tensor": 2, "sequence": 2},
    "cp": {"preset": "fsdp", "fsdp": 2, "sequence": 4},
    "cp+tp": {"preset": "fsdp+tp", "fsdp": 2, "tensor": 2, "sequence": 2},
}
# By default each family under two layouts at most, its own objective; all the rest is slow.
DEFAULT = {
    "gpt": ("fsdp", "cp"), "bert": ("fsdp+tp", "sp"), "roberta": ("dp",), "llama": ("tp",), "modernbert": ("cp",), "albert": ("fsdp+tp",),
    "electra": ("sp 2x2x2",), "xlnet": ("fsdp+tp", "cp"), "t5": ("fsdp+tp 4x2", "sp"), "encoder_decoder": ("cp+tp",),
}  # fmt: skip
ON_MESHES = [
    pytest.param(family, name, mesh, marks=() if name == zoo.HOME[family] and family in DEFAULT and mesh in DEFAULT[family] else pytest.mark.slow)
    for family, name in zoo.CROSS
    for mesh in MESHES
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "mesh"), ON_MESHES)
def test_eight_devices_equal_one(family, name, mesh):
    check(family, name, zoo.layout(**MESHES[mesh]))


@pytest.mark.parametrize("preset", ["fsdp+tp", "sp"])
@pytest.mark.parametrize("family", ["gpt", "bert", "t5"])
def test_one_row_a_device(family, preset):
    """Where data, fsdp and tensor all split something and a device has one row of a microbatch: the partitioner of jax 0.10.2 gets such products wrong."""
    check(family, zoo.HOME[family], zoo.layout(preset=preset, data=2, fsdp=2, tensor=2), microbatches=2)


def check(family: str, name: str, on: parallel.Layout, **options) -> None:
    """Loss equal to that of one device to 1e-5, gradients to 1e-5 * sqrt(layers) of each tensor's largest entry."""
    step, params = zoo.gradients(family, name, on=on, **options)
    loss, grads = step(params, jax.device_put(zoo.batch(name, family), on.batch()))
    expected_loss, expected_grads = zoo.reference(family, name)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    zoo.assert_equal_gradients(grads, expected_grads)


@pytest.mark.parametrize(
    ("family", "mesh"), [pytest.param(family, mesh, marks=() if (family, mesh) == ("gpt", "cp+tp") else pytest.mark.slow) for family in zoo.CONFIGS for mesh in MESHES]
)
def test_equal_to_the_last_digits_in_float64(family, mesh):
    """Loss and gradients to 1e-10: what float32 hides as rounding would be a wrong term here."""
    on, name = zoo.layout(**MESHES[mesh]), zoo.HOME[family]
    with jax.enable_x64(True):
        expected_loss, expected_grads = reference_in_float64(family, name)
        step, params = zoo.gradients(family, name, on=on, dtype=jnp.float64)
        loss, grads = step(jax.device_put(in_float64(params), on.parameters(params)), jax.device_put(zoo.batch(name, family), on.batch()))
        assert loss.dtype == jnp.float64 and {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype(np.float64)}
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)
        zoo.assert_equal_gradients(grads, expected_grads, tolerance=1e-10)


def in_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(params))


def reference_in_float64(family, name):
    step, params = zoo.gradients(family, name, dtype=jnp.float64)
    return step(in_float64(params), zoo.batch(name, family))


# What a device holds. Wide enough that kernels, tables and activations are nearly all of it; no two dimensions are alike.

LAYERS, WIDTH, HIDDEN, ROWS, ROW = 4, 256, 768, 16, 96
WIDE = {"num_layers": LAYERS, "width": WIDTH, "mlp_width": HIDDEN, "num_heads": 8, "num_kv_heads": 8, "head_dim": 32, "vocab_size": 512, "max_length": 128}


def wide_config(family: str) -> Any:
    """The small config of a family with the sizes of WIDE, those that it has, and its own layers where these have a pattern."""

    def grown(made: Any) -> Any:
        known = {f.name for f in dataclasses.fields(made)}
        sizes = {**WIDE, "num_layers": max(made.num_layers, LAYERS)}
        return dataclasses.replace(made, **{key: value for key, value in sizes.items() if key in known and (key != "vocab_size" or made.vocab_size)})

    made = zoo.CONFIGS[family]
    if family != "encoder_decoder":
        return grown(made)
    return dataclasses.replace(made, vocab_size=WIDE["vocab_size"], parts={side: grown(part) for side, part in made.parts.items()})


@functools.cache
def wide(family: str):
    """(objective, abstract parameters) of a wide family."""
    entry, made = OBJECTIVES[zoo.HOME[family]], wide_config(family)
    options = {**zoo.OPTIONS.get(zoo.HOME[family], {})}
    options |= {"input_length": ROW} if "input_length" in options else {}
    objective = entry.build(entry.config(**options), tokenizer=zoo.Vocabulary(), length=ROW, packing="default", model_config=made)
    model = models.make(made, context=Context(zoo.layout()), heads=objective.heads)
    return objective, jax.eval_shape(functools.partial(model.init, lengths=objective.lengths), jax.random.key(0))


def compiled(family: str, on: parallel.Layout, **context):
    """The compiled loss and gradient of a wide family."""
    objective, shapes = wide(family)
    model = models.make(wide_config(family), context=Context(on, **context), heads=objective.heads)
    sizes = {"B": ROWS, **objective.lengths}
    batch = {
        name: jax.ShapeDtypeStruct(tuple(sizes[dim] for dim in name.rpartition("_")[2]), array.dtype) for name, array in zoo.batch(zoo.HOME[family], family).items()
    }  # fmt: skip

    def step(params, batch):
        return state.gradients(model, objective, params, batch, microbatches=1, rng=None, carry=None, train=False)[:2]

    shardings = on.parameters(shapes)
    return zoo.jit(step, in_shardings=(shardings, on.batch()), out_shardings=(on.replicated(), shardings)).lower(shapes, batch).compile()


def held(values: Any, on: parallel.Layout, params: Any) -> tuple[int, int]:
    """Bytes of a part of the training state on one device of a layout, and of all of it."""

    def sizes(path: str | None, leaf: Any) -> np.ndarray:
        return np.array([np.prod(on.follow(path, leaf).shard_shape(leaf.shape)), np.prod(leaf.shape)], int) * leaf.dtype.itemsize

    return tuple(sum(jax.tree.leaves(optim.map_state(sizes, values, params=params))))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("family", list(models.MODELS))
def test_a_device_holds_its_share_of_parameters_and_optimizer_state(family, name):
    """Split over 8 devices, by rows, by length or by heads too: bytes of parameters, averages and moments (factored ones, momentum) within 10 % of an eighth."""
    _, shapes = wide(family)
    rule = optim.make(config.Optimizer(name=name), config.Schedule(), steps=1, params=shapes)
    whole = {"params": shapes, "ema": shapes, "opt_state": jax.eval_shape(rule.transform.init, shapes)}
    for mesh in ({"fsdp": 8}, {"fsdp": 2, "sequence": 4}, {"fsdp": 4, "tensor": 2}):
        mine, total = held(whole, zoo.layout(**mesh), shapes)
        assert total / 8 <= mine < 1.1 * total / 8, (mesh, mine, total)


def test_arrays_lie_as_their_shapes_say(tmp_path):
    """The real bytes of a run's state on each of 8 devices."""
    text = runs.corpus(tmp_path / "text.txt")
    changes = {"model__width": 256, "mesh__data": 1, "mesh__fsdp": 8, "optimizer__name": "adafactor"}
    run = run_lib.setup(runs.tiny("concat", text=text, **changes), devices=jax.devices()[:8])
    leaves = jax.tree.leaves(run.init_state(run.init_params()))
    for device in jax.devices()[:8]:
        mine = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)
        assert mine < 1.1 * sum(leaf.nbytes for leaf in leaves) / 8


@pytest.mark.parametrize("preset", ["fsdp+tp", "sp"])
@pytest.mark.parametrize("family", [pytest.param(family, marks=() if family == "gpt" else pytest.mark.slow) for family in models.MODELS])
def test_the_residual_stream_is_split(family, preset, monkeypatch):
    """No activation of the residual stream is kept whole on 4 devices that share a row, and the memory that this saves is real."""
    rows = ROWS // 2
    mesh = {"preset": preset, "fsdp": 2, "tensor": 4}
    own = compiled(family, zoo.layout(**mesh))
    kept = re.compile(rf"f32\[[2-9],{rows},{ROW},{WIDTH}\]")  # of several layers
    assert not kept.search(own.as_text())
    parameters, activations = parallel.RULES[preset]
    monkeypatch.setitem(parallel.RULES, preset, (parameters, {**activations, "residual": None, "residual_length": "sequence"}))
    whole = compiled(family, zoo.layout(**mesh))
    assert kept.search(whole.as_text())
    assert whole.memory_analysis().temp_size_in_bytes > 1.3 * own.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mesh", [{"preset": "fsdp", "fsdp": 8}, pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow)], ids=["fsdp", "fsdp+tp"])
def test_kernels_that_were_brought_together_are_not_kept(mesh):
    """Neither the forward nor the backward loop carries a copy of all layers' feed-forward kernels that is whole but for `tensor`."""
    on = zoo.layout(**mesh)
    text = compiled("gpt", on).as_text()
    hidden = HIDDEN // on.mesh.shape["tensor"]
    assert re.search(rf"f32\[{WIDTH},{hidden}\]", text), "each layer's is there for its product"
    assert not re.search(rf"f32\[{LAYERS},({WIDTH},{hidden}|{hidden},{WIDTH})\]", text)



@pytest.mark.parametrize(("mesh", "length"), [({"fsdp": 2, "sequence": 4}, 64), ({"fsdp": 2, "sequence": 4}, 54), ({"sequence": 2, "tensor": 4}, 64)])
def test_chunks_of_the_loss_are_shared_where_lengths_are_split(mesh, length):
    """Each device computes logits of its own positions alone, in chunks: an eighth of the products, in the memory of a chunk; what is read is in order."""
    on, rows, width, vocab = zoo.layout(**mesh), 4, 32, 2048
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((rows, length, width), np.float32), rng.standard_normal((width, vocab), np.float32) / 8
    targets, weights = rng.integers(0, vocab, (rows, length)), rng.random((rows, length), np.float32)

    def program(on: parallel.Layout | None, chunk: int):
        def loss(hidden, table):
            def logits_of(hidden):
                logits = hidden @ table
                return logits if on is None else on.constrain(logits, "batch", "length", "vocab")

            sums, seen = cross_entropy_and(
                logits_of, hidden, jnp.asarray(targets), jnp.asarray(weights), chunk=chunk, layout=on, read=lambda logits, hidden: jnp.max(logits, axis=-1)
            )
            return sums.nll, seen

        spec = None if on is None else on.fitting(hidden.shape, "batch", "length", "residual")
        placed = {} if on is None else {"in_shardings": (jax.sharding.NamedSharding(on.mesh, spec), on.replicated())}
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), **placed).lower(hidden, table).compile()

    whole, chunked = program(None, rows * length), program(on, rows * length // 4)
    flops = [hlo.cost(compiled.as_text()).flops for compiled in (whole, chunked)]
    assert 8 * flops[1] <= 1.2 * 4 / 3 * flops[0], flops  # a chunk's logits are computed again
    assert chunked.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes / 8
    (expected, expected_seen), expected_grads = whole(hidden, table)
    (value, seen), grads = chunked(*(jax.device_put(x, sharding) for x, sharding in zip((hidden, table), chunked.input_shardings[0])))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(seen, expected_seen, rtol=1e-5)
    for grad, other in zip(grads, expected_grads):
        np.testing.assert_allclose(grad, other, atol=1e-5 * float(jnp.max(jnp.abs(other))))


REPLICATED = "Involuntary full rematerialization"  # a warning of XLA's partitioner: it went from one sharding to another by way of a whole array


def compile_all(families: list[str]) -> None:
    """Compiles each family under every layout and, so that a silent compiler is found out, a program that earns the warning; says which is next."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def turned(x: jax.Array) -> jax.Array:
        for spec in (P(None, "a"), P("b", None)):
            x = 2 * jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))
        return x

    print("next: warned", file=sys.stderr, flush=True)
    jax.jit(turned).lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile()
    for family in families:
        for name, mesh in MESHES.items():
            step, params = zoo.gradients(family, zoo.HOME[family], on=zoo.layout(**mesh))
            print(f"next: {family} {name}", file=sys.stderr, flush=True)
            step.lower(params, zoo.batch(zoo.HOME[family], family)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("family", list(zoo.CONFIGS))
def test_the_partitioner_never_replicates(family):
    """In a process of its own without a compile cache, as warnings are written while a program is compiled."""
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", f"import test_parallel; test_parallel.compile_all(['{family}'])"]
    told = subprocess.run(command, env=env, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stderr
    warned = [part.splitlines()[0] for part in told.split("next: ")[1:] if REPLICATED in part]
    assert warned == ["warned"]


# What does not fit.


def refused(match: str):
    return pytest.raises(ConfigError, match=match)


def test_what_cannot_be_split_is_named_with_what_fits():
    on = zoo.layout(preset="fsdp+tp", tensor=4, sequence=2)
    with refused(r"decoder/layers/mlp/wi/kernel: dimension 'mlp' of size 90 cannot be split over mesh axis tensor=4\. Axis sizes that fit: .*2.*; .*: 88 or 92\."):
        on.parameter("decoder/layers/mlp/wi/kernel", (2, 32, 90))
    with refused(r"dimension 'embed' of size 33 cannot be split over mesh axis sequence=2.*32 or 34"):
        on.parameter("decoder/layers/mlp/wi/kernel", (2, 33, 92))
    with refused(r"data\.length=101: dimension 'length' of size 101 cannot be split over mesh axis sequence=2.*100 or 102"):
        parallel.check_lengths(on, [("data.length", 101)])
    with refused(r"objective\.input_length=10: dimension 'residual_length' of size 10 cannot be split over mesh axis sequence=2 x tensor=4.*8 or 16"):
        parallel.check_lengths(zoo.layout(preset="sp", tensor=4, sequence=2), [("data.length", 16), ("objective.input_length", 10)])
    with refused(r"train\.batch_size=12 rows cannot be split over mesh axes data x fsdp = 8 devices; sizes that fit: 8 or 16"):
        parallel.check_batch(zoo.layout(fsdp=8), 12, "train.batch_size")
    with refused(r"mesh\.tensor=2, but preset dp splits nothing over it.*mesh\.tensor=1 or mesh\.preset to one of tp, fsdp\+tp, sp"):
        zoo.layout(preset="dp", data=4, tensor=2)
    with pytest.raises(AssertionError, match="lenght"):
        on.spec("batch", "lenght")


def test_a_run_whose_rows_do_not_divide_is_refused_before_it_compiles(tmp_path):
    text = runs.corpus(tmp_path / "text.txt")
    with refused(r"data\.length=16: dimension 'length' .* sequence=3"):
        run_lib.setup(runs.tiny("concat", text=text, mesh__sequence=3, mesh__data=1), devices=jax.devices()[:3])


def test_heads_of_keys_that_devices_share_stay_whole():
    """Fewer heads of keys and values than devices to split heads over: each of them serves several; a number that is no part of theirs is refused."""
    on = zoo.layout(preset="fsdp+tp", tensor=8)
    kernel = "decoder/layers/attention/key/kernel"
    assert on.parameter(kernel, (2, 32, 2, 8)).spec == P(None, ("fsdp", "sequence"), None, None)
    for size in (8, 16):
        assert on.parameter(kernel, (2, 32, size, 8)).spec == P(None, ("fsdp", "sequence"), "tensor", None)
    with refused(r"'kv_heads' of size 6 cannot be split over mesh axis tensor=8"):
        on.parameter(kernel, (2, 32, 6, 8))


def test_what_devices_cannot_share_equally_stays_whole():
    """The one position of a decoding step, and the listed positions of a query stream."""
    on = zoo.layout(preset="sp", tensor=4, sequence=2)
    for size, spec in ((16, ("sequence", "tensor")), (12, None), (1, None)):
        put = jax.jit(lambda x: on.constrain(x, "batch", "residual_length", "residual"))(jnp.zeros((2, size, 32)))
        assert put.sharding.is_equivalent_to(jax.sharding.NamedSharding(on.mesh, P(None, spec)), 3)
    assert on.spec("batch", "keys", "heads", None) == P(("data", "fsdp"), None, "tensor", None)


# Meshes of TPUs.


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of a TPU without having it."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0

    @property
    def process_index(self) -> int:
        return self.slice_index


def chips(slices: int, shape: tuple[int, int, int] = (2, 2, 4)) -> list[Chip]:
    places = [(place, index) for index in range(slices) for place in np.ndindex(*shape[::-1])]
    return [Chip(n, place[::-1], index) for n, (place, index) in enumerate(places)]


def test_data_alone_crosses_slices():
    devices = chips(4)
    on = parallel.make_layout(config.Mesh(data=-1, fsdp=4, tensor=2), devices=devices[::-1])
    assert on.mesh.devices.shape == (8, 4, 2, 1) and set(on.mesh.devices.flat) == set(devices)
    for n, replica in enumerate(on.mesh.devices):
        assert {device.slice_index for device in replica.flat} == {n // 2}
    with refused(r"mesh\.data=2 cannot be split over 4 slices .*Sizes that fit: 4, the other axes within a slice of 16 devices"):
        parallel.make_layout(config.Mesh(data=2, fsdp=32), devices=devices)


@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"data": 4, "fsdp": 4}, {"data": 1, "fsdp": 2, "tensor": 8}])
def test_axes_follow_the_links_of_a_slice(sizes):
    """Neighbours on an axis, the last one and the first too, are neighbours on the torus or as far as its sides allow."""
    devices = chips(1)
    on = parallel.make_layout(config.Mesh(**{"data": 1, **sizes}), devices=devices)
    assert set(on.mesh.devices.flat) == set(devices)
    axes = [axis for axis, size in enumerate(on.mesh.devices.shape) if size in (4, 2)]
    for axis in axes:
        lines = np.moveaxis(on.mesh.devices, axis, -1).reshape(-1, on.mesh.devices.shape[axis])
        for line in lines:
            differing = [dim for dim in range(3) if len({device.coords[dim] for device in line}) > 1]
            assert len(differing) == 1 or len(line) == 4 and len(differing) == 2, [device.coords for device in line]


# Compiled for TPUs that are not there.


@pytest.fixture(scope="module")
def topologies():
    """A function of a topology's name and its number of slices that gives its devices."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies as lib

    settings = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        options = {"platform": "tpu", "chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "wrap": (True,) * 3}
        yield lambda name, slices: lib.get_topology_desc(topology_name=name, num_slices=slices, **options).devices


@pytest.mark.plan
def test_kernels_are_gathered_and_not_summed_on_a_torus(topologies):
    """Fully sharded over a cube of 64 chips, XLA gathers kernels as such: rings that do not follow the links become sums of whole kernels."""
    on = parallel.make_layout(config.Mesh(data=1, fsdp=64), devices=list(topologies("v5p:4x4x4", 1)))
    path, kernel = "mlp/wi/kernel", jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
    shardings = (jax.sharding.NamedSharding(on.mesh, P("fsdp", None)), on.batch())
    program = jax.jit(lambda kernel, x: x @ on.gathered(path, kernel), in_shardings=shardings, out_shardings=on.batch())
    text = program.lower(kernel, jax.ShapeDtypeStruct((512, 1024), jnp.float32)).compile().as_text()
    assert "all-gather" in text and "all-reduce" not in text


@pytest.mark.plan
def test_data_alone_crosses_the_slices_of_a_topology(topologies):
    devices = list(topologies("v5p:2x2x2", 2))
    on = parallel.make_layout(config.Mesh(data=4, fsdp=2, tensor=2), devices=devices)
    assert set(on.mesh.devices.flat) == set(devices)
    assert [{device.slice_index for device in replica.flat} for replica in on.mesh.devices] == [{0}, {0}, {1}, {1}]
    with refused(r"mesh\.data=1 cannot be split over 2 slices"):
        parallel.make_layout(config.Mesh(data=1, fsdp=16), devices=devices)
