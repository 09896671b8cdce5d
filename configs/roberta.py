"""RoBERTa (Liu et al. 2019, section 5 and table 9): dynamic masking of full sentences without a pair task, large batches, byte-level BPE.

    ptm train --config=configs/roberta.py:base --workdir=runs/roberta --config.data.source=text:corpus/*.txt --config.data.document=paragraph

Published: MNLI-m 87.6 (base) and 90.2 (large, 500,000 steps, 160 GB of text). Not run at this size here. ':tiny' is a smoke run of the
same recipe on text that every Python carries. The other input formats of table 2: --config.objective.format=segment_pair|doc_sentences|...,
with bert.py for those with next sentence prediction.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import bert
from ptm.objectives import pairs


def get_config(argument: str = ""):
    """The config of `base` (default) or `large`; `tiny` makes it a smoke run."""
    size, _, scale = recipe.words(argument, recipes=("base", "large"))
    cfg = config.base(
        model=bert.RobertaConfig(**bert.ROBERTA_SIZES[size]),
        objective=pairs.Config(task="none", format="full_sentences"),
        evals={"validation": loss.Config(every=10_000, batches=100, batch_size=256)},
        train=Train(steps=500_000, batch_size=8192, microbatches=8),
        data=Data(length=512),
        tokenizer=Tokenizer(kind="bpe", vocab_size=50265, train_bytes=1_000_000_000),
        optimizer=Optimizer(learning_rate=6e-4 if size == "base" else 4e-4, weight_decay=0.01, b2=0.98, eps=1e-6, clip_norm=None),
        schedule=Schedule(name="linear", warmup_steps=24_000 if size == "base" else 30_000),
        compute=Compute(dtype="bfloat16"),
        checkpoint=Checkpoint(every=5_000),
        log=Log(every=100),
    )
    return recipe.tiny(cfg) if scale else cfg
