"""What the models of configs/scale.py need on pods, as `ptm plan` tells it: the table of docs/scale.md.

    pip install -e '.[plan]' && python benchmarks/plans.py [--models gpt_1b,t5_11b] [--topologies v5p:4x4x4] [--set compute.remat=dots] [--note TEXT]

8,192 positions a device, all devices over fsdp, everything recomputed, parameters and state in float32, activations in bfloat16, unless `--set` says other. A JSON line for
each program is added to benchmarks/results/plans.jsonl; the compiler's version is among its facts, since figures move with it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ptm.plan.options import parse_topology

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/plans.jsonl"
MODELS = ("gpt_1b", "gpt_7b", "bert_large", "t5_3b", "t5_11b")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8")
POSITIONS = {"gpt_1b": 2048, "gpt_7b": 2048, "bert_large": 512, "t5_3b": 626, "t5_11b": 626}  # of a row
GIB = 2**30


def plan(model: str, topology: str, changes: list[str], timeout: float) -> dict[str, Any]:
    """The facts of a model on a topology, or why there are none."""
    words = [f"--config.train.batch_size={8192 // POSITIONS[model] * parse_topology(topology).chips}", *(f"--config.{change}" for change in changes)]
    command = [sys.executable, "-m", "ptm.cli", "plan", f"--config=configs/scale.py:{model}", f"--topology={topology}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {timeout:.0f} s"}
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"error": done.stderr.strip().splitlines()[-1]}


def row(model: str, topology: str, facts: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in facts:
        return f"| {model} | {topology} | not planned: {facts['error']} | | | | |"
    if not facts["hbm"]:
        return f"| {model} | {topology} | no: {facts['refusal']} | | | | |"
    moved = ", ".join(f"{entry['kind']} {entry['axes']} {entry['bytes'] / GIB:.2f}" for entry in facts["collectives"] if entry["bytes"] > GIB / 10)
    fits = f"{facts['hbm'] / GIB:.2f}" + ("" if facts["fits"] else " (does not fit)")
    ratio = facts["executed_flops"] / facts["model_flops"]
    return f"| {model} | {topology} | {fits} | {facts['state'] / GIB:.2f} | {facts['cycles'] / 1e6:.0f} | {facts['executed_flops'] / 1e12:.1f} ({ratio:.2f}) | {moved} |"


def main() -> None:
    """Plans the models, adds the facts to the results, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="entries of configs/scale.py, with commas between them")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="topologies, with commas between them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override of the recipe")
    parser.add_argument("--note", default="", help="what else is to be known, for the results")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a program may take")
    flags = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    print("| model | topology | memory, GiB a device | state, GiB a device | cycles, million | FLOPs executed, T (of the model's) | collectives, GiB a device |")
    print("|---|---|---|---|---|---|---|")
    for model in flags.models.split(","):
        for topology in flags.topologies.split(","):
            facts = plan(model, topology, flags.set, flags.timeout)
            print(row(model, topology, facts), flush=True)
            with open(RESULTS, "a") as file:
                file.write(json.dumps({"model": model, "topology": topology, "set": flags.set, "note": flags.note, "time": time.strftime("%Y-%m-%d"), "commit": commit, **facts}) + "\n")


if __name__ == "__main__":
    main()
