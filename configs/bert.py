"""BERT (Devlin et al. 2019, section A.2): masked language modelling and next sentence prediction, 900,000 steps at length 128, 100,000 at 512.

    ptm train --config=configs/bert.py:base --workdir=runs/bert --config.data.source=text:corpus/*.txt --config.data.document=paragraph
    ptm train --config=configs/bert.py:base_512 --workdir=runs/bert-512 --config.init=ckpt:runs/bert --config.tokenizer.path=runs/bert/tokenizer ...

`large` and `large_512` are the same for BERT-large. Published: 3.99 MLM perplexity and MNLI 84.4 (base; table 6), on English Wikipedia and
BooksCorpus, 4 days on 16 TPU chips. Not run at this size here. ':tiny' is a smoke run of the same recipe on text that every Python carries.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import bert
from ptm.objectives import pairs


def get_config(argument: str = ""):
    """The config of `base` (default), `base_512`, `large` or `large_512`; `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=("base", "base_512", "large", "large_512"))
    size, _, second = chosen.partition("_")
    cfg = config.base(
        model=bert.BertConfig(**bert.SIZES[size]),
        objective=pairs.Config(task="nsp", visits=10),
        evals={"validation": loss.Config(every=10_000, batches=100)},
        train=Train(steps=100_000 if second else 900_000, batch_size=256),
        data=Data(length=512 if second else 128),
        tokenizer=Tokenizer(kind="wordpiece", vocab_size=30522, lowercase=True, train_bytes=1_000_000_000),
        # The rate falls linearly over a million steps: to a tenth in the first part, from there to 0 in the second.
        optimizer=Optimizer(learning_rate=1e-5 if second else 1e-4, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=0 if second else 10_000, final_factor=0.0 if second else 0.1),
        compute=Compute(dtype="bfloat16"),
        checkpoint=Checkpoint(every=10_000),
        log=Log(every=100),
    )
    return recipe.tiny(cfg) if scale else cfg
