"""T5 (Raffel et al. 2020, section 3.1): span corruption with Adafactor at an inverse square root rate.

    ptm train --config=configs/t5.py:base --workdir=runs/t5 --config.data.source=jsonl:c4/*.jsonl

`base` is the paper's baseline: 2**19 steps of 128 rows of 512 tokens of C4; `small` the same with the smaller model; `v1_1_base` and `v1_1_small`
have T5 1.1's gated feed-forward, untied head and no dropout. Published: 83.28 average on GLUE (baseline, standard deviation 0.235). Not run at
this size here. ':tiny' is a smoke run of the same recipe on text that every Python carries. Other objectives of section 3.3 by a word:
`denoising` (BERT-style; --config.objective.variant=mass_style|deshuffling|iid_spans|drop_tokens for the others), `prefix`.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import t5
from ptm.objectives import denoising, prefix, span_corruption


def get_config(argument: str = ""):
    """The config of `base` (default), `small`, `v1_1_base` or `v1_1_small` with `corruption` (default), `denoising` or `prefix`; `tiny` makes it a smoke run."""
    size, objective, scale = recipe.words(
        argument, recipes=("base", "small", "v1_1_base", "v1_1_small"), objectives=("corruption", "denoising", "prefix")
    )  # fmt: skip
    made = {
        "": span_corruption.Config(input_length=512),
        "corruption": span_corruption.Config(input_length=512),
        "denoising": denoising.Config(variant="bert_style", input_length=512),
        "prefix": prefix.Config(input_length=512),
    }
    cfg = config.base(
        model=t5.Config(**t5.SIZES[size], dropout=0.0 if size.startswith("v1_1") else 0.1),
        objective=made[objective],
        evals={"validation": loss.Config(every=10_000, batches=100)},
        train=Train(steps=2**19, batch_size=128),
        # 15 % in spans of 3 tokens turn 512 tokens of input into targets of at most 114.
        data=Data(length=512 if objective in ("denoising", "prefix") else 114),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=32000, sentinels=100, train_bytes=1_000_000_000),
        optimizer=Optimizer(name="adafactor", learning_rate=1e-2, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(name="rsqrt", warmup_steps=10_000),
        compute=Compute(dtype="bfloat16"),
        checkpoint=Checkpoint(every=10_000),
        log=Log(every=100),
    )
    return recipe.tiny(cfg) if scale else cfg
