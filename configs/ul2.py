"""UL2 (Tay et al. 2022, sections 3 and 4.2): a mixture of denoisers with mode tokens, on an encoder-decoder or on a decoder alone.

    ptm train --config=configs/ul2.py --workdir=runs/ul2 --config.data.source=jsonl:c4/*.jsonl

`encoder_decoder` (default) has the shape of T5 1.1 base, `decoder` a Llama-like shape of the same width. 500,000 steps of 128 rows as in the paper's
ablations. Not run at this size here. ':tiny' is a smoke run of the same recipe on text that every Python carries.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import llama, t5
from ptm.objectives import ul2


def get_config(argument: str = ""):
    """The config of `encoder_decoder` (default) or `decoder`; `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=("encoder_decoder", "decoder"))
    if chosen == "decoder":
        model = llama.Config(num_layers=24, width=768, num_heads=12, mlp_width=2048, max_length=1024)
    else:
        model = t5.Config(**t5.SIZES["v1_1_base"], dropout=0.0)
    cfg = config.base(
        model=model,
        objective=ul2.Config(input_length=512),
        evals={"validation": loss.Config(every=10_000, batches=100)},
        train=Train(steps=500_000, batch_size=128),
        data=Data(length=1024 if chosen == "decoder" else 512),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=32000, sentinels=100, train_bytes=1_000_000_000),
        optimizer=Optimizer(name="adafactor", learning_rate=1e-2, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(name="rsqrt", warmup_steps=10_000),
        compute=Compute(dtype="bfloat16"),
        checkpoint=Checkpoint(every=10_000),
        log=Log(every=100),
    )
    return recipe.tiny(cfg) if scale else cfg
