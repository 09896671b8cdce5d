"""What all pairs share: how this project is measured beside a peer.

A side is a command whose process prints one JSON object last; ours is the first. The sides run in turn (A B A B ...), each alone with all cores that this
process may use. Of a figure all values are kept, their medians, and `speedup`: how many times as fast ours is, the median of the ratios within each repeat.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "torch", "transformers", "tokenizers")
SHOWN_ERROR = 3000  # characters of what a failed process wrote last

Found = dict[str, list[dict[str, Any]]]  # for each side what it printed, repeat by repeat


def parser(doc: str | None, *, steps: int | None = None, cases: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The flags of every pair: --repeats, --note, and where they apply --steps and --only."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--repeats", type=int, default=5, help="runs of each side")
    made.add_argument("--note", default="", help="what else is to be known of this measurement, for the results")
    if steps is not None:
        made.add_argument("--steps", type=int, default=steps, help="timed steps of a run")
    if cases:
        made.add_argument("--only", default=",".join(cases), metavar="CASE,...", help=f"of {', '.join(cases)}")
    return made


def chosen(flags: argparse.Namespace, cases: Sequence[str]) -> list[str]:
    """The cases of --only; ends the program where one is not known."""
    names = flags.only.split(",")
    if unknown := [name for name in names if name not in cases]:
        raise SystemExit(f"--only={flags.only}: no case '{unknown[0]}'; there are: {', '.join(cases)}.")
    return names


def data_folder() -> Path:
    """$PTM_DATA; ends the program where it is not set."""
    if "PTM_DATA" not in os.environ:
        raise SystemExit("PTM_DATA is not set: point it at the folder of data sets.")
    return Path(os.environ["PTM_DATA"])


def cores() -> int:
    """Cores that this process, and so each side, may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a side: this checkout's package, no network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(extra or {})}


def completed(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
    """What a Python process prints; ends the program with its last words where it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment(env))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-SHOWN_ERROR:]}")
    return done.stdout


def printed(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object that a Python process prints last."""
    return json.loads(completed(command, env=env).splitlines()[-1])


def alternate(sides: Mapping[str, Callable[[], dict[str, Any]]], *, repeats: int, show: Callable[[dict[str, Any]], str]) -> Found:
    """What each side's function gives, `repeats` times in turn; `show` makes a few words of one for the screen."""
    found: Found = {side: [] for side in sides}
    for repeat in range(repeats):
        for side, measure in sides.items():
            found[side].append(measure())
        print(f"  repeat {repeat}: " + ", ".join(f"{side} {show(rows[-1])}" for side, rows in found.items()), flush=True)
    return found


def compare(found: Found, figure: str | Callable[[dict[str, Any]], float], *, higher: bool) -> dict[str, Any]:
    """Values and medians of a figure, by side, and the `speedup` over each peer; `higher` says that more is faster."""
    of = figure if callable(figure) else lambda row: row[figure]
    values = {side: [of(row) for row in rows] for side, rows in found.items()}
    ours, *peers = values
    ratios = {peer: [a / b if higher else b / a for a, b in zip(values[ours], values[peer])] for peer in peers}
    return {
        "values": {side: [_short(value) for value in each] for side, each in values.items()},
        "medians": {side: _short(statistics.median(each)) for side, each in values.items()},
        "speedup": {peer: round(statistics.median(each), 3) for peer, each in ratios.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def shortened(row: Mapping[str, Any]) -> dict[str, Any]:
    """A side's object with its numbers to five digits."""
    return {key: _short(value) if isinstance(value, float) else value for key, value in row.items()}


def save(benchmark: str, result: Mapping[str, Any], *, note: str = "", packages: Sequence[str] = PACKAGES) -> None:
    """Adds a line to benchmarks/results/BENCHMARK.jsonl: the result, when, of which commit and on what, with the versions of some packages."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    line = {
        "benchmark": benchmark, **result, **({"note": note} if note else {}), "time": time.strftime("%Y-%m-%d"), "commit": commit,
        "device": f"{cores()} x {platform.machine()} CPU",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    path = ROOT / f"benchmarks/results/{benchmark}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
