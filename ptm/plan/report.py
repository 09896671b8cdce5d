"""The facts of a plan as a page for people: what is compiled, what is computed, what is a bound under named assumptions."""

import dataclasses
from typing import Any

from ptm.plan.options import Topology
from ptm.plan.program import GIB, Facts


def bounds(facts: Facts, topology: Topology) -> dict[str, float]:
    """Seconds that a step takes at least, by what is assumed: model (its FLOPs at peak), executed (those of the program), cycles, links.

    Links: results of collectives at the makers' bytes a second of a chip's links, an all-reduce twice; only over one slice, and in each direction alike.
    """
    if facts.peak_flops is None:
        return {}
    found = {"model": facts.model_flops / facts.peak_flops, "executed": facts.executed_flops / facts.peak_flops}
    chip = topology.chip
    if facts.cycles and chip.clock is not None:
        found["cycles"] = facts.cycles / (chip.clock * 1e9)
    if chip.links is not None:
        found["links"] = sum(moved.bytes * (2 if moved.kind == "all-reduce" else 1) for moved in facts.collectives) / chip.links
    return found


def as_dict(facts: Facts, topology: Topology) -> dict[str, Any]:
    """The facts as JSON has them, with the bounds."""
    return {**dataclasses.asdict(facts), "collective_bytes": facts.collective_bytes, "bounds_s": bounds(facts, topology)}


def page(facts: Facts, topology: Topology) -> str:
    """The report of one program."""
    compiled = "[compiled for CPUs]" if facts.note else "[compiled]"
    lines = [("topology", f"{facts.topology}, {topology.chips} devices; {facts.compiler}")]
    if facts.note:
        lines.append(("note", facts.note))
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts.mesh.items() if size > 1) or "one device"
    lines.append(("mesh", f"{mesh}, preset {facts.preset}; recomputed in the backward pass: {facts.remat}"))
    lines.append(("parameters", f"{facts.parameters:,}; training state {size_of(facts.state_total)}, {size_of(facts.state)} a device  [computed]"))
    if not facts.hbm:
        lines.append(("compiled", f"REFUSED after {facts.seconds:.0f} s: {facts.refusal}  {compiled}"))
        return _table(lines)
    limit = topology.chip.hbm if topology.chip and not facts.note else None
    verdict = f"DOES NOT FIT: {facts.refusal}" if not facts.fits else f"fits in {limit:.2f} GiB" if limit else "compiles"
    lines.append(("compiled", f"{verdict}; in {facts.seconds:.0f} s  {compiled}"))
    parts = {"arguments": facts.arguments, "temporary": facts.temporary, "outputs": facts.outputs}
    memory = f"{size_of(facts.hbm)} ({' + '.join(f'{name} {size_of(size)}' for name, size in parts.items())}; at its peak {size_of(facts.peak)})"
    lines.append(("memory", f"{memory} a device  {compiled}"))
    lines.append(("", "of the training step alone: evaluation, checkpoints and batches in flight come on top"))
    model, executed, ratio = _flops(facts.model_flops), _flops(facts.executed_flops), facts.executed_flops / facts.model_flops
    lines.append(("FLOPs", f"model {model} a device and step  [formula]; executed {executed}, {ratio:.2f}x  {compiled}"))
    if facts.kernels:
        kernels = ", ".join(f"{name} x{calls}" for name, calls in facts.kernels.items())
        lines.append(("kernels", f"{kernels}  {compiled}; their FLOPs and cycles are in no other figure"))
    for moved in facts.collectives:
        lines.append(("collectives", f"{moved.kind} over {moved.axes}: {moved.calls} calls, {size_of(moved.bytes)}  {compiled}"))
    if facts.collectives:
        lines.append(("", f"{facts.asynchronous} of these calls are asynchronous"))
    lines += [("warning", warning) for warning in facts.warnings]
    end = f"{facts.tokens * facts.steps:,} positions in {facts.steps:,} steps"
    found = bounds(facts, topology)
    if found:
        shown = {"model": "model FLOPs at peak", "executed": "executed FLOPs at peak", "cycles": "compiler's cycles", "links": "collectives at the makers' link rate"}
        lines.append(("bounds", ", ".join(f"{shown[key]} {1e3 * seconds:.1f} ms" for key, seconds in found.items()) + "  [guessed]"))
        least = max(found.values())
        end += f": at least {facts.steps * least / 3600:.2f} h, at most {100 * found['model'] / least:.0f} % of peak  [guessed]"
    lines.append(("to the end", end))
    return _table(lines)


def size_of(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _flops(count: float) -> str:
    return f"{count / 1e12:.2f} T" if count >= 1e11 else f"{count / 1e9:.3f} G"


def _table(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{head if not n or head != lines[n - 1][0] else '':<12} {text}".rstrip() for n, (head, text) in enumerate(lines))

