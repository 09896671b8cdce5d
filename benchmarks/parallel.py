"""Every family under every layout on eight fake CPU devices beside one device.

    python benchmarks/parallel.py [--only gpt,bert] [--layouts fsdp,cp]

The table has the small models, batches and tolerances of tests/test_parallel.py, each family with its own objective: the relative difference of the
loss; the largest difference of a gradient as a share of what is allowed (1e-5 * sqrt(layers) of the tensor's largest entry); bytes of parameters and
AdamW's state on a device, of wider models, times the number of devices and divided by all of them (1 = nothing is held twice; under dp 8); and what XLA's
partitioner warns of ("involuntary full rematerialization"). A JSON line a row is written to benchmarks/results/parallel.jsonl (an earlier line of the same row is
replaced). How a step grows with their number is in benchmarks/scaling.py.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before JAX starts: its devices, and warnings of the compiler, which a cached program does not repeat.
os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "1"}
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/parallel.jsonl"
sys.path.insert(0, str(ROOT / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
import test_parallel
import zoo

from ptm import config, optim, tree
from ptm.models import MODELS


@contextlib.contextmanager
def compiler_output() -> Iterator[list[str]]:
    """A list that gets, at the end, the lines that libraries wrote to the process's stderr."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def compare(family: str, layout: str) -> dict[str, Any]:
    """A row of the table."""
    name, on = zoo.HOME[family], zoo.layout(**test_parallel.MESHES[layout])
    step, params = zoo.gradients(family, name, on=on)
    batch = jax.device_put(zoo.batch(name, family), on.batch())
    with compiler_output() as lines:
        compiled = step.lower(params, batch).compile()
    loss, grads = compiled(params, batch)
    expected_loss, expected = zoo.reference(family, name)
    expected, grads = tree.paths(expected), tree.paths(grads)
    allowed = zoo.allowed(expected)
    worst = {path: float(np.max(np.abs(np.asarray(grads[path]) - np.asarray(leaf)))) / allowed[path] for path, leaf in expected.items()}
    return {
        "loss_difference": float(jnp.abs(loss - expected_loss) / jnp.abs(expected_loss)), "gradient_of_allowed": max(worst.values()),
        "gradient_path": max(worst, key=worst.get), "state_times_devices": state_share(family, on), "warnings": sum("nvoluntary full" in line for line in lines),
    }  # fmt: skip


def state_share(family: str, on: Any) -> float:
    """Bytes of parameters and AdamW's state on a device x devices / all bytes."""
    _, shapes = test_parallel.wide(family)
    rule = optim.make(config.Optimizer(), config.Schedule(), steps=1, params=shapes)
    mine, total = test_parallel.held({"params": shapes, "opt_state": jax.eval_shape(rule.transform.init, shapes)}, on, shapes)
    return mine * on.mesh.size / total


def main() -> None:
    """Measures, prints and writes the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MODELS), help="families, separated by commas")
    parser.add_argument("--layouts", default=",".join(test_parallel.MESHES), help="layouts, separated by commas")
    flags = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"time": time.strftime("%Y-%m-%d"), "commit": commit, "device": f"{os.cpu_count()} x {platform.machine()} CPU", "jax": jax.__version__}
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []

    def note(key: dict[str, Any], row: dict[str, Any]) -> None:
        nonlocal kept
        kept = [other for other in kept if {name: other.get(name) for name in key} != key] + [key | row | about]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept))
        print("| " + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in (key | row).values()) + " |", flush=True)

    for family in flags.only.split(","):
        for layout in flags.layouts.split(","):
            note({"table": "layouts", "family": family, "layout": layout, "mesh": test_parallel.MESHES[layout]}, compare(family, layout))


if __name__ == "__main__":
    main()
