"""The settings that suit a run best on a topology: one kind of setting after the other, each program compiled in a process of its own."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ptm.config import Config, flatten
from ptm.plan.options import Options, Topology, parse_topology
from ptm.plan.report import size_of

Overrides = dict[str, str]
SHOWN = 5
TENSOR = (1, 2, 4, 8)  # beyond a host of TPUs or GPUs products wait for sums
REPLICAS, LEAST = (4, 8), 8  # copies of the state that are tried, each over so many devices at least
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Try:
    """Overrides and what became of them: the facts as JSON has them, or why there are none."""

    overrides: Overrides
    facts: dict[str, Any] | None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        return self.facts is not None and self.facts["fits"]

    @property
    def cost(self) -> float:
        """Seconds for a position of the batch, the programs being compared: compiler's cycles (else executed FLOPs at peak) and links, one after the other."""
        if not self.fits or not self.facts["bounds_s"]:
            return math.inf
        bounds = self.facts["bounds_s"]
        compute = bounds["cycles"] if "cycles" in bounds else bounds["executed"]
        return (compute + (bounds["links"] if "links" in bounds else 0.0)) / self.facts["tokens"]


def meshes(topology: Topology, config: Config) -> Iterator[Overrides]:
    """Ways to lay the devices out, of a slice each: all over fsdp, some of them over tensor or over data, all over data; slices go over data."""
    count = math.prod(topology.shape)
    for tensor in TENSOR:
        if count % tensor == 0:
            yield {"mesh.data": str(topology.slices), "mesh.fsdp": str(count // tensor), "mesh.tensor": str(tensor), "mesh.sequence": "1"}
    for copies in REPLICAS:
        if count % copies == 0 and count // copies >= LEAST:
            yield {"mesh.data": str(topology.slices * copies), "mesh.fsdp": str(count // copies), "mesh.tensor": "1", "mesh.sequence": "1"}
    if count > 1:
        yield {"mesh.data": str(topology.chips), "mesh.fsdp": "1", "mesh.tensor": "1", "mesh.sequence": "1"}


def sizes(config: Config, chips: int) -> dict[str, int]:
    """The mesh's sizes as a config has them, that of -1 filled in."""
    given = {key: value for key, value in flatten(config).items() if key in ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence")}
    return {key: chips // -math.prod(given.values()) if value == -1 else value for key, value in given.items()}


def candidates(topology: Topology, config: Config, backends: Sequence[str]) -> list[list[Overrides]]:
    """For each kind of setting the ways to set it: mesh, recomputation, attention, batch size with the same tokens for a row."""
    rows = config.train.batch_size
    return [
        list(meshes(topology, config)),
        [{"compute.remat": policy} for policy in REMAT],
        [{"compute.attention": backend} for backend in backends],
        [{"train.batch_size": str(size)} for size in (rows // 2, 2 * rows, 4 * rows) if size],
    ]


def search(
    options: Options, config: Config, given: Sequence[str], backends: Sequence[str], *, told: Callable[[str], None], run: Callable[..., Try] | None = None
) -> list[Try]:
    """The tries that fit, best first. `given` are the arguments of `ptm plan` that name the config; `told` hears of each try as it ends."""
    run, topology = run or _compiled, parse_topology(options.topology)
    given_values = flatten(config) | sizes(config, topology.chips)
    tried: dict[tuple, Try] = {}

    def attempt(overrides: Overrides) -> Try:
        overrides = {key: value for key, value in overrides.items() if value != str(given_values[key])}  # what is so already is no change
        key = tuple(sorted(overrides.items()))
        if key not in tried:
            tried[key] = run(options, given, overrides)
            told(f"{len(tried)}: {line(tried[key])}")
        return tried[key]

    best = attempt({})
    for ways in candidates(topology, config, backends):
        base = best.overrides
        for change in ways:
            if len(tried) >= options.tries:
                break
            found = attempt({**base, **change})
            if found.cost < best.cost or (found.fits and not best.fits):
                best = found
    return sorted((entry for entry in tried.values() if entry.fits), key=lambda entry: (entry.cost, entry.facts["hbm"]))


def line(entry: Try) -> str:
    """A try in one line, with what to paste."""
    words = " ".join(f"--config.{key}={value}" for key, value in entry.overrides.items()) or "(as given)"
    if entry.facts is None:
        return f"not planned, {entry.refusal}: {words}"
    hbm = size_of(entry.facts["hbm"]) if entry.facts["hbm"] else entry.facts["refusal"]
    if not entry.fits:
        return f"does not fit, {hbm}: {words}"
    cost = "" if math.isinf(entry.cost) else f", {1e3 * entry.cost * entry.facts['tokens']:.1f} ms a step, {1e9 * entry.cost:.2f} ns a position [guessed]"
    return f"{hbm}{cost}: {words}"


def _compiled(options: Options, given: Sequence[str], overrides: Overrides) -> Try:
    words = [*given, *(f"--config.{key}={value}" for key, value in overrides.items()), f"--topology={options.topology}"]
    if options.compiler:
        words.append("--compiler=" + ",".join(options.compiler))
    try:
        done = subprocess.run([sys.executable, "-m", "ptm.cli", "plan", *words], capture_output=True, text=True, timeout=options.timeout, env=os.environ)
    except subprocess.TimeoutExpired:
        return Try(overrides, None, f"more than {options.timeout:.0f} s")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return Try(overrides, None, said[-1].removeprefix("ptm: ") if said else f"exit code {done.returncode}")
    return Try(overrides, json.loads(done.stdout.splitlines()[-1]))
