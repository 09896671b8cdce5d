"""Step time of nanoGPT's character-level CPU recipe: this project's training loop beside a plain PyTorch implementation.

    pip install -e '.[bench]' && PTM_DATA=... python benchmarks/char_gpt.py [--repeats 5] [--steps 300]

The two run in turn as processes of their own (A B A B ...), each with all cores. Both figures are medians over the steps of whole steps:
batch, forward, backward, clipping, AdamW. A JSON line with both, their ratio and what they ran on is added to
benchmarks/results/char_gpt.jsonl.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def ptm_step_ms(steps: int) -> float:
    """Median milliseconds of a step of `ptm train`, as its own log tells it."""
    with tempfile.TemporaryDirectory() as workdir:
        overrides = {"train.steps": steps, "evals.validation.batches": 1, "evals.validation.every": steps, "checkpoint.every": steps, "log.every": 20}
        flags = [f"--config.{key}={value}" for key, value in overrides.items()]
        command = [sys.executable, "-m", "ptm.cli", "train", f"--config={HERE.parent / 'configs/gpt2.py'}:shakespeare_char_cpu", f"--workdir={workdir}", *flags]
        subprocess.run(command, check=True, capture_output=True, cwd=HERE.parent)
        rows = [json.loads(line) for line in (Path(workdir) / "timing.jsonl").read_text().splitlines()]
    return 1000 * statistics.median(row["step_time"] for row in rows if row["step"] > steps // 4 and "step_time" in row)


def torch_step_ms(steps: int) -> float:
    """Median milliseconds of a step of the PyTorch peer."""
    command = [sys.executable, str(HERE / "peers/torch_gpt.py"), "--bench", str(steps), "--seeds", "0", "--json", "--threads", str(os.cpu_count())]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])["median_step_ms"]


def main() -> None:
    """Runs both in turn and adds a line to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--steps", type=int, default=300, help="timed steps of a run")
    flags = parser.parse_args()
    times: dict[str, list[float]] = {"ptm": [], "torch": []}
    for repeat in range(flags.repeats):
        times["ptm"].append(ptm_step_ms(flags.steps))
        times["torch"].append(torch_step_ms(flags.steps))
        print(f"repeat {repeat}: ptm {times['ptm'][-1]:.2f} ms, torch {times['torch'][-1]:.2f} ms", flush=True)
    import jax
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    result = {
        "benchmark": "char_gpt", "time": time.strftime("%Y-%m-%d"), "commit": commit, "steps": flags.steps,
        "ptm_ms": [round(value, 2) for value in times["ptm"]], "torch_ms": [round(value, 2) for value in times["torch"]],
        "ptm_median_ms": round(statistics.median(times["ptm"]), 2), "torch_median_ms": round(statistics.median(times["torch"]), 2),
        "ratio_ptm_to_torch": round(statistics.median(a / b for a, b in zip(times["ptm"], times["torch"])), 3),
        "device": f"{os.cpu_count()} x {platform.machine()} CPU", "versions": {"jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    print(json.dumps(result))
    (HERE / "results").mkdir(exist_ok=True)
    with open(HERE / "results/char_gpt.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
