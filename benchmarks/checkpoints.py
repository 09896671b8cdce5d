"""Checkpoints of a training run: saving, restoring, and what a save costs the steps beside it; ours beside torch.save and torch.load.

    pip install -e '.[bench]' && PTM_DATA=... python benchmarks/checkpoints.py [--repeats 5] [--steps 20]

The state of a GPT-2 of 12 layers of width 512 (8,192 pieces, rows of 128, 4 a step) under AdamW: parameters and both moments in float32, half a GB, the same for
both. Each side trains `--steps` steps for the time of a step, saves and goes on for as many steps, saves again without training, and reads that back.

save: seconds from the call until the file is complete. Ours is written in the background, flushed to the disk, hashed (sha256) and renamed; the peer's is what
its users call: torch.save of the two state dicts, which ends in the page cache and is not verified. call: what of that the loop stands still. stall: by how
much the call and the steps after it take longer than as many steps without a save: with what the writers take from the cores, and the wait for what is not
written when those steps are done.
restore: seconds from the folder to arrays on the device; ours checks the hashes of all files. A JSON line a figure is added to benchmarks/results/checkpoints.jsonl.
"""

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pairs
import training

WARMUP = 3
FIGURES = ("save", "call", "stall", "restore")
SHAPE, ROWS, VOCAB = {"num_layers": 12, "width": 512, "num_heads": 8}, 4, 8192


def load() -> Any:
    """The run that is saved."""
    cfg = training.load("gpt")
    cfg.model.update(SHAPE)
    cfg.model.vocab_size = VOCAB
    cfg.train.batch_size = cfg.evals["validation"].batch_size = ROWS
    return cfg


def ours(folder: Path, steps: int) -> dict[str, Any]:
    """Trains a run, saves and restores it by what `ptm train` does both with."""
    import jax

    from ptm import allocator
    from ptm import run as run_lib

    allocator.keep_pages()  # as `ptm train` does
    run = run_lib.setup(load())
    state, size, times = run.init_state(run.init_params()), run.config.train.batch_size, []
    with contextlib.closing(run.loader()) as loader, run_lib.open_checkpoints(run, folder) as checkpoints:

        def train(count: int) -> None:
            nonlocal state
            for _ in range(count):
                start = time.perf_counter()
                state, metrics = run.train_step(state, run.to_device(next(loader), batch_size=size, rows=list(range(size))))
                jax.block_until_ready(metrics)
                times.append(time.perf_counter() - start)

        train(WARMUP + steps)
        step, start = statistics.median(times[WARMUP:]), time.perf_counter()
        checkpoints.save(1, state, streams=loader.state(), meta={})
        call = time.perf_counter() - start
        train(steps)
        checkpoints.wait()
        stall = time.perf_counter() - start - steps * step
        start = time.perf_counter()
        checkpoints.save(2, state, streams=loader.state(), meta={})
        checkpoints.wait()
        save = time.perf_counter() - start
    start = time.perf_counter()
    with run_lib.open_checkpoints(run, folder, read_only=True) as checkpoints:
        restored = checkpoints.restore(2, run.abstract_state)[0]
        jax.block_until_ready(restored)
    restore, num_bytes = time.perf_counter() - start, sum(leaf.nbytes for leaf in jax.tree.leaves(restored))
    return {"save": save, "call": call, "stall": stall, "restore": restore, "bytes": num_bytes, "step_ms": 1e3 * step}


def main() -> None:
    """Measures both and adds a line for each figure to the results."""
    parser = pairs.parser(__doc__, steps=20)
    parser.add_argument("--scratch", type=Path, help="folder on the disk that is to be written to, instead of that of temporary files")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # the child process: the folder of the checkpoints
    flags = parser.parse_args()
    pairs.data_folder()
    if flags.ours:
        print(json.dumps(ours(flags.ours, flags.steps)))
        return
    config = {**SHAPE, "vocab_size": VOCAB, "context": 128, "batch_size": ROWS}
    commands = {
        "ptm": ["benchmarks/checkpoints.py", "--ours"],
        "torch": ["benchmarks/peers/torch_checkpoint.py", f"--config={json.dumps(config)}", f"--threads={pairs.cores()}", "--folder"],
    }

    def measure(command: list[str]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=flags.scratch) as folder:
            return pairs.printed([*command, folder, f"--steps={flags.steps}"])

    sides = {side: functools.partial(measure, command) for side, command in commands.items()}
    found = pairs.alternate(sides, repeats=flags.repeats, show=lambda row: ", ".join(f"{figure} {row[figure]:.2f} s" for figure in FIGURES))
    last = {side: pairs.shortened(rows[-1]) for side, rows in found.items()}
    for figure in FIGURES:
        result = {"case": figure, "steps": flags.steps, "repeats": flags.repeats, "unit": "s", **pairs.compare(found, figure, higher=False), "last": last}
        pairs.save("checkpoints", result, note=flags.note)


if __name__ == "__main__":
    main()
