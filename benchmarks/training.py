"""Training steps on a CPU beside PyTorch: GPTs step by step, BERT and T5 end to end from raw text.

    pip install -e '.[bench]' && PTM_DATA=... python benchmarks/training.py [--only char,gpt,wide,mlm,t5] [--repeats 5] [--steps 100] [--compile]

Sizes are those of benchmarks/recipes.py for both sides. Ours is `ptm train` as a user starts it, timed by its own timing.jsonl, the first steps left out.

char, gpt, wide: milliseconds of a step (batch, forward, backward, clipping, AdamW), the median, beside peers/torch_gpt.py on the same token ids, as it is and
with torch.compile.

mlm, t5: real tokens (no padding; of a T5 the encoder's and the decoder's) over the seconds of whole steps, beside the reference library's models in
peers/hf_pretrain.py with the same tokenizer on the same documents, which both tokenize, corrupt and put into rows as they go. With --compile that runs under
torch.compile as well. What differs: we mask whole paragraphs, and pack them into rows without attention between them, so that a few positions are padding;
the examples of the library put a thousand documents end to end and cut them, where no position is padding and documents see each other. Our vocabulary logits
are of the chosen positions alone, the library's of all. Both tokenize each document in the loop, once in the steps that are timed: all are of the first epoch.

`wait_ms` of a step is, for ours, what the loop waited for its batch (data_seconds of timing.jsonl), for the peers the time in their DataLoader. A JSON
line a case is added to benchmarks/results/training.jsonl. On busy cores the figures say nothing: torch's threads wait for each other.
"""

import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pairs
from pairs import ROOT

PLAIN, END_TO_END = ("char", "gpt", "wide"), ("mlm", "t5")
WARMUP = dict.fromkeys(PLAIN, 20) | dict.fromkeys(END_TO_END, 60)  # of our steps: until the rows that packing keeps open are as full as they stay
PEER_WARMUP, LOGGED = 10, 5  # of the peers' end-to-end steps; steps of a row of our log


def load(case: str) -> Any:
    """The recipe of a case."""
    from ptm import recipe

    return recipe.load(f"{ROOT}/benchmarks/recipes.py:{case}")


