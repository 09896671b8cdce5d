"""The training step of a run, compiled for devices that need not be there, and what the compiled program says of itself."""

import contextlib
import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ptm import run as run_lib
from ptm import timing, tree
from ptm.fields import ConfigError
from ptm.objectives import distillation
from ptm.plan import hlo
from ptm.plan.devices import Devices
from ptm.plan.options import Topology
from ptm.run import Run

GIB = 2**30
REMATERIALIZED = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes that one device receives in the calls of a kind of collective over some mesh axes, in one step."""

    kind: str
    axes: str
    calls: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a step of a run on a topology; sizes in bytes, all of one device but for `parameters`, `state_total` and `tokens`.

    fits: whether the compiler took the program, else `refusal` says why not. arguments, temporary, outputs (that take the place of no argument), peak: the compiler's buffers. model_flops: by
    formula, three forward passes; executed_flops: of the compiled program, recomputation included, Pallas kernels not. cycles: the compiler's estimates, of TPUs alone.
    """

    topology: str
    compiler: str
    note: str
    mesh: dict[str, int]
    preset: str
    remat: str  # what layers recompute, chosen if that was left to a budget
    name: str  # of the objective, where several take turns
    parameters: int
    state_total: int
    state: int
    tokens: int
    steps: int
    model_flops: float
    peak_flops: float | None
    fits: bool
    refusal: str = ""
    seconds: float = 0.0
    hbm: int = 0
    arguments: int = 0
    temporary: int = 0
    outputs: int = 0
    peak: int = 0
    executed_flops: int = 0
    cycles: int = 0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    collectives: tuple[Moved, ...] = ()
    asynchronous: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def collective_bytes(self) -> int:
        return sum(moved.bytes for moved in self.collectives)


def build(config: Any, topology: Topology, devices: Devices) -> Run:
    """The abstract Run of a config on the devices of a topology. Raises ConfigError for what cannot run there, or cannot be planned."""
    if isinstance(config.objective, distillation.Config):
        raise ConfigError("`ptm plan` cannot plan a distillation: the step takes the teacher's parameters, which are read. Plan the student's objective alone.")
    return run_lib.setup(config, devices=devices.devices, abstract=True)


def compile_step(run: Run, topology: Topology, devices: Devices, *, compiler_options: dict[str, str] | None = None) -> Facts:
    """Compiles the step that `ptm train` would run, for the first of the objectives that take turns, and reads what it needs."""
    layout, config = run.layout, run.config
    state = run.abstract_state
    known = {
        "topology": topology.name, "compiler": devices.compiler, "note": devices.note, "mesh": dict(layout.mesh.shape), "preset": layout.preset, "remat": run.model.module.context.remat,
        "name": run.branches[0].name, "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.abstract_params)),
        "state_total": sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)),
        "state": sum(_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(state)),
        "tokens": run.tokens_per_step(), "steps": config.train.steps, "model_flops": 3 * run.forward_flops() / layout.mesh.size,
        "peak_flops": None if topology.platform == "cpu" or devices.note else timing.peak_flops(devices.devices[0].device_kind),
    }  # fmt: skip
    began = time.monotonic()
    with _compiler_log() as said:
        try:
            lowered = run.train_step.lower(state, run.abstract_batch())
            compiled = lowered.compile(compiler_options=compiler_options or None)
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if "RESOURCE_EXHAUSTED" not in text and "exceeds" not in text:
                raise ConfigError(f"the compiler of {topology.name} refuses the program: {text.splitlines()[0]}") from None
            return Facts(**known, fits=False, refusal=_exhausted(text), seconds=time.monotonic() - began)
    memory = compiled.memory_analysis()
    found = hlo.cost(compiled.as_text())
    seconds = time.monotonic() - began
    hbm = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    chip = topology.chip
    limit = None if chip is None or chip.hbm is None or devices.note else chip.hbm * GIB  # another compiler's memory proves nothing
    fits = limit is None or hbm <= limit
    return Facts(
        **known, fits=fits, refusal="" if fits else f"{hbm / GIB:.2f} GiB are more than the {limit / GIB:.2f} GiB of a device", seconds=seconds, hbm=hbm,
        arguments=memory.argument_size_in_bytes, temporary=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes, peak=memory.peak_memory_in_bytes, executed_flops=found.flops,
        cycles=found.cycles, kernels=found.kernels, collectives=moved(found, layout.mesh), asynchronous=found.asynchronous,
        warnings=tuple(_warnings(found, run, said)),
    )  # fmt: skip


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _exhausted(text: str) -> str:
    """The compiler's own words on what does not fit."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if "exceeds" in line or "Exceeded" in line), lines[0])
    return said.partition("RESOURCE_EXHAUSTED: ")[2] or said


def axes_of(members: tuple[int, ...], mesh: jax.sharding.Mesh) -> str:
    """The mesh axes along which the devices of a group differ, given their places in the mesh; none given = along all."""
    if not members:
        return " x ".join(axis for axis, size in mesh.shape.items() if size > 1)
    places = np.stack(np.unravel_index(np.asarray(members), tuple(mesh.shape.values())), axis=-1)
    return " x ".join(axis for axis, column in zip(mesh.axis_names, places.T) if len(set(column.tolist())) > 1)


def moved(found: hlo.Cost, mesh: jax.sharding.Mesh) -> tuple[Moved, ...]:
    """What a device receives in one call of a program, by kind of collective and mesh axes."""
    table: dict[tuple[str, str], list[int]] = {}
    for entry in found.collectives:
        row = table.setdefault((entry.kind, axes_of(entry.members, mesh)), [0, 0])
        row[0] += entry.calls
        row[1] += entry.bytes
    return tuple(Moved(kind, axes, calls, size) for (kind, axes), (calls, size) in table.items())


def _warnings(found: hlo.Cost, run: Run, said: list[str]) -> Iterator[str]:
    """What in the compiled program is probably not meant."""
    mesh = run.layout.mesh
    flat = tree.paths(run.abstract_params)
    largest = max(flat, key=lambda path: math.prod(flat[path].shape))
    parts = math.prod(flat[largest].shape) // math.prod(flat[largest].sharding.shard_shape(flat[largest].shape))
    kinds = {entry.kind for entry in found.collectives if "fsdp" in axes_of(entry.members, mesh)}
    if mesh.shape["fsdp"] > 1 and parts > 1 and "all-reduce" in kinds and "all-gather" not in kinds:
        yield "parameters are gathered by all-reduces, twice the bytes: the order of the devices, or a topology whose rings are open"
    if count := sum(REMATERIALIZED in line for line in said):
        yield f"{count} arrays are brought together whole to be split another way (XLA: {REMATERIALIZED.lower()})"
    if found.windowed:
        yield f"{found.windowed} rounds of loops pass operands around piece by piece (windowed einsum): their cycles are estimated too high"
    if found.unknown_loops:
        yield f"{found.unknown_loops} loops without a number of rounds that can be read are counted once"


@contextlib.contextmanager
def _compiler_log() -> Iterator[list[str]]:
    """What is written to the process's standard error meanwhile, which the compiler does directly; it is shown to nobody."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
