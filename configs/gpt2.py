"""GPT-2 (Radford et al. 2019) and the small character-level runs that are compared with it.

shakespeare_char_cpu: nanoGPT's CPU recipe on tiny Shakespeare, first 90 % / last 10 % by characters, random windows of 64.

    PTM_DATA=... ptm train --config=configs/gpt2.py:shakespeare_char_cpu --workdir=runs/char

    Expected: validation loss 1.907 nats/char over all of the last 10 %, mean of 3 seeds (published 1.88, estimated from a few batches);
    about two minutes on 2 cores.

shakespeare_char_best: the same parameters and number of training tokens with a larger learning rate and initialisation, and layers that
start as the identity. Expected: 1.700, mean of 3 seeds.

The text is read from $PTM_DATA/lm/tinyshakespeare/input.txt.
"""

import os

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import gpt
from ptm.objectives import causal


def get_config(argument: str = ""):
    """The config of `shakespeare_char_cpu` (default) or `shakespeare_char_best`; `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=("shakespeare_char_cpu", "shakespeare_char_best"))
    if "PTM_DATA" not in os.environ:
        raise ConfigError("configs/gpt2.py reads tiny Shakespeare from $PTM_DATA/lm/tinyshakespeare/input.txt; set PTM_DATA to the folder of data sets.")
    steps = 20 if scale == "tiny" else 2000
    cfg = config.base(
        model=gpt.Config(num_layers=4, width=128, num_heads=4, max_length=64, use_bias=False, activation="gelu", dropout=0.0, attention_dropout=0.0),
        objective=causal.Config(boundaries=False),
        evals={"validation": loss.Config(every=steps // 2, batch_size=96)},
        train=Train(steps=steps, batch_size=12),
        data=Data(
            source=(f"text:{os.environ['PTM_DATA']}/lm/tinyshakespeare/input.txt",), document="file", holdout=0.1, holdout_by="tail",
            length=64, packing="window", max_record_tokens=2_000_000,
        ),
        tokenizer=Tokenizer(kind="chars"),
        optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.1, b2=0.99, clip_norm=1.0),
        schedule=Schedule(name="cosine", warmup_steps=0 if scale == "tiny" else 100, final_factor=0.1),
        compute=Compute(scan_layers=False),
        checkpoint=Checkpoint(every=10 if scale == "tiny" else 500),
        log=Log(every=5 if scale == "tiny" else 50),
    )  # fmt: skip
    if chosen == "shakespeare_char_best":
        cfg.model.init_std = 0.09  # about 1 / sqrt(width)
        cfg.model.residual_std = 0.0
        cfg.optimizer.learning_rate = 3e-3
    return cfg