def train_command(case: str, workdir: str | Path, *, steps: int, overrides: dict[str, Any] | None = None) -> list[str]:
    """`ptm train` of a case without what a step is not: evaluation and checkpoints at the end alone."""
    given = {
        "train.steps": steps, "schedule.warmup_steps": 0, "evals.validation.batches": 1, "evals.validation.every": steps, "checkpoint.every": steps,
        "log.every": LOGGED, **(overrides or {}),
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    return ["-m", "ptm.cli", "train", f"--config={ROOT}/benchmarks/recipes.py:{case}", f"--workdir={workdir}", *flags]


def positions(config: Any) -> int:
    """Positions of a batch, the encoder's and the decoder's."""
    return config.train.batch_size * (config.data.length + (config.objective.input_length if "input_length" in config.objective else 0))


def ours(case: str, *, steps: int) -> dict[str, Any]:
    """How fast `ptm train` was after the first steps, by the rows of its log."""
    with tempfile.TemporaryDirectory() as workdir:
        pairs.completed(train_command(case, workdir, steps=WARMUP[case] + steps))
        timing, metrics = ([json.loads(line) for line in (Path(workdir) / name).read_text().splitlines()] for name in ("timing.jsonl", "metrics.jsonl"))
    timing = [row for row in timing if row["step"] >= WARMUP[case]]
    padding = statistics.mean(row["padding_share"] for row in metrics if row["step"] > WARMUP[case] and "padding_share" in row)
    losses = [row["loss"] for row in metrics if "loss" in row]
    step_ms = [1e3 * (b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in zip(timing, timing[1:])]
    seconds = (timing[-1]["time"] - timing[0]["time"]) / (timing[-1]["step"] - timing[0]["step"])
    tokens = positions(load(case)) * (1 - padding)
    return {
        "tokens_per_second": tokens / seconds, "step_ms": statistics.median(step_ms), "wait_ms": 1e3 * statistics.mean(row["data_seconds"] for row in timing[1:]),
        "tokens": tokens, "padding": padding, "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


def write_tokens(run: Any, path: Path) -> None:
    """The token ids of a run's text, both splits, for the peer."""
    import numpy as np

    text = Path(run.config.data.source[0].partition(":")[2]).read_text(encoding="utf-8")
    np.save(path, run.tokenizer.encode(text))


def write_texts(data: Any, path: Path) -> None:
    """The training documents of a run, JSON lines."""
    from ptm.data.documents import Corpus

    corpus = Corpus(data, split="train")
    found = (corpus.record(source, record) for source, size in enumerate(corpus.sizes) for record in range(size))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": record[0]}) + "\n" for record in found if record is not None)


def write_tokenizer(run: Any, folder: Path) -> None:
    """A run's tokenizer as the reference library has it. Ends the program where there is no counterpart."""
    from ptm import hf
    from ptm.hf import vocabulary

    if notes := vocabulary.write(run.tokenizer, folder, classes=hf.family_of(run.model.config).tokenizers, max_length=None):
        raise SystemExit("\n".join(notes))


def write_model(run: Any, folder: Path) -> None:
    """A run's model, without weights, and its tokenizer as the reference library has them."""
    from ptm import hf
    from ptm.hf import files, transfer

    config, tokenizer = run.model.config, run.tokenizer
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
    theirs = transfer.write_config(hf.family_of(config), config, run.objective.heads)
    files.write_json(folder / "config.json", {**ids, "decoder_start_token_id": tokenizer.pad_id, **theirs})
    write_tokenizer(run, folder)


def peer_commands(case: str, scratch: Path, *, steps: int, compiled: bool) -> dict[str, list[str]]:
    """The sides of a case beside ours, that without torch.compile first; what they read is written to a folder."""
    from ptm import run as run_lib

    run = run_lib.setup(load(case))
    config, threads = run.config, f"--threads={pairs.cores()}"
    if case in PLAIN:
        model = run.model.config
        write_tokens(run, scratch / "ids.npy")
        sizes = {
            "vocab_size": model.vocab_size, "num_layers": model.num_layers, "num_heads": model.num_heads, "width": model.width, "context": config.data.length,
            "batch_size": config.train.batch_size,
        }  # fmt: skip
        command = ["benchmarks/peers/torch_gpt.py", f"--bench={steps}", "--json", threads, f"--tokens={scratch}/ids.npy", f"--config={json.dumps(sizes)}"]
        return {"torch": [*command, "--no-compile"], "torch.compile": [*command, "--compile"]}
    write_texts(config.data, scratch / "texts.jsonl")
    write_model(run, scratch)
    length = config.objective.input_length if case == "t5" else config.data.length
    command = [
        "benchmarks/peers/hf_pretrain.py", f"--model={scratch}", f"--texts={scratch}/texts.jsonl", f"--objective={config.objective.name}",
        f"--length={length}", f"--batch_size={config.train.batch_size}", f"--steps={steps}", f"--warmup={PEER_WARMUP}", threads,
    ]  # fmt: skip
    return {"transformers": command, **({"transformers.compile": [*command, "--compile"]} if compiled else {})}


def main() -> None:
    """Measures the cases and adds a line for each to the results."""
    parser = pairs.parser(__doc__, steps=100, cases=(*PLAIN, *END_TO_END))
    parser.add_argument("--compile", action="store_true", help="torch.compile for the peers of mlm and t5 as well")
    flags = parser.parse_args()
    pairs.data_folder()
    for case in pairs.chosen(flags, (*PLAIN, *END_TO_END)):
        print(case, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            commands = peer_commands(case, Path(scratch), steps=flags.steps, compiled=flags.compile)
            sides = {"ptm": functools.partial(ours, case, steps=flags.steps)} | {side: functools.partial(pairs.printed, command) for side, command in commands.items()}
            if case in PLAIN:
                found = pairs.alternate(sides, repeats=flags.repeats, show=lambda row: f"{row['step_ms']:.1f} ms")
                compared = {"unit": "ms a step", **pairs.compare(found, "step_ms", higher=False)}
            else:
                found = pairs.alternate(sides, repeats=flags.repeats, show=lambda row: f"{row['tokens_per_second']:.0f} tokens/s")
                compared = {"unit": "tokens/s", **pairs.compare(found, "tokens_per_second", higher=True)}
        last = {side: pairs.shortened(rows[-1]) for side, rows in found.items()}
        pairs.save("training", {"case": case, "steps": flags.steps, "repeats": flags.repeats, **compared, "last": last}, note=flags.note)


if __name__ == "__main__":
    main()
