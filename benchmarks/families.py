"""Every family with each of its objectives on the quickstart's text: does the validation loss fall?

    python benchmarks/families.py [--steps 240] [--only albert,electra] [--jobs 2]

Runs `configs/quickstart.py:FAMILY,OBJECTIVE` for so many steps with four evaluations on 8 batches, prints a table, and writes one JSON line a run to
benchmarks/results/families.jsonl (an earlier line of the same run is replaced). Losses of different objectives are not comparable.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/families.jsonl"
SHOWN = ("accuracy", "pair_accuracy", "replaced_recall", "discriminator_accuracy", "bits_per_byte")


def pairs() -> list[tuple[str, str]]:
    """(family, objective) of all the quickstart's recipes."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [(family, objective) for family, objectives in module.FAMILIES.items() for objective in objectives]


def measure(family: str, objective: str, steps: int) -> dict[str, Any]:
    """Validation losses of a run at each quarter of its steps, its last validation metrics, and its seconds."""
    overrides = {
        "train.steps": steps, "evals.validation.every": steps // 4, "evals.validation.batches": 8, "checkpoint.every": steps,
        "schedule.warmup_steps": steps // 10, "log.every": 20,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "ptm.cli", "train", f"--config={ROOT}/configs/quickstart.py:{family},{objective}", f"--workdir={workdir}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{family},{objective} failed:\n{done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "validation/loss" in row]
    losses = [round(row["validation/loss"], 4) for row in evaluated]
    metrics = {name: round(evaluated[-1][f"validation/{name}"], 4) for name in SHOWN if f"validation/{name}" in evaluated[-1]}
    return {"family": family, "objective": objective, "steps": steps, "losses": losses, **metrics, "seconds": round(time.monotonic() - start)}


def main() -> None:
    """Measures the recipes asked for and prints the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each run")
    parser.add_argument("--only", default="", help="families, separated by commas; default all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    flags = parser.parse_args()
    import jax

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"time": time.strftime("%Y-%m-%d"), "commit": commit, "device": f"{os.cpu_count()} x {platform.machine()} CPU", "jax": jax.__version__}
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    chosen = [pair for pair in pairs() if not flags.only or pair[0] in flags.only.split(",")]
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        for result in pool.map(lambda pair: measure(*pair, flags.steps), chosen):
            kept = [row for row in kept if (row["family"], row["objective"]) != (result["family"], result["objective"])] + [result | about]
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in kept))
            falling = all(after < before for before, after in zip(result["losses"], result["losses"][1:]))
            rest = {key: value for key, value in result.items() if key not in ("family", "objective", "losses")}
            print(f"| {result['family']} | {result['objective']} | {' '.join(map(str, result['losses']))} | {'falling' if falling else 'NOT FALLING'} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
