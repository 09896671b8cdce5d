"""Generation with a GPT-2 of 124 million parameters: this project beside the reference library, tokens per second.

    pip install -e '.[bench]' && python benchmarks/generation.py [--repeats 5] [--new 64]

Random weights, written as a directory that both read; float32; the same prompts of 32 random tokens; 1 and 8 rows, greedy and with 4 beams; nothing ends
early. The two run in turn as processes of their own (A B A B ...), each with all cores, after a warm-up that compiles. A figure is rows times
new tokens by the seconds of one call, reading the prompts included. A JSON line for each case (rows x beams), with the share of equal tokens (random weights
leave some near-ties), is added to benchmarks/results/generation.jsonl.
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pairs

from ptm import allocator, hf
from ptm.generate.options import Options
from ptm.generate.search import generate
from ptm.hf import files, transfer
from ptm.models import gpt

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
    """Runs both in turn and adds a line for each case to the results."""
    parser = pairs.parser(__doc__)
    parser.add_argument("--new", type=int, default=64, help="new tokens of a text")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        print(json.dumps({"cases": ptm_side(flags.side, flags.new)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        commands = {
            "ptm": ["benchmarks/generation.py", "--side", folder, "--new", str(flags.new)],
            "transformers": [
                "benchmarks/peers/hf_generate.py", folder, json.dumps(CASES), "--prompt", str(PROMPT), "--new", str(flags.new), "--threads", str(pairs.cores())
            ],
        }  # fmt: skip
        sides = {side: functools.partial(pairs.printed, command, env={"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}) for side, command in commands.items()}

        def rate(row: dict[str, Any], n: int) -> float:
            return CASES[n][0] * flags.new / row["cases"][n]["seconds"]

        found = pairs.alternate(sides, repeats=flags.repeats, show=lambda row: " ".join(f"{rate(row, n):.1f}" for n in range(len(CASES))) + " tokens/s")
    for n, (rows, beams) in enumerate(CASES):
        texts = [np.array(made[-1]["cases"][n]["texts"]) for made in found.values()]
        result = {
            "case": f"{rows} x {beams}", "prompt": PROMPT, "new": flags.new, "repeats": flags.repeats, "unit": "tokens/s",
            **pairs.compare(found, functools.partial(rate, n=n), higher=True), "equal_tokens": round(float(np.mean(texts[0] == texts[1])), 3),
        }  # fmt: skip
        pairs.save("generation", result, note=flags.note)


if __name__ == "__main__":
    main()
