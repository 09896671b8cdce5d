"""`ptm plan`: compiles the step of a config for a topology and tells what it needs, or looks for the settings that suit it best."""

import sys
from collections.abc import Sequence
from typing import Any

from ptm import registry
from ptm.nn.attention import REFUSALS
from ptm.plan import report
from ptm.plan import search as search_lib
from ptm.plan.devices import devices_of
from ptm.plan.options import Options, parse_topology
from ptm.plan.program import build, compile_step


def plan(config: Any, options: Options) -> tuple[str, dict[str, Any]]:
    """The page and the facts of a config's step. Raises ConfigError for what cannot run or be planned."""
    topology = parse_topology(options.topology)
    devices = devices_of(topology)
    run = build(registry.resolve(config), topology, devices)
    facts = compile_step(run, topology, devices, compiler_options=dict(entry.split("=", 1) for entry in options.compiler))
    return report.page(facts, topology), report.as_dict(facts, topology)


def search(config: Any, options: Options, given: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The best settings that fit, a line each, and their facts; `given` are the arguments that name the config. Tries are told on standard error."""
    found = search_lib.search(
        options, config, given, [name for name in REFUSALS if name != "xla"], told=lambda line: print(line, file=sys.stderr, flush=True)
    )
    shown = found[: search_lib.SHOWN]
    page = "\n".join(map(search_lib.line, shown)) if shown else f"Nothing that was tried fits {options.topology}: take more or larger devices, or a smaller batch."
    return page, {"best": [{"overrides": entry.overrides, "facts": entry.facts} for entry in shown]}
