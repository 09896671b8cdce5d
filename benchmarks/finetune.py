"""Examples a second of fine-tuning: this project's recipes beside the reference library's models in a PyTorch loop, on the same examples.

    pip install -e '.[bench]' && PTM_DATA=... python benchmarks/finetune.py [--task sst2] [--size small] [--repeats 5] [--steps 100] [--compile]

sst2: a BERT (`--size` small: 4 layers of width 512; base: 12 of 768; 30,522 pieces) classifies SST-2's sentences, about 32 a step. multi30k: a T5 of the size
small (6 + 6 layers of width 512, 32,128 pieces) translates, about 32 pairs a step. Random weights, dropout 0.1, float32, AdamW, the gradient norm clipped.

The two run in turn as processes of their own (A B A B ...), each with all cores, from one directory that the reference library writes. Ours is the
compiled step of configs/finetune on the batches of its loader, which tokenizes as it goes and packs examples into rows; peers/torch_finetune.py takes
tokenized examples, grouped by length and padded. Both figures are examples over the seconds of whole steps, the first ones left out. A JSON line with both,
their ratio and what they ran on is added to benchmarks/results/finetune.jsonl. On busy cores the figures say nothing: torch's threads wait for each other.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pairs
from pairs import ROOT

from ptm import allocator

BERT = {"small": (4, 512, 8), "base": (12, 768, 12)}
WARMUP = 8  # steps before those that are timed
# Recipe and overrides of each task; rows hold about as many examples as a batch of the peer. Layers are unrolled, the faster way on a CPU.
TASKS = {
    "sst2": (
        "glue.py:sst2",
        {
            "data.source": "tsv:$PTM_DATA/classify/sst2/alps_train.tsv", "data.validation_source": "tsv:$PTM_DATA/classify/sst2/alps_test.tsv",
            "train.batch_size": "3", "compute.scan_layers": "false",
        },
    ),
    "multi30k": (
        "translation.py:pretrained",
        {
            "train.batch_size": "16", "optimizer.name": "adamw", "optimizer.learning_rate": "3e-5", "optimizer.weight_decay": "0.01", "optimizer.eps": "1e-6",
            "optimizer.clip_norm": "1.0", "compute.scan_layers": "false",
        },
    ),
}  # fmt: skip


def make_model(task: str, size: str, folder: Path) -> None:
    """A directory of the reference library with random weights, and our tokenizer in it."""
    import torch
    import transformers

    from ptm import text

    torch.manual_seed(0)
    data = Path(os.environ["PTM_DATA"])
    if task == "sst2":
        layers, width, heads = BERT[size]
        shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, vocab_size=30522))
        tokenizer = text.make("wordpiece", path=str(data / "vocab/bert_uncased"), lowercase=True)
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=512, num_layers=6, num_heads=8, d_kv=64, d_ff=2048, vocab_size=32128, decoder_start_token_id=0)
        )
        files = (data / f"seq2seq/multi30k/train.{side}.gz" for side in ("en", "de"))
        texts = [line for file in files for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
        tokenizer = text.make("sentencepiece", texts=texts, vocab_size=8000)
    model.save_pretrained(folder)
    tokenizer.save(str(folder))


def make_run(task: str, folder: Path, overrides: dict[str, str]) -> Any:
    """The run of our recipe that starts from a directory."""
    from ptm import adopt, config, recipe, registry
    from ptm import run as run_lib

    name, own = TASKS[task]
    cfg = recipe.load(f"{ROOT}/configs/finetune/{name}")
    cfg.init = f"hf:{folder}"
    adopt.adopt(cfg)
    for key, value in (own | overrides).items():
        config.override(cfg, key, os.path.expandvars(value), registry.REGISTRIES)
    return run_lib.setup(cfg)


def write_examples(run: Any, path: Path) -> None:
    """The examples that our objective makes of the training records, for the peer."""
    from ptm.data.batch import keyed_rng

    objective = run.objective
    with open(path, "w") as file:
        for doc in run.documents(dataclasses.replace(run.config.data, validation_source=run.config.data.source)):
            (example,) = objective.features(doc, rng=keyed_rng(0), draw=None)
            if "inputs_BI" in example:
                told = {"inputs": example["inputs_BI"].tolist(), "targets": example["targets_BL"].tolist()}
            else:
                told = {"inputs": example["tokens_BL"].tolist(), "types": example["types_BL"].tolist(), "label": int(example["label_BL"].max())}
            file.write(json.dumps(told) + "\n")


def ours(run: Any, steps: int) -> dict[str, Any]:
    """Examples a second of a run's steps, as the training loop makes them: the next batch is taken while a step runs."""
    import jax

    from ptm import weights

    params, _ = weights.start(run)
    state, size, shapes = run.init_state(params), run.config.train.batch_size, set()
    del params
    examples, positions, losses, start = 0, 0, [], 0.0
    with contextlib.closing(run.loader()) as loader:
        for step in range(WARMUP + steps):
            if step == WARMUP:
                jax.block_until_ready(state)
                examples, positions, start = 0, 0, time.perf_counter()
            batch = next(loader)
            examples += int(batch["segments_BL"].max(axis=1).sum())
            positions += sum(batch[name].size for name in ("segments_BL", "input_segments_BI") if name in batch)
            shapes.add(tuple(sorted((name, values.shape) for name, values in batch.items())))
            state, metrics = run.train_step(state, run.to_device(batch, batch_size=size, rows=list(range(size))))
            losses.append(metrics["loss"])
            if step:
                losses[-2] = float(losses[-2])
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
    told = {"examples_per_second": examples / seconds, "step_ms": 1000 * seconds / steps, "examples": examples / steps, "positions": positions / steps}
    return {**told, "shapes": len(shapes), "first_loss": float(losses[0]), "last_loss": float(losses[-1])}


