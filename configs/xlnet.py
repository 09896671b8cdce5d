"""XLNet (Yang et al. 2019, section 3.1 and table 6): permutation language modelling with two streams and a memory of the rows before.

    ptm train --config=configs/xlnet.py:base --workdir=runs/xlnet --config.data.source=text:corpus/*.txt --config.data.document=file

`base` has the shape of the ablations (table 6: RACE 66.05, SQuAD 2.0 F1 81.33 with K=7) with BERT's batch and steps, `large` is the released
model (500,000 steps of 8,192 rows on 512 TPU chips, 5.5 days). Not run at this size here. ':tiny' is a smoke run of the same recipe on text that every
Python carries. The arms of table 6: --config.objective.memory_length=0, --config.objective.unit=token, --config.objective.bidirectional=false.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import xlnet
from ptm.objectives import permutation


def get_config(argument: str = ""):
    """The config of `base` (default) or `large`; `tiny` makes it a smoke run."""
    size, _, scale = recipe.words(argument, recipes=("base", "large"))
    base = size == "base"
    cfg = config.base(
        model=xlnet.Config(**xlnet.SIZES[size]),
        objective=permutation.Config(partial=6, memory_length=384),
        evals={"validation": loss.Config(every=10_000, batches=100, batch_size=256)},
        train=Train(steps=1_000_000 if base else 500_000, batch_size=256 if base else 8192, microbatches=1 if base else 8),
        data=Data(length=512),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=32000, train_bytes=1_000_000_000),
        optimizer=Optimizer(learning_rate=1e-4 if base else 4e-4, weight_decay=0.01, eps=1e-6, clip_norm=None),
        schedule=Schedule(name="linear", warmup_steps=10_000 if base else 40_000),
        compute=Compute(dtype="bfloat16"),
        checkpoint=Checkpoint(every=10_000),
        log=Log(every=100),
    )
    if scale:
        recipe.tiny(cfg)
        cfg.objective.memory_length = 24
    return cfg
