"""Fine-tuning in PyTorch with the reference library's models: the peer that `ptm`'s examples a second are compared with.

    python benchmarks/peers/torch_finetune.py --model DIR --examples FILE.jsonl --steps 100

DIR is a directory of the reference library, FILE holds tokenized examples: {"inputs", "types", "label"} of a classifier, {"inputs", "targets"} of an
encoder-decoder. What such a loop does best on a CPU: batches of examples of similar length, drawn by the library's own sampler and padded to the longest of
each batch; fused attention (sdpa) where the model has it, fused AdamW, no bookkeeping; float32, dropout as the model has it, gradients clipped at norm 1.
--compile adds torch.compile with dynamic lengths. Prints a JSON line: examples a second of all steps after the first `--warmup`, batch making included.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_pt_utils import LengthGroupedSampler


def batch_of(examples: list[dict[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """Padded tensors of some examples, as the model takes them."""

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(example[name]) for example in examples], batch_first=True, padding_value=value)

    lengths = torch.tensor([len(example["inputs"]) for example in examples])
    batch = {"input_ids": padded("inputs", padding), "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
    if "targets" in examples[0]:
        return batch | {"labels": padded("targets", -100)}
    return batch | {"token_type_ids": padded("types", 0), "labels": torch.tensor([example["label"] for example in examples])}


def main() -> None:
    """Trains for some steps and prints how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the reference library")
    parser.add_argument("--examples", type=Path, required=True, help="tokenized examples, JSON lines")
    parser.add_argument("--steps", type=int, default=100, help="timed steps")
    parser.add_argument("--warmup", type=int, default=8, help="steps before these")
    parser.add_argument("--batch_size", type=int, default=32, help="examples of a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--compile", action="store_true", help="torch.compile with dynamic lengths")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    name = json.loads((flags.model / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(flags.model, dtype=torch.float32).train()
    examples = [json.loads(line) for line in flags.examples.read_text().splitlines()]
    lengths = [len(example["inputs"]) + len(example["targets"] if "targets" in example else ()) for example in examples]
    sampler = LengthGroupedSampler(flags.batch_size, lengths=lengths, generator=torch.Generator().manual_seed(0))
    order = iter(sampler)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-5, eps=1e-6, weight_decay=0.01, fused=True)
    forward = torch.compile(model, dynamic=True) if flags.compile else model
    losses, positions, start = [], 0, 0.0
    for step in range(flags.warmup + flags.steps):
        if step == flags.warmup:
            start, positions = time.perf_counter(), 0
        batch = batch_of([examples[next(order)] for _ in range(flags.batch_size)], model.config.pad_token_id)
        positions += batch["input_ids"].numel() + (batch["labels"].numel() if batch["labels"].ndim > 1 else 0)
        loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    told = {"examples_per_second": flags.steps * flags.batch_size / seconds, "step_ms": 1000 * seconds / flags.steps}
    told |= {"examples": flags.batch_size, "positions": positions / flags.steps}
    print(json.dumps({**told, "attention": model.config._attn_implementation, "first_loss": losses[0], "last_loss": losses[-1]}))


if __name__ == "__main__":
    main()
