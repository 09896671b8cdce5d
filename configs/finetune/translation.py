"""Translation from parallel text: a small Transformer from scratch, with one vocabulary for both languages, or a pretrained encoder-decoder.

    PTM_DATA=DIR ptm train --config=configs/finetune/translation.py --workdir=runs/multi30k
    PTM_DATA=DIR ptm train --config=configs/finetune/translation.py:pretrained --config.init=hf:DIR --workdir=runs/multi30k-t5

English to German on Multi30k (Elliott et al. 2016), $PTM_DATA/seq2seq/multi30k. Your own line-aligned files: --config.data.source='parallel:train.{en,de}'
--config.data.validation_source='parallel:dev.{en,de}' --config.evals.dev.source= --config.evals.test.source='parallel:test.{en,de}'; the other way round:
--config.data.columns=text=de,target=en. Words: scratch (default), pretrained, tiny.

scratch: T5's shape (relative positions, pre-norm, rms) at 3 + 3 layers of width 256; vocabulary of 6,000 pieces trained on both sides; label smoothing
0.1 and dropout 0.1 (Vaswani et al. 2017, section 5.4); 2,000 steps of about 120 pairs, Adafactor with a relative rate that rises to 0.015 and falls to 0.
T5's initial queries are a hundred times smaller than its embeddings, and one absolute rate does not suit both: with AdamW at 2e-3 the loss stood still.
Answers are greedy. pretrained: Adafactor at a constant 1e-3 with T5's prefix (Raffel et al. 2020). BLEU is sacrebleu's of the 2016 test set. Published:
small Transformers 38-41 on it; scratch 33.8, in 55 minutes of one CPU core. That the sources matter: `shuf` those of the test set into shuffled.en, with
the German side as shuffled.de, and `ptm evaluate --workdir=DIR --evals=test --config.evals.test.source='parallel:shuffled.{en,de}'`, 0.28.
"""

import os
from pathlib import Path

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss, task
from ptm.models import t5
from ptm.objectives import seq2seq

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/translation"
LENGTH = 64
PREFIX = "translate English to German: "


def get_config(argument: str = ""):
    """The config from `scratch` (default) or of a `pretrained` model; `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=("scratch", "pretrained"))
    root = str(MINIATURES) if scale else "$PTM_DATA/seq2seq/multi30k"
    train, dev, test = (os.path.expandvars(f"parallel:{root}/{file}.{{en,de}}.gz") for file in ("train", "val", "test_2016_flickr"))
    scratch = chosen == "scratch"
    small = t5.Config(num_layers=3, width=256, num_heads=4, head_dim=64, mlp_width=1024, dropout=0.1)
    cfg = config.base(
        **({"model": small} if scratch else {}),
        objective=seq2seq.Config(input_length=LENGTH, label_smoothing=0.1 if scratch else 0.0, prefix="" if scratch else PREFIX, metrics=("bleu", "chrf")),
        evals={
            "validation": loss.Config(every=250),
            "dev": task.Config(every=1000, batch_size=128, source=(dev,)),
            "test": task.Config(every=2000, batch_size=128, source=(test,)),
        },
        train=Train(steps=2000, batch_size=32),
        data=Data(source=(train,), validation_source=(dev,), columns=("text=en", "target=de"), length=LENGTH),
        tokenizer=Tokenizer(kind="sentencepiece", vocab_size=6000, algorithm="bpe"),
        optimizer=Optimizer(name="adafactor", learning_rate=0.015, weight_decay=0.0, b2=0.98)
        if scratch
        else Optimizer(name="adafactor", learning_rate=1e-3, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(name="linear", warmup_steps=200) if scratch else Schedule(name="constant"),
        compute=Compute(scan_layers=False),
        checkpoint=Checkpoint(every=250, metric="validation/loss"),
        log=Log(every=20),
    )
    if scale:
        recipe.tiny(cfg, model=t5.Config(dropout=0.0), length=LENGTH)
        cfg.schedule.warmup_steps = 2 if scratch else 0
        for name in ("dev", "test"):
            cfg.evals[name].every = cfg.train.steps  # a smoke run generates once
    return cfg
