"""Goodput: what is left of a run's time where it is ended again and again, and what a save costs its steps.

    PTM_DATA=... python benchmarks/goodput.py [--failures 10] [--steps 1100] [--every 20]

The run `char` of benchmarks/recipes.py under a small supervisor, which starts the same command again whenever its process ends before the run is finished. A
schedule ends it ten times, each after about an eleventh of the steps more, anywhere between two saves: SIGKILL and SIGTERM in turn. The same run without a failure is measured before it; both
end with the same metrics.jsonl, byte for byte, or nothing is recorded.

lost: seconds of the whole, over those of the run without failures, for each failure: steps that are made again, and the start (imports, restoring, a program from
the compile cache). steps_again: steps that were made twice. useful: the share of all steps made that the run needed. goodput: seconds of the run without failures over
those with them. save_stall: what saves take of the time of all steps of the run without failures, with one every `--every` steps.
A JSON line is added to benchmarks/results/goodput.jsonl.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pairs
import training

LOOK = 0.02  # seconds between two looks at the steps
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def start(workdir: Path, flags: argparse.Namespace) -> subprocess.Popen:
    """`ptm train` in the background; what it says goes to a file."""
    command = training.train_command("char", workdir, steps=flags.steps, overrides={"checkpoint.every": flags.every, "log.every": 1})
    with open(workdir.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, cwd=pairs.ROOT, env=pairs.environment())


def steps_done(workdir: Path) -> int:
    """The step of the last whole row."""
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().rpartition("\n")[0].rpartition("\n")[2])["step"]
    except (OSError, ValueError):
        return 0


def supervised(workdir: Path, flags: argparse.Namespace, failures: list[int]) -> dict[str, Any]:
    """Runs until the run is finished; ends its process at each of these steps. Gives the seconds, and the steps that were made in all."""
    begun, made, ends = time.perf_counter(), 0, list(failures)
    from_step = 0
    while True:
        process = start(workdir, flags)
        while process.poll() is None:
            if ends and steps_done(workdir) >= ends[0] and steps_done(workdir) > from_step:
                process.send_signal(SIGNALS[(len(failures) - len(ends)) % len(SIGNALS)])
                ends.pop(0)
                process.wait()
            time.sleep(LOOK)
        made += steps_done(workdir) - from_step
        if process.returncode == 0:
            return {"seconds": time.perf_counter() - begun, "made": made, "ended": len(failures) - len(ends)}
        if process.returncode not in (75, -signal.SIGKILL):
            raise SystemExit(f"the run ended with {process.returncode}:\n{workdir.with_suffix('.log').read_text()[-pairs.SHOWN_ERROR :]}")
        from_step = max((int(path.name) for path in (workdir / "ckpt").iterdir() if path.name.isdecimal()), default=0)


def stall(workdir: Path, every: int) -> float:
    """What saves take of the steps' time: those of the second half of each interval, when a save is long written, over all. The first interval is left out."""
    rows = [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]
    times = {
        after["step"]: after["time"] - before["time"]
        for before, after in zip(rows, rows[1:])
        if before["step"] >= every and after["step"] == before["step"] + 1
    }
    return 1 - statistics.mean(seconds for step, seconds in times.items() if every // 2 < step % every) / statistics.mean(times.values())


def main() -> None:
    """Measures both runs and adds a line to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--failures", type=int, default=10, help="how often the run is ended")
    parser.add_argument("--steps", type=int, default=1100, help="steps of the run")
    parser.add_argument("--every", type=int, default=20, help="steps between two saves")
    parser.add_argument("--note", default="", help="what else is to be known of this measurement, for the results")
    flags = parser.parse_args()
    pairs.data_folder()
    rng = random.Random(0)
    failures = [(number + 1) * flags.steps // (flags.failures + 1) + rng.randrange(flags.every) for number in range(flags.failures)]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/xla")
        warm = argparse.Namespace(**vars(flags) | {"steps": 2})
        supervised(Path(scratch) / "warm", warm, [])  # fills the compile cache, as the first start of a run does for those after it
        whole = supervised(Path(scratch) / "whole", flags, [])
        ended = supervised(Path(scratch) / "ended", flags, failures)
        if (Path(scratch) / "whole/metrics.jsonl").read_bytes() != (Path(scratch) / "ended/metrics.jsonl").read_bytes():
            raise SystemExit("the run that was ended differs from the one that was not: no figure of it means anything.")
        share = stall(Path(scratch) / "whole", flags.every)
    result = {
        "case": "SIGKILL and SIGTERM in turn", "failures": ended["ended"], "steps": flags.steps, "save_every": flags.every,
        "seconds": {"whole": round(whole["seconds"], 2), "with failures": round(ended["seconds"], 2)},
        "lost": round((ended["seconds"] - whole["seconds"]) / ended["ended"], 2), "steps_again": ended["made"] - flags.steps,
        "useful": round(flags.steps / ended["made"], 4), "goodput": round(whole["seconds"] / ended["seconds"], 4), "save_stall": round(share, 4),
    }  # fmt: skip
    pairs.save("goodput", result, note=flags.note)


if __name__ == "__main__":
    main()
