"""Seconds from the command to the first finished training step, cold and warm, beside PyTorch.

    pip install -e '.[bench]' && PTM_DATA=... python benchmarks/start.py [--only char,mlm] [--repeats 5]

Sizes are those of benchmarks/recipes.py. Ours is `ptm train` in a new workdir: imports, reading the text, the tokenizer, the model, compilation, the first step.
Cold: an empty compile cache. Warm: the cache of the start before, as every further run of a config has it. The peers are peers/torch_gpt.py (char) and
peers/hf_pretrain.py (mlm): as they are, and with torch.compile, cold (an empty folder of inductor's) and warm. The clock is the caller's: from the start of
the process to the line in which it tells that the first step is done. A JSON line a case is added to benchmarks/results/start.jsonl.
"""

import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pairs
import training
from pairs import ROOT

CASES = ("char", "mlm")
DONE = "First step done"
STEPS = 1000  # more than are made: the process is ended when the first is done


def first_step(command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Seconds until a Python process tells that its first step is done; it is ended then."""
    start, told = time.perf_counter(), []
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=pairs.environment(env)) as child:
        try:
            for line in child.stdout:
                told.append(line)
                if line.startswith(DONE):
                    return {"seconds": time.perf_counter() - start}
        finally:
            child.kill()
    raise SystemExit(f"{' '.join(command)} ended before its first step:\n{''.join(told)[-pairs.SHOWN_ERROR :]}")


def cold_and_warm(side: str, start: Callable[[dict[str, str]], dict[str, Any]], variable: str, folders: contextlib.ExitStack) -> dict[str, Callable[[], dict]]:
    """Two sides: with an empty folder in an environment variable, and with the one that the start before has filled."""
    used: list[str] = []

    def cold() -> dict[str, Any]:
        used.append(folders.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        return start({variable: used[-1]})

    return {f"{side} cold": cold, f"{side} warm": lambda: start({variable: used[-1]})}


def ours(case: str, env: dict[str, str]) -> dict[str, Any]:
    """A start of `ptm train`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as workdir:
        return first_step(training.train_command(case, workdir, steps=STEPS), env)


def main() -> None:
    """Measures the cases and adds a line for each to the results."""
    flags = pairs.parser(__doc__, cases=CASES).parse_args()
    pairs.data_folder()
    for case in pairs.chosen(flags, CASES):
        print(case, flush=True)
        with contextlib.ExitStack() as folders:
            scratch = Path(folders.enter_context(tempfile.TemporaryDirectory()))
            sides = cold_and_warm("ptm", functools.partial(ours, case), "JAX_COMPILATION_CACHE_DIR", folders)
            commands = training.peer_commands(case, scratch, steps=STEPS, compiled=True)
            eager, compiled = commands
            sides[eager] = functools.partial(first_step, commands[eager], {})
            sides |= cold_and_warm(compiled, functools.partial(first_step, commands[compiled]), "TORCHINDUCTOR_CACHE_DIR", folders)
            found = pairs.alternate(sides, repeats=flags.repeats, show=lambda row: f"{row['seconds']:.1f} s")
        # Cold beside cold, warm beside warm; the peer that compiles nothing beside both.
        for state in ("cold", "warm"):
            kept = {side: rows for side, rows in found.items() if side == eager or side.endswith(state)}
            kept = {f"ptm {state}": kept.pop(f"ptm {state}"), **kept}
            pairs.save("start", {"case": case, "state": state, "repeats": flags.repeats, "unit": "s", **pairs.compare(kept, "seconds", higher=False)}, note=flags.note)


if __name__ == "__main__":
    main()
