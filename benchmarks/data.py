"""Tokens a second on one core from raw text to batches: this project's loader beside the reference library's tokenizers, grouping and collators.

    pip install -e '.[bench]' && PTM_DATA=... python benchmarks/data.py [--only bpe-causal,wordpiece-mlm,...] [--repeats 5] [--steps 100]

A case is a kind of tokenizer and an objective: bytes, bpe, wordpiece, sentencepiece with causal, mlm, span_corruption (which WordPiece has no pieces for).
Vocabularies: 8,192 pieces learned from the text, but BERT's own for wordpiece; both sides have the same, the peer as a fast tokenizer. Text: that of
recipes.py:mlm. Rows of 128, 32 a batch; of span_corruption 512 and 114, 8 a batch.

Ours is the loader of a run without its thread: reading, tokenizing, corrupting each document, packing documents apart from each other. The peer
(peers/hf_pretrain.py --data_only) tokenizes a thousand documents at once, joins and cuts them, and makes batches with the library's collators. Each side has one
core. Counted are tokens that are no padding: of the peer in one pass over all documents, of ours over `--steps` batches after the first 40, within the first
epoch, so that no document was tokenized before. How long the steps of a real run wait for their batches is told by training.py. A JSON line a case is added to
benchmarks/results/data.jsonl.
"""

import argparse
import contextlib
import functools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pairs
import training

WARMUP = 40  # batches before those that are timed: until the rows that packing keeps open are as full as they stay
CASES = tuple(
    f"{kind}-{objective}"
    for kind in ("bytes", "bpe", "wordpiece", "sentencepiece")
    for objective in ("causal", "mlm", "span_corruption")
    if (kind, objective) != ("wordpiece", "span_corruption")
)


def load(case: str, tokenizer: str | None) -> Any:
    """The config of a case, its tokenizer from a folder where one is given."""
    from ptm import config
    from ptm.models import gpt
    from ptm.objectives import causal

    kind, _, objective = case.partition("-")
    cfg = training.load("t5" if objective == "span_corruption" else "mlm")
    if objective == "causal":
        config.set_section(cfg, "model", gpt.Config(num_layers=1, width=64, num_heads=1, max_length=cfg.data.length))
        config.set_section(cfg, "objective", causal.Config())
    path = cfg.tokenizer.path if kind == "wordpiece" else None
    cfg.tokenizer.update(kind=kind, lowercase=kind == "wordpiece", vocab_size=8192, sentinels=100 if objective == "span_corruption" else 0)
    cfg.tokenizer.path = None if kind == "bytes" else tokenizer or path
    cfg.data.prefetch = 0
    return cfg


def ours(case: str, tokenizer: str, *, steps: int) -> dict[str, Any]:
    """Tokens a second of a run's loader."""
    from ptm import run as run_lib

    run = run_lib.setup(load(case, tokenizer))
    with contextlib.closing(run.loader()) as loader:
        for _ in range(WARMUP):
            next(loader)
        tokens, start = 0, time.perf_counter()
        for _ in range(steps):
            batch = next(loader)
            tokens += sum(int((batch[name] > 0).sum()) for name in ("segments_BL", "input_segments_BI") if name in batch)
        seconds = time.perf_counter() - start
        stats = loader.stats()
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "padding": stats["padding_share"], "epoch": stats["epoch"]}


def sides(case: str, scratch: Path, *, steps: int) -> dict[str, Any]:
    """Both sides of a case, on one core each."""
    from ptm import run as run_lib

    run, rows = run_lib.setup(load(case, None)), 8 if case.endswith("span_corruption") else 32
    run.tokenizer.save(str(scratch / "ours"))
    (scratch / "theirs").mkdir()
    training.write_tokenizer(run, scratch / "theirs")
    training.write_texts(run.config.data, scratch / "texts.jsonl")
    objective = run.config.objective.name
    commands = {
        "ptm": ["benchmarks/data.py", f"--ours={case}", f"--tokenizer={scratch}/ours", f"--steps={steps}"],
        "transformers": [
            "benchmarks/peers/hf_pretrain.py", "--data_only", f"--model={scratch}/theirs", f"--texts={scratch}/texts.jsonl", f"--objective={objective}",
            f"--length={512 if objective == 'span_corruption' else 128}", f"--batch_size={rows}", "--threads=1",
        ],
    }  # fmt: skip
    return {side: functools.partial(pairs.printed, command, env={"TOKENIZERS_PARALLELISM": "false"}) for side, command in commands.items()}


def main() -> None:
    """Measures the cases and adds a line for each to the results."""
    parser = pairs.parser(__doc__, steps=100, cases=CASES)
    parser.add_argument("--ours", help=argparse.SUPPRESS)  # the child process: the case
    parser.add_argument("--tokenizer", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    pairs.data_folder()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # children inherit it
    if flags.ours:
        print(json.dumps(ours(flags.ours, flags.tokenizer, steps=flags.steps)))
        return
    for case in pairs.chosen(flags, CASES):
        print(case, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            made = sides(case, Path(scratch), steps=flags.steps)
            found = pairs.alternate(made, repeats=flags.repeats, show=lambda row: f"{row['tokens_per_second']:,.0f} tokens/s")
        result = {
            "case": case, "steps": flags.steps, "repeats": flags.repeats, "unit": "tokens/s", **pairs.compare(found, "tokens_per_second", higher=True),
            "last": {side: pairs.shortened(rows[-1]) for side, rows in found.items()},
        }  # fmt: skip
        pairs.save("data", result, note=flags.note)


if __name__ == "__main__":
    main()
