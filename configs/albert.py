"""ALBERT (Lan et al. 2020, section 4.1): factorised embeddings, shared layers, n-gram masking, sentence order prediction, LAMB.

    ptm train --config=configs/albert.py:base --workdir=runs/albert --config.data.source=text:corpus/*.txt --config.data.document=paragraph

Published (table 2, 125,000 steps): average of five tasks 80.1 (base), 82.4 (large), 85.5 (xlarge), 88.7 (xxlarge). Not run at this size here.
':tiny' is a smoke run of the same recipe on text that every Python carries. Ablations: --config.model.share=attention|mlp|none (table 4),
--config.model.embed_width=64 (table 3), --config.objective.task=nsp|none (table 5).
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import albert
from ptm.objectives import pairs


def get_config(argument: str = ""):
    """The config of `base` (default), `large`, `xlarge` or `xxlarge`; `tiny` makes it a smoke run."""
    size, _, scale = recipe.words(argument, recipes=("base", "large", "xlarge", "xxlarge"))
    cfg = config.base(
        model=albert.Config(**albert.SIZES[size]),
        objective=pairs.Config(task="sop", unit="ngram"),
        evals={"validation": loss.Config(every=5_000, batches=100, batch_size=256)},
        train=Train(steps=125_000, batch_size=4096, microbatches=4),
        data=Data(length=512),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=30000, lowercase=True, train_bytes=1_000_000_000),
        optimizer=Optimizer(name="lamb", learning_rate=0.00176, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=3125),
        compute=Compute(dtype="bfloat16"),
        checkpoint=Checkpoint(every=5_000),
        log=Log(every=100),
    )
    return recipe.tiny(cfg) if scale else cfg
