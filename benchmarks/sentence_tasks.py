"""Does a model trained on one sentence-level task solve the other (Lan et al. 2020, table 5)? NSP-trained on SOP, SOP-trained on NSP, and itself.

    python benchmarks/sentence_tasks.py [--family albert] [--steps 2000] [--source python_docs:]

Trains the quickstart's `FAMILY,nsp` and `FAMILY,sop` and evaluates each on the validation pairs of both tasks. Published, at 125,000 steps of
4,096 rows: trained on NSP 90.5 % on NSP and 52.0 % on SOP; trained on SOP 78.9 % and 86.5 %. Adds a JSON line to
benchmarks/results/sentence_tasks.jsonl.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ptm import config, recipe, registry, train, weights
from ptm import run as run_lib

ROOT = Path(__file__).parent.parent
TASKS = ("nsp", "sop")


def accuracies(workdir: Path, passes: int) -> dict[str, dict[str, float]]:
    """Share of right answers on the validation pairs of each task, their number over `passes` seeds, and the half width of a 95 % interval."""
    trained = weights.reopen(f"ckpt:{workdir}")
    params, _ = weights.read(f"ckpt:{workdir}", trained)
    found = {}
    for task in TASKS:
        right = pairs = 0.0
        for seed in range(passes):
            asked = dataclasses.replace(trained.config, seed=seed, objective=dataclasses.replace(trained.config.objective, task=task))
            run = run_lib.setup(asked, workdir=workdir)
            for batch in run.validation(64):
                ratio = run.eval_step(params, batch)[2].ratios["pair_accuracy"]
                right, pairs = right + float(ratio[0]), pairs + float(ratio[1])
        share = right / pairs
        found[task] = {"accuracy": round(share, 4), "pairs": int(pairs), "interval": round(1.96 * math.sqrt(share * (1 - share) / pairs), 4)}
    return found


def measure(task: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm and evaluates it on both tasks."""
    cfg = recipe.load(f"{ROOT}/configs/quickstart.py:{flags.family},{task}")
    overrides = {
        "train.steps": flags.steps, "train.batch_size": flags.batch_size, "data.length": flags.length, "data.source": flags.source,
        "schedule.warmup_steps": flags.steps // 10, "evals.validation.every": flags.steps // 4, "checkpoint.every": flags.steps,
        "objective.unit": "whole_word", "optimizer.learning_rate": flags.learning_rate, "data.document": flags.document, "data.holdout": flags.holdout,
    }  # fmt: skip
    for key, value in overrides.items():
        config.override(cfg, key, str(value), registry.REGISTRIES)
    with tempfile.TemporaryDirectory() as workdir:
        assert train.train(cfg, workdir=workdir) == 0
        rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
        curve = [round(row["validation/pair_accuracy"], 4) for row in rows if "validation/pair_accuracy" in row]
        return {"curve": curve, "mlm_accuracy": round([row for row in rows if "validation/accuracy" in row][-1]["validation/accuracy"], 4), **accuracies(Path(workdir), 4)}


def main() -> None:
    """Trains both arms and adds a line to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="albert", choices=("albert", "bert"), help="model")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each arm")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--learning_rate", type=float, default=7e-4, help="peak")
    parser.add_argument("--source", default="python_docs:", help="data.source")
    parser.add_argument("--document", default="line", help="data.document of a text source")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of documents held out")
    flags = parser.parse_args()
    start = time.monotonic()
    result = {f"trained_on_{task}": measure(task, flags) for task in TASKS}
    import jax

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {
        "benchmark": "sentence_tasks", "time": time.strftime("%Y-%m-%d"), "commit": commit, **vars(flags), "seconds": round(time.monotonic() - start),
        "device": f"{os.cpu_count()} x {platform.machine()} CPU", "jax": jax.__version__,
    }  # fmt: skip
    print(json.dumps(result | about, indent=1))
    with open(ROOT / "benchmarks/results/sentence_tasks.jsonl", "a") as file:
        file.write(json.dumps(result | about) + "\n")


if __name__ == "__main__":
    main()
