"""`ptm plan`: the walk over compiled programs against counts by hand, the plan against the step that trains, names and errors, the search."""

import functools
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ptm import cli, labels, recipe, registry
from ptm import config as config_lib
from ptm import run as run_lib
from ptm.fields import ConfigError
from ptm.models import bert
from ptm.objectives import classify, distillation, mlm
from ptm.plan import devices, hlo, options, program, report, search
from ptm.plan.devices import Devices, devices_of

ROOT = Path(__file__).parent.parent
WIDTH, LAYERS = 16, 5
needs_cuda = pytest.mark.skipif(not devices.cuda_compiler(), reason="the compiler of GPUs is not installed (extra plan_gpu)")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra plan)")


def text_of(function, *shapes, **jitted) -> str:
    return jax.jit(function, **jitted).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def stack(x, w, *, unroll: int, remat: bool = False):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w, unroll=unroll)[0])


PRODUCT = 2 * 8 * WIDTH * WIDTH
SHAPES = ((8, WIDTH), (LAYERS, WIDTH, WIDTH))


@pytest.mark.parametrize("unroll", [1, LAYERS])
def test_walk_counts_the_rounds_of_a_loop(unroll):
    assert hlo.cost(text_of(functools.partial(stack, unroll=unroll), *SHAPES)).flops == LAYERS * PRODUCT


@pytest.mark.parametrize("unroll", [1, LAYERS])
def test_walk_counts_backward_products(unroll):
    # Of each layer one product forward and two backward, but for the first layer's gradient of the input, which nobody asks for.
    gradient = jax.grad(functools.partial(stack, unroll=unroll), argnums=1)
    found = hlo.cost(text_of(gradient, *SHAPES))
    assert found.flops in ((3 * LAYERS - 1) * PRODUCT, 3 * LAYERS * PRODUCT) and (unroll == 1 or found.flops == (3 * LAYERS - 1) * PRODUCT)
    assert found.unknown_loops == 0


def test_walk_counts_recomputation():
    plain, again = (hlo.cost(text_of(jax.grad(functools.partial(stack, unroll=1, remat=remat), argnums=1), *SHAPES)).flops for remat in (False, True))
    assert again == plain + LAYERS * PRODUCT


def test_walk_counts_nested_loops_and_the_larger_branch():
    def nested(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    assert hlo.cost(text_of(nested, *SHAPES)).flops == 3 * LAYERS * PRODUCT

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[2])

    assert hlo.cost(text_of(branch, *SHAPES)).flops == 2 * PRODUCT


@pytest.mark.parametrize(
    ("window", "padding", "dilation", "expected"),
    [
        ((3,), "VALID", 1, 2 * 2 * 6 * 3 * 4 * 5),
        # In place 0 and 7 of 8 one of three taps falls on padding.
        ((3,), "SAME", 1, 2 * 2 * (8 * 3 - 2) * 4 * 5),
        ((3,), "VALID", 2, 2 * 2 * 4 * 3 * 4 * 5),
    ],
)
def test_walk_counts_convolutions_without_their_padding(window, padding, dilation, expected):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), padding, rhs_dilation=(dilation,), dimension_numbers=("NHC", "HIO", "NHC"))

    assert hlo.cost(text_of(convolve, (2, 8, 4), (*window, 4, 5))).flops == expected


def test_walk_reads_collectives_with_their_groups():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "fsdp"), PartitionSpec()))

    def gather(x):
        return jax.lax.with_sharding_constraint(jnp.sin(x), whole)

    text = jax.jit(gather, in_shardings=split, out_shardings=whole).lower(jax.ShapeDtypeStruct((16, 32), jnp.float32)).compile().as_text()
    (found,) = hlo.cost(text).collectives
    assert (found.kind, found.calls, found.bytes) == ("all-gather", 1, 16 * 32 * 4)
    assert program.axes_of(found.members, mesh) == "fsdp"


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("replica_groups=[2,4]<=[8]", "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", "fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp"),
        ("source_target_pairs={{0,0},{0,1},{1,2}}", "fsdp"),
        ("replica_groups={}", "data x fsdp"),
    ],
)
def test_groups_are_read_in_every_form(written, axes):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    assert program.axes_of(hlo._members(written), mesh) == axes


