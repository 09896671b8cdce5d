"""Pretraining in PyTorch with the reference library's models, from raw text: the peer of training.py's BERT and T5, and of data.py.

    python benchmarks/peers/hf_pretrain.py --model DIR --texts FILE.jsonl --objective mlm --length 128 --batch_size 32 --steps 100

DIR holds a config.json and a tokenizer, FILE a document a line, {"text": ...}. As the library's examples run_mlm, run_clm and run_t5_mlm do it: documents in a
random order are tokenized a thousand at a time by the fast tokenizer, special pieces around each (mlm), put end to end and cut into rows of equal length, so that
nothing is padding; what is left of a thousand is dropped. A DataLoader makes the batches: masking by the library's own collator, span corruption (Raffel et
al. 2020, section 3.1.4) by the one below, with input and target of exactly the lengths asked for. Fused AdamW, the gradient's norm clipped at 1, float32, dropout
and attention (sdpa where the model has it) as the library has them. Prints a JSON line: tokens a second over whole steps, those before --warmup left out; with
--data_only those of one pass over all documents that nothing is trained on.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, IterableDataset

CHUNK = 1000  # documents tokenized at once, as `datasets` maps them
RATE, MEAN_SPAN = 0.15, 3.0


class Rows(IterableDataset):
    """Token ids of equal length from documents in a random order, once or again and again."""

    def __init__(self, texts: list[str], *, tokenizer: Any, length: int, specials: bool, end: int | None, once: bool):
        """`specials` puts the tokenizer's around each document, `end` is put behind it."""
        self.texts, self.tokenizer, self.length, self.specials, self.end, self.once = texts, tokenizer, length, specials, end, once

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        order, shuffle = list(range(len(self.texts))), random.Random(0)
        for _ in itertools.repeat(None, 1) if self.once else itertools.repeat(None):
            shuffle.shuffle(order)
            for start in range(0, len(order), CHUNK):
                yield from self._grouped([self.texts[n] for n in order[start : start + CHUNK]])

    def _grouped(self, texts: list[str]) -> Iterator[dict[str, list[int]]]:
        found = self.tokenizer(texts, add_special_tokens=self.specials, return_attention_mask=False, return_special_tokens_mask=self.specials)
        joined = {name: [i for ids in found[name] for i in (ids if self.end is None else [*ids, self.end])] for name in found}
        total = len(joined["input_ids"]) // self.length * self.length
        for start in range(0, total, self.length):
            yield {name: values[start : start + self.length] for name, values in joined.items()}


def causal_collator(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows and their labels, which the model shifts."""
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids.clone()}


def span_lengths(inputs: int) -> tuple[int, int]:
    """(tokens of a piece of text, length of its target) whose corrupted input, end token included, has `inputs` positions."""

    def sizes(tokens: int) -> tuple[int, int]:
        noise = round(tokens * RATE)
        spans = max(round(noise / MEAN_SPAN), 1)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs
    while sizes(tokens + 1)[0] <= inputs:
        tokens += 1
    return tokens, sizes(tokens)[1]


def noise_mask(length: int, rng: np.random.Generator) -> np.ndarray:
    """Boolean [length]: spans of noise between spans of text, all ways to cut both equally likely."""
    noise = round(length * RATE)
    spans = max(round(noise / MEAN_SPAN), 1)

    def cut(total: int) -> np.ndarray:
        first = np.zeros(total, np.int64)
        first[1 + rng.permutation(total - 1)[: spans - 1]] = 1
        return np.bincount(np.cumsum(first), minlength=spans)

    lengths = np.stack([cut(length - noise), cut(noise)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


class SpanCollator:
    """Rows of text -> inputs and labels of span corruption, for a whole batch at once."""

    def __init__(self, *, sentinels: list[int], end: int):
        self.sentinels, self.end, self.rng = np.array(sentinels), end, np.random.default_rng(0)

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = np.array([example["input_ids"] for example in examples])
        mask = np.stack([noise_mask(ids.shape[1], self.rng) for _ in ids])
        return {"input_ids": self._replaced(ids, mask), "labels": self._replaced(ids, ~mask)}

    def _replaced(self, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        """Each run of the mask as one sentinel, and the end token behind all; every row has as many runs and masked tokens."""
        starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
        marked = np.where(starts, self.sentinels[np.maximum(np.cumsum(starts, axis=1) - 1, 0)], ids)
        kept = marked[~mask | starts].reshape(len(ids), -1)
        return torch.from_numpy(np.concatenate([kept, np.full((len(ids), 1), self.end)], axis=1))


def batches_of(texts: list[str], *, tokenizer: Any, objective: str, length: int, batch_size: int, workers: int, once: bool) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of an objective, endless or of all documents `once`; `length` is that of a row, of span corruption that of the input."""
    specials, end, collate = False, tokenizer.eos_token_id, causal_collator
    if objective == "mlm":
        specials, end = True, None
        collate: Callable = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE)
    elif objective == "span_corruption":
        length = span_lengths(length)[0]
        collate = SpanCollator(sentinels=[tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(100)], end=end)
    rows = Rows(texts, tokenizer=tokenizer, length=length, specials=specials, end=end, once=once)
    return iter(DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=workers))


