"""What `compute.deterministic` is worth: the same training twice in processes of their own, and beside a CPU.

    python benchmarks/determinism.py [--tasks gpt2,bert128,t5] [--steps 20] [--rows 2]
    python benchmarks/determinism.py --smoke       # tiny sizes, on the CPU: nothing is recorded

The models of gpu.py, with dropout, on its batches. Each task is trained five times: twice in bfloat16 as gpu.py does, with fused attention, and twice in
float32, all with the switch; and once in float32 without it. The bits of parameters, optimizer state and losses of each two must be the same; whether
a run without it has them too is only told. The float32 run is made once more on the CPU of the machine: the largest difference of a loss, relative, must be
below TOLERANCE. A JSON line goes to benchmarks/results/determinism.jsonl; what fails is told, recorded too, and the exit code is 1.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pairs

RESULTS = pairs.ROOT / "benchmarks/results/determinism.jsonl"
TOLERANCE = 1e-3  # of a loss in float32 after some steps of AdamW, which divides by roots of small numbers
FLOAT32 = ("compute.dtype=float32", "compute.logits=float32", "compute.attention=xla")
# What is trained: the side -> (its overrides, with the switch, on the CPU).
SIDES: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "bfloat16": ((), True, False),
    "bfloat16 again": ((), True, False),
    "float32": (FLOAT32, True, False),
    "float32 again": (FLOAT32, True, False),
    "float32 without the switch": (FLOAT32, False, False),
    "float32 on the CPU": (FLOAT32, True, True),
}


def overrides(task: str, side: str) -> list[str]:
    """Those of a side's config."""
    dropout = ["model.dropout=0.1"] + ([] if task == "t5" else ["model.attention_dropout=0.1"] if SIDES[side][0] else [])  # cudnn takes none here
    return [*SIDES[side][0], *dropout]


def train(task: str, side: str, batches: Path, *, steps: int, rows: int, smoke: bool) -> dict[str, Any]:
    """The losses of some steps, and a digest over them and the state after the last."""
    from ptm import run as run_lib

    if SIDES[side][1]:
        run_lib.use_deterministic_kernels()
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    run = gpu.make_run(task, rows=rows, overrides=overrides(task, side), smoke=smoke)
    state, given, losses = run.init_state(run.init_params()), dict(np.load(batches)), []
    for number in range(steps):
        batch = run.to_device({name: values[number % gpu.BATCHES] for name, values in given.items()}, batch_size=rows, rows=list(range(rows)))
        state, metrics = run.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    digest = hashlib.sha256(np.float64(losses).tobytes())
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return {"losses": losses, "digest": digest.hexdigest()[:16], "device": run.layout.mesh.devices.flat[0].device_kind}


def compare(task: str, flags: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """The line of a task, and what is wrong with it."""
    path = scratch / f"{task}.npz"
    child = [__file__, f"--child={task}", f"--batches={path}", f"--steps={flags.steps}", f"--rows={flags.rows}", *(["--smoke"] if flags.smoke else [])]
    pairs.completed([*child, "--side=make"], env={"JAX_PLATFORMS": "cpu"})  # the process that makes the batches must not hold memory of a GPU
    found = {side: pairs.printed([*child, f"--side={side}"], env={"JAX_PLATFORMS": "cpu"} if on_cpu else None) for side, (_, _, on_cpu) in SIDES.items()}
    same = {dtype: found[dtype]["digest"] == found[f"{dtype} again"]["digest"] for dtype in ("bfloat16", "float32")}
    ours, reference = np.array(found["float32"]["losses"]), np.array(found["float32 on the CPU"]["losses"])
    difference = float(np.max(np.abs(ours - reference) / np.abs(reference)))
    line = {
        "task": task, "rows": flags.rows, "steps": flags.steps, "same_bits": same, "same_without_switch": found["float32"]["digest"] == found["float32 without the switch"]["digest"],
        "largest_difference_to_cpu": difference, "device": found["float32"]["device"], "first_loss": ours[0], "last_loss": ours[-1],
    }  # fmt: skip
    wrong = [f"{dtype}: two runs with the switch differ" for dtype, equal in same.items() if not equal]
    if not difference < TOLERANCE:
        wrong.append(f"float32: a loss differs from the CPU's by {difference:.1e}; allowed {TOLERANCE:.0e}")
    if not np.all(np.isfinite(ours)) or not ours[-1] < ours[0]:
        wrong.append(f"float32: the loss does not fall: {ours[0]:.3f}, {ours[-1]:.3f}")
    return line, wrong


def main() -> None:
    """Trains the tasks asked for and records them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="gpt2,bert128,t5", help=f"of {', '.join(gpu.TASKS)}")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch, few so that the CPU's run ends")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU; nothing is recorded")
    for name in ("child", "side", "batches"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of the processes that make batches and train
    flags = parser.parse_args()
    if flags.side == "make":
        np.savez(flags.batches, **gpu.make_batches(gpu.make_run(flags.child, rows=flags.rows, overrides=[*FLOAT32], smoke=flags.smoke)))
        return
    if flags.child:
        print(json.dumps(train(flags.child, flags.side, Path(flags.batches), steps=flags.steps, rows=flags.rows, smoke=flags.smoke)))
        return
    if flags.smoke:
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=pairs.ROOT).stdout.strip()
    source = {"time": time.strftime("%Y-%m-%d"), "commit": commit, "versions": {"jax": version("jax"), "python": platform.python_version()}}
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for task in flags.tasks.split(","):
            line, wrong = compare(task, flags, Path(scratch))
            line |= {"wrong": wrong, **source}
            print(json.dumps(line), flush=True)
            if not flags.smoke:
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            for problem in wrong:
                print(f"{task}: {problem}", file=sys.stderr, flush=True)
            failed |= bool(wrong)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