TPU_TEXT = """HloModule step

%fused (p0: bf16[8,16], p1: bf16[16,4]) -> bf16[8,4] {
  %p0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%n, %two)
  %w = bf16[16,4]{1,0} custom-call(), custom_call_target="tpu_custom_call", backend_config={"kernel_metadata":"{
}
{"}, metadata={op_name="jit(step)/splash_fwd"}
  %y = bf16[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"100"}
  %g = (bf16[8,4]{1,0}, bf16[8,16]{1,0}) all-gather-start(%y), channel_id=3, replica_groups=[1,4]<=[4], dimensions={1}
  %d = bf16[8,16]{1,0} all-gather-done(%g)
  ROOT %out = (s32[], bf16[8,16]{1,0}) tuple(%next, %d)
}

%condition (arg: (s32[], bf16[8,16])) -> pred[] {
  %arg = (s32[], bf16[8,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  %bound = s32[] constant(10)
  ROOT %less = pred[] compare(%n, %bound), direction=LT
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %last = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_walk_reads_the_text_of_the_tpu_compiler():
    """Loops by bound and step, products as convolutions, cycles, kernels whose metadata breaks lines, asynchronous gathers."""
    found = hlo.cost(TPU_TEXT)
    assert found.flops == 5 * 2 * 8 * 16 * 4 and found.cycles == 500 and found.kernels == {"splash_fwd": 5} and found.asynchronous == 5
    assert found.collectives == (hlo.Collective("all-gather", (0, 1, 2, 3), 5, 5 * 8 * 16 * 2, 8 * 16 * 2),)


def tiny(word: str = "gpt", **changes) -> config_lib.ConfigDict:
    config = recipe.load(f"{ROOT}/configs/quickstart.py:{word},tiny")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


@pytest.mark.parametrize("word", ["gpt", "bert", "t5"])
def test_a_plan_compiles_the_step_that_trains(word):
    """The same program, instruction by instruction, as from the run that opens its data and holds its batches."""
    config = tiny(word, mesh__data=2, mesh__fsdp=4)
    real = run_lib.setup(config)
    topology = options.parse_topology("cpu:8")
    planned = program.build(registry.resolve(config), topology, devices_of(topology))
    batch = next(real.loader())
    shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in planned.abstract_batch().items()} == shapes
    rows = list(range(config.train.batch_size))
    device_batch = real.to_device(batch, batch_size=config.train.batch_size, rows=rows)
    texts = [run.train_step.lower(run.abstract_state, given).as_text() for run, given in ((real, device_batch), (planned, planned.abstract_batch()))]
    assert texts[0] == texts[1]


def test_facts_add_up():
    topology = options.parse_topology("cpu:8")
    devices = devices_of(topology)
    facts = {}
    for axis in ("data", "fsdp"):
        config = registry.resolve(tiny("gpt", mesh__data=8 if axis == "data" else 1, mesh__fsdp=1 if axis == "data" else 8))
        facts[axis] = program.compile_step(program.build(config, topology, devices), topology, devices)
    assert facts["data"].state == facts["data"].state_total == facts["fsdp"].state_total
    assert math.isclose(facts["fsdp"].state, facts["fsdp"].state_total / 8, rel_tol=0.1)
    assert facts["fsdp"].arguments < facts["data"].arguments
    assert {moved.kind for moved in facts["data"].collectives} == {"all-reduce"} and "all-gather" in {moved.kind for moved in facts["fsdp"].collectives}
    for found in facts.values():
        assert found.fits and 0.9 < found.executed_flops / found.model_flops < 1.3
        page, told = report.page(found, topology), json.loads(json.dumps(report.as_dict(found, topology)))
        assert f"{found.parameters:,}" in page and told["state"] == found.state and "[compiled]" in page and not told["bounds_s"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p", "names no topology"), ("v9:4x4", "Known: "), ("v5p:4x4", "has 3 dimensions"), ("v5e:4x4x4", "has 2 dimensions"), ("v5e:3x4", "hosts have 2x2"),
        ("v5e:32x32", "at most 16x16"), ("gpu:a100x8", "kind of GPU"), ("cpu:0", "names no topology"),
    ],
)  # fmt: skip
def test_topologies_are_refused_by_name(name, said):
    with pytest.raises(ConfigError, match=said):
        options.parse_topology(name)


@pytest.mark.parametrize(("name", "chips", "wrap"), [
    ("v5p:4x4x4", 64, (True,) * 3), ("v5p:2x2x1", 4, (False,) * 3), ("v5e:16x16", 256, (True, True, False)), ("v5e:4x4", 16, (False,) * 3), ("2*v5p:8x8x8", 1024, (True,) * 3),
])  # fmt: skip
def test_topologies_by_name(name, chips, wrap):
    topology = options.parse_topology(name)
    assert (topology.chips, topology.wrap, topology.name) == (chips, wrap, name)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="8 CPU devices, 4096 are needed"):
        devices_of(options.parse_topology("cpu:4096"))


def test_an_abstract_run_opens_no_data():
    config = tiny("bert")
    config.data.source = ("text:/nowhere/at/all.txt",)
    config.tokenizer.update(kind="wordpiece", vocab_size=500)
    run = run_lib.setup(config, abstract=True)
    assert run.tokenizer.vocab_size == 500 and run.model.config.vocab_size == 500
    with pytest.raises(ConfigError, match="nowhere"):
        run_lib.setup(config)


def test_labels_are_assumed():
    config = config_lib.base(model=bert.BertConfig(num_layers=1, width=16, num_heads=2), objective=classify.Config(class_weights=("balanced",)))
    found = labels.assumed(registry.resolve(config)).objective
    assert len(found.labels) == 2 and found.class_weights == ()


def test_a_distillation_is_refused():
    objective = distillation.Config(teacher="ckpt:somewhere", parts={"student": mlm.Config()})
    config = config_lib.base(model=bert.BertConfig(num_layers=1, width=16, num_heads=2), objective=objective)
    with pytest.raises(ConfigError, match="distillation"):
        program.build(registry.resolve(config), options.parse_topology("cpu:8"), Devices(jax.devices(), "here"))


def invented(best: dict[str, str]):
    """Runs of a search whose programs are the faster the more settings they share with `best`; with all recomputed nothing fits."""

    def run(chosen, given, overrides):
        close = sum(overrides.get(key) == value for key, value in best.items())
        fits = overrides.get("compute.remat") != "full"
        facts = {"fits": fits, "hbm": 2**30, "refusal": "", "tokens": 1000, "bounds_s": {"cycles": 1.0 / (1 + close), "links": 0.1}}
        return search.Try(overrides, facts)

    return run


def test_a_mesh_that_is_so_already_is_no_change():
    assert search.sizes(registry.resolve(tiny("gpt", mesh__data=1, mesh__fsdp=-1)), 64) == {"mesh.data": 1, "mesh.fsdp": 64, "mesh.tensor": 1, "mesh.sequence": 1}
    told: list[str] = []
    chosen = options.Options(topology="v5p:4x4x4", search=True, tries=7)
    search.search(chosen, registry.resolve(tiny("gpt", mesh__data=1, mesh__fsdp=-1)), [], ["auto"], told=told.append, run=invented({}))
    laid = [line.partition("GiB")[2] for line in told]
    assert sum("mesh" not in line for line in laid) == 1 and any("data=8" in line and "fsdp=8" in line for line in laid) and len(set(laid)) == 7


def test_search_finds_the_best_that_fits():
    best = {"mesh.tensor": "2", "compute.remat": "dots", "compute.attention": "chunked"}
    chosen = options.Options(topology="v5p:2x2x1", search=True)
    told: list[str] = []
    found = search.search(chosen, registry.resolve(tiny()), [], ["auto", "chunked"], told=told.append, run=invented(best))
    assert best.items() <= found[0].overrides.items() and all(entry.fits for entry in found)
    assert [entry.cost for entry in found] == sorted(entry.cost for entry in found)
    assert "--config.compute.remat=dots" in search.line(found[0]) and any("does not fit" in line for line in told)
    few = options.Options(topology="v5p:2x2x1", search=True, tries=3)
    told.clear()
    search.search(few, registry.resolve(tiny()), [], ["auto"], told=told.append, run=invented(best))
    assert len(told) == 3 and len({line.partition(": ")[2] for line in told}) == 3


def test_command_line(capfd):
    assert cli.main(["plan", f"--config={ROOT}/configs/quickstart.py:gpt,tiny", "--topology=cpu:4", "--config.mesh.fsdp=2"]) == 0
    *page, last = capfd.readouterr().out.splitlines()
    facts = json.loads(last)
    assert facts["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1} and any(line.startswith("memory") for line in page)
    for words, said in [
        ([], "needs --topology"), (["--topology=v5p:4"], "has 3 dimensions"), (["--topology=cpu:4", "--config.mesh.fsdp=3"], "do not multiply"),
        (["--topology=cpu:4", "--tries=0"], "out of range"), (["--topology=cpu:4", "--compiler=x"], "NAME=VALUE"),
    ]:  # fmt: skip
        assert cli.main(["plan", f"--config={ROOT}/configs/quickstart.py:gpt,tiny", *words]) == 2
        assert said in capfd.readouterr().err


@pytest.mark.plan
@needs_libtpu
def test_tpu_compiler():
    """What is said of a program compiled for TPUs: the walk of a loop is that of its unrolled layers; parameters are gathered; too much is refused."""
    found = {}
    base = [f"--config={ROOT}/configs/quickstart.py:gpt,tiny", "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4"]
    for name, words in {
        "scan": [], "unrolled": ["--config.compute.scan_layers=false"], "huge": ["--config.train.batch_size=4194304", "--config.compute.loss_chunk=1000000000"],
    }.items():  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "ptm.cli", "plan", *base, *words], capture_output=True, text=True, timeout=500, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
    assert np.isclose(found["scan"]["executed_flops"], found["unrolled"]["executed_flops"], rtol=0.01)
    assert found["scan"]["cycles"] > 0 and "all-gather" in {moved["kind"] for moved in found["scan"]["collectives"]}
    assert not found["huge"]["fits"] and "RESOURCE" not in found["huge"]["refusal"] and found["huge"]["refusal"]


@pytest.mark.plan
@needs_cuda
@pytest.mark.parametrize("family", ["gpt", "t5"])
def test_gpu_compiler(family):
    """Of H100s, without one: fused attention, with T5's bias too, is traced, split and compiled, with its backward pass."""
    words = ["--config.compute.dtype=bfloat16", "--config.mesh.fsdp=8", "--config.mesh.data=1", "--config.train.batch_size=8"]
    command = [sys.executable, "-m", "ptm.cli", "plan", f"--config={ROOT}/configs/quickstart.py:{family},tiny", "--topology=gpu:h100x8", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fits"] and found["executed_flops"] > 0.5 * found["model_flops"]
    assert any("fmha" in name for name in found["kernels"]) and any("fmha" in name and "Backward" in name for name in found["kernels"]), found["kernels"]
