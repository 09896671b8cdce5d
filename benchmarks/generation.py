"""Generation with a GPT-2 of 124 million parameters: this project beside the reference library, tokens per second.

    pip install -e '.[bench]' && python benchmarks/generation.py [--repeats 5] [--new 64]

Random weights, written as a directory that both read; float32; the same prompts of 32 random tokens; 1 and 8 rows, greedy and with 4 beams; nothing ends
early. The two run in turn as processes of their own (A B A B ...), each with all cores, after a warm-up that compiles. A figure is rows times
new tokens by the seconds of one call, reading the prompts included. A JSON line with medians, their ratios and the share of equal tokens (random
weights leave some near-ties) is added to benchmarks/results/generation.jsonl.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ptm import allocator, hf
from ptm.generate.options import Options
from ptm.generate.search import generate
from ptm.hf import files, transfer
from ptm.models import gpt

HERE = Path(__file__).parent
CASES = [[1, 1], [8, 1], [1, 4], [8, 4]]  # rows, beams
PROMPT, VOCAB = 32, 50257


def write_model(folder: Path) -> None:
    """A GPT-2 of the smallest published size with fresh parameters, as a directory of the reference library."""
    config = gpt.Config(vocab_size=VOCAB, **gpt.SIZES["small"])
    params = jax.jit(functools.partial(transfer.model(config, ("lm",)).init, lengths={"L": 8}))(jax.random.key(0))
    exported = transfer.write(hf.family_of(config), config, ("lm",), params)
    files.write(folder, {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, **exported.config}, exported.tensors)


def ptm_side(folder: Path, new_tokens: int) -> list[dict]:
    """Seconds of generation and the texts, for each of CASES."""
    allocator.keep_pages()  # as `ptm predict` does
    imported = hf.read(folder)
    model, params = transfer.model(imported.config, imported.heads).for_decoding(jax.tree.map(jnp.asarray, imported.params))
    results = []
    for rows, beams in CASES:
        prompts = np.random.default_rng(0).integers(0, VOCAB, (rows, PROMPT)).astype(np.int32)
        positions = np.broadcast_to(np.arange(PROMPT, dtype=np.int32), prompts.shape)
        batch = {"tokens_BL": prompts, "segments_BL": np.ones_like(prompts), "positions_BL": positions}
        given = {"options": Options(beams=beams), "new_tokens": new_tokens, "eos_id": None, "pad_id": 0, "vocab_size": VOCAB, "rng": jax.random.key(0)}
        np.asarray(generate(model, params, batch, **given)[0])
        began = time.perf_counter()
        texts = np.asarray(generate(model, params, batch, **given)[0])[:, 0]
        results.append({"seconds": time.perf_counter() - began, "texts": texts.tolist()})
    return results


def main() -> None:
    """Runs both in turn and adds a line to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a text")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        print(json.dumps(ptm_side(flags.side, flags.new)))
        return
    tokens_per_second: dict[str, list[list[float]]] = {"ptm": [], "transformers": []}
    agreement = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        threads = str(os.cpu_count())
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "PYTHONPATH": str(HERE.parent)}
        sides = {
            "ptm": [str(HERE / "generation.py"), "--side", folder, "--new", str(flags.new)],
            "transformers": [
                str(HERE / "peers/hf_generate.py"), folder, json.dumps(CASES), "--prompt", str(PROMPT), "--new", str(flags.new), "--threads", threads
            ],
        }  # fmt: skip
        for repeat in range(flags.repeats):
            texts = {}
            for side, command in sides.items():
                done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, env=environment)
                results = json.loads(done.stdout.splitlines()[-1])
                tokens_per_second[side].append([rows * flags.new / result["seconds"] for (rows, _), result in zip(CASES, results)])
                texts[side] = [np.array(result["texts"]) for result in results]
            agreement = [float(np.mean(a == b)) for a, b in zip(texts["ptm"], texts["transformers"])]
            print(f"repeat {repeat}: " + ", ".join(f"{side} {[round(x, 1) for x in values[-1]]}" for side, values in tokens_per_second.items()), flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    by_case = {
        f"{rows} x {beams}": {
            **{side: round(statistics.median(values[n] for values in runs), 2) for side, runs in tokens_per_second.items()},
            "ratio_ptm_to_transformers": round(statistics.median(a[n] / b[n] for a, b in zip(*tokens_per_second.values())), 3),
            "equal_tokens": round(agreement[n], 3),
        }
        for n, (rows, beams) in enumerate(CASES)
    }
    result = {
        "benchmark": "generation", "time": time.strftime("%Y-%m-%d"), "commit": commit, "unit": "tokens/s by rows x beams", "prompt": PROMPT, "new": flags.new,
        "repeats": flags.repeats, "cases": by_case, "device": f"{os.cpu_count()} x {platform.machine()} CPU",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("jax", "torch", "transformers")}},
    }  # fmt: skip
    print(json.dumps(result))
    (HERE / "results").mkdir(exist_ok=True)
    with open(HERE / "results/generation.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