def tokens_of(batch: dict[str, torch.Tensor]) -> int:
    """Positions that the model reads: all of them real."""
    decoded = batch["labels"].shape != batch["input_ids"].shape
    return batch["input_ids"].numel() + (batch["labels"].numel() if decoded else 0)


def train(model: torch.nn.Module, batches: Iterator[dict[str, torch.Tensor]], *, steps: int, warmup: int, compiled: bool) -> dict[str, Any]:
    """Trains for warmup + steps steps and tells how fast the last `steps` were."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.01, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    start, waited, tokens, losses = 0.0, 0.0, 0, []
    for step in range(warmup + steps):
        if step == warmup:
            start, waited, tokens = time.perf_counter(), 0.0, 0
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        tokens += tokens_of(batch)
        loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step == 0:
            print("First step done", flush=True)
    seconds = time.perf_counter() - start
    told = {"tokens_per_second": tokens / seconds, "step_ms": 1e3 * seconds / steps, "wait_ms": 1e3 * waited / steps, "tokens": tokens / steps}
    return told | {"padding": 0.0, "parameters": sum(p.numel() for p in parameters), "first_loss": losses[0], "last_loss": losses[-1]}


def main() -> None:
    """Trains, or only makes batches, and prints how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with a config.json and a tokenizer")
    parser.add_argument("--texts", type=Path, required=True, help="documents, JSON lines")
    parser.add_argument("--objective", choices=("causal", "mlm", "span_corruption"), required=True)
    parser.add_argument("--length", type=int, required=True, help="positions of a row, of span corruption those of the input")
    parser.add_argument("--batch_size", type=int, required=True, help="rows of a step")
    parser.add_argument("--steps", type=int, default=100, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--workers", type=int, default=0, help="processes of the DataLoader; the examples' default is 0")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--data_only", action="store_true", help="make the batches of one pass, train nothing")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(flags.model)
    texts = [json.loads(line)["text"] for line in flags.texts.read_text(encoding="utf-8").splitlines()]
    batches = batches_of(
        texts, tokenizer=tokenizer, objective=flags.objective, length=flags.length, batch_size=flags.batch_size, workers=flags.workers,
        once=flags.data_only,
    )  # fmt: skip
    if flags.data_only:
        start = time.perf_counter()
        tokens = sum(map(tokens_of, batches))
        print(json.dumps({"tokens_per_second": tokens / (time.perf_counter() - start), "tokens": tokens}))
        return
    config = transformers.AutoConfig.from_pretrained(flags.model)
    model = getattr(transformers, config.architectures[0])(config).train()
    print(json.dumps(train(model, batches, steps=flags.steps, warmup=flags.warmup, compiled=flags.compile)))


if __name__ == "__main__":
    main()
