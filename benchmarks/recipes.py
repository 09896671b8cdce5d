"""The runs that are timed beside a peer: recipes as those of configs/, at sizes that a few CPU cores train in seconds.

    PTM_DATA=... ptm train --config=benchmarks/recipes.py:gpt --workdir=runs/gpt

char: configs/gpt2.py:shakespeare_char_cpu. gpt: the same data as pieces of an 8k vocabulary, 4 layers of width 256, rows of 128, 16 a step. wide: characters,
6 layers of width 384, rows of 256, 8 a step. mlm: a BERT of 4 layers of width 256 with BERT's own vocabulary of 30,522 pieces, rows of 128, 32 a step. t5: a T5
of 4 + 4 layers of width 256 and 8k pieces with 100 sentinels, 512 positions in and 114 out, 8 rows a step. float32, AdamW, the gradient's norm clipped;
dropout as published: none in the GPTs, 0.1 (of hidden states and attention weights) in the two others.
"""

import os
from pathlib import Path

from ptm import config, recipe
from ptm.config import Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import bert, t5
from ptm.objectives import mlm, span_corruption

# Layers, width, heads, positions of a row, rows of a step, pieces of a vocabulary (None: characters); `char` is as published.
GPTS = {"char": None, "gpt": (4, 256, 4, 128, 16, 8192), "wide": (6, 384, 6, 256, 8, None)}
SHAPES = {
    "mlm": {"num_layers": 4, "width": 256, "num_heads": 4},
    "t5": {"num_layers": 4, "width": 256, "num_heads": 4, "mlp_width": 1024},
}


def get_config(argument: str = ""):
    """The config of `char` (default), `gpt`, `wide`, `mlm` or `t5`."""
    name = recipe.words(argument, recipes=(*GPTS, *SHAPES), scales=()).recipe
    cfg = _gpt(name) if name in GPTS else _end_to_end(name)
    cfg.log.writers = ()
    return cfg


def _gpt(name: str):
    cfg = recipe.load(f"{Path(__file__).parent.parent / 'configs/gpt2.py'}:shakespeare_char_cpu")
    if GPTS[name] is not None:
        layers, width, heads, length, rows, pieces = GPTS[name]
        cfg.model.update(num_layers=layers, width=width, num_heads=heads, max_length=length)
        cfg.data.length, cfg.train.batch_size, cfg.evals["validation"].batch_size = length, rows, rows
        if pieces:
            cfg.tokenizer.update(kind="bpe", vocab_size=pieces)
    return cfg


def _end_to_end(name: str):
    """A run whose pipeline reads, tokenizes, corrupts and packs text as it goes: paragraphs of a novel and of Wikipedia, a million and a half pieces."""
    data = os.environ["PTM_DATA"]
    if name == "mlm":
        learner = {
            "model": bert.BertConfig(**SHAPES[name]),
            "objective": mlm.Config(),
            "tokenizer": Tokenizer(kind="wordpiece", path=f"{data}/vocab/bert_uncased", lowercase=True),
        }
    else:
        learner = {
            "model": t5.Config(**SHAPES[name]),
            "objective": span_corruption.Config(input_length=512),
            "tokenizer": Tokenizer(kind="sentencepiece", vocab_size=8192, sentinels=100),
        }
    return config.base(
        **learner,
        evals={"validation": loss.Config(every=1000, batches=20)},
        train=Train(steps=1000, batch_size=32 if name == "mlm" else 8),
        data=Data(
            source=(f"text:{data}/lm/warandpeace/warandpeace.txt", f"text:{data}/lm/wikitext2/wiki.*.tokens"), document="paragraph", temperature=1.0,
            holdout=0.01, length=128 if name == "mlm" else 114,
        ),
        optimizer=Optimizer(learning_rate=1e-4, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=100),
        compute=Compute(scan_layers=False),
        log=Log(every=50),
    )  # fmt: skip