def main() -> None:
    """Runs both in turn and adds a line to the results."""
    parser = pairs.parser(__doc__, steps=100)
    parser.add_argument("--task", choices=tuple(TASKS), default="sst2", help="what is learned")
    parser.add_argument("--size", choices=tuple(BERT), default="small", help="size of the BERT")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the peer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another override of our recipe")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # the child process: the directory of the model
    flags = parser.parse_args()
    pairs.data_folder()
    overrides = dict(entry.split("=", 1) for entry in flags.set)
    if flags.ours:
        allocator.keep_pages()  # as `ptm train` does
        print(json.dumps(ours(make_run(flags.task, flags.ours, overrides), flags.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, examples = Path(scratch) / "model", Path(scratch) / "examples.jsonl"
        make_model(flags.task, flags.size, folder)
        write_examples(make_run(flags.task, folder, overrides), examples)
        passed = [f"--set={entry}" for entry in flags.set]
        commands = {
            "ptm": ["benchmarks/finetune.py", f"--task={flags.task}", f"--steps={flags.steps}", f"--ours={folder}", *passed],
            "transformers": [
                "benchmarks/peers/torch_finetune.py", f"--model={folder}", f"--examples={examples}", f"--steps={flags.steps}", f"--warmup={WARMUP}",
                f"--threads={pairs.cores()}", *(["--compile"] if flags.compile else []),
            ],
        }  # fmt: skip
        sides = {side: functools.partial(pairs.printed, command) for side, command in commands.items()}
        found = pairs.alternate(sides, repeats=flags.repeats, show=lambda row: f"{row['examples_per_second']:.1f} examples/s ({row['step_ms']:.0f} ms a step)")
    result = {
        "case": flags.task, "size": flags.size if flags.task == "sst2" else "small", "steps": flags.steps, "repeats": flags.repeats, "compile": flags.compile,
        "overrides": overrides, "unit": "examples/s", **pairs.compare(found, "examples_per_second", higher=True),
        "last": {side: pairs.shortened(rows[-1]) for side, rows in found.items()},
    }  # fmt: skip
    pairs.save("finetune", result, note=flags.note)


if __name__ == "__main__":
    main()
