"""ELECTRA (Clark et al. 2020, tables 6 and 7): replaced-token detection beside a small generator.

    ptm train --config=configs/electra.py:small --workdir=runs/electra --config.data.source=text:corpus/*.txt --config.data.document=paragraph

Published GLUE averages (dev): small 79.9 (a million steps, 4 days on one V100), base 85.1, large 89.0 (400,000 steps). Not run at this size here.
':tiny' is a smoke run of the same recipe on text that every Python carries. The arms of table 5: --config.objective.arm=fifteen|replace_mlm|
all_tokens_mlm; weight tying: --config.model.tie_embeddings=none|tokens|embeddings|all; size of the generator: --config.model.generator_fraction.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import electra
from ptm.objectives import rtd

# Size: steps, rows of a step, tokens of a row, learning rate, share of masked tokens.
SETTINGS = {"small": (1_000_000, 128, 128, 5e-4, 0.15), "base": (766_000, 256, 512, 2e-4, 0.15), "large": (400_000, 2048, 512, 2e-4, 0.25)}


def get_config(argument: str = ""):
    """The config of `small` (default), `base` or `large`; `tiny` makes it a smoke run."""
    size, _, scale = recipe.words(argument, recipes=tuple(SETTINGS))
    steps, batch_size, length, learning_rate, rate = SETTINGS[size]
    cfg = config.base(
        model=electra.Config(**electra.SIZES[size]),
        objective=rtd.Config(rate=rate),
        evals={"validation": loss.Config(every=10_000, batches=100)},
        train=Train(steps=steps, batch_size=batch_size),
        data=Data(length=length),
        tokenizer=Tokenizer(kind="wordpiece", vocab_size=30522, lowercase=True, train_bytes=1_000_000_000),
        optimizer=Optimizer(learning_rate=learning_rate, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=10_000),
        compute=Compute(dtype="bfloat16"),
        checkpoint=Checkpoint(every=10_000),
        log=Log(every=100),
    )
    if scale:
        recipe.tiny(cfg)
        cfg.model.generator_fraction = 0.5  # of the smallest width a quarter is no whole number of heads
    return cfg
