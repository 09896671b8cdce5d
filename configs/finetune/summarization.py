"""Summarization: the subject lines of e-mails of AESLC (Zhang and Tetreault 2019), or your own texts and summaries, by a pretrained encoder-decoder or decoder.

    PTM_DATA=DIR ptm train --config=configs/finetune/summarization.py --config.init=hf:DIR --workdir=runs/aeslc
    ptm train --config=configs/finetune/summarization.py --config.init=hf:DIR --config.data.source=jsonl:train.jsonl \\
        --config.data.validation_source=jsonl:dev.jsonl --config.data.columns=text=article,target=summary \\
        --config.evals.test.source= --workdir=runs/own

Reads $PTM_DATA/seq2seq/aeslc, JSON lines with body and subject, the subject that the writer gave: the one reference of the published figures. For dev and
test three people wrote more, ann0 to ann2; to count the best of all four: --config.evals.test.columns=text=body,target.0=subject,target.1=ann0,... `tiny` is
a smoke run on invented e-mails. ROUGE is rouge_score's.

Adafactor at a constant 1e-3 with T5's prefix (Raffel et al. 2020), 3 epochs, 32 rows of 512 tokens. A decoder reads and writes in one row; set
--config.data.length=576 --config.objective.max_new_tokens=48. For a model that was not trained with prefixes: --config.objective.prefix=.
Published on the full training set: ROUGE-1/2/L of a strong model 37.7/21.9/36.8. Not run at that size here.
"""

import os
from pathlib import Path

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import loss, task
from ptm.models import t5
from ptm.objectives import seq2seq

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/own"
ROWS = 32
EPOCH = 3000 * 150 // (ROWS * 512)  # the e-mails of train_3000.jsonl, of about 150 tokens, in packed rows


def get_config(argument: str = ""):
    """The config of the subject lines; `tiny` makes it a smoke run."""
    _, _, scale = recipe.words(argument, recipes=("aeslc",))
    root = "$PTM_DATA/seq2seq/aeslc"
    train, dev, test = (
        os.path.expandvars(f"jsonl:{MINIATURES}/summaries.jsonl" if scale else f"jsonl:{root}/{file}.jsonl") for file in ("train_3000", "dev", "test")
    )
    cfg = config.base(
        objective=seq2seq.Config(input_length=512, prefix="summarize: ", metrics=("rouge",)),
        evals={
            "validation": loss.Config(every=EPOCH),
            "dev": task.Config(every=EPOCH, examples=500),
            "test": task.Config(every=3 * EPOCH, source=(test,)),
        },
        train=Train(steps=3 * EPOCH, batch_size=ROWS),
        data=Data(source=(train,), validation_source=(dev,), columns=("text=body", "target=subject"), length=48),
        optimizer=Optimizer(name="adafactor", learning_rate=1e-3, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(name="constant"),
        checkpoint=Checkpoint(every=EPOCH, metric="dev/rougeL", mode="max"),
        log=Log(every=10),
    )
    if scale:
        recipe.tiny(cfg, model=t5.Config(dropout=0.0), length=64)
        cfg.schedule.warmup_steps = 0
        cfg.evals.dev.every = cfg.evals.test.every = cfg.train.steps  # a smoke run generates once
    return cfg
