"""Extractive question answering: SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018), CMRC 2018 (Cui et al. 2019), DRCD (Shao et al. 2018), and from English to Chinese.

    PTM_SQUAD=DIR ptm train --config=configs/finetune/squad.py:squad1 --config.init=hf:DIR --workdir=runs/squad1
    PTM_DATA=DIR ptm train --config=configs/finetune/squad.py:xquad --config.init=hf:DIR --workdir=runs/xquad

Words: squad1 (default), squad2, cmrc2018, drcd, from PTM_SQUAD, a folder with train-v1.1.json, dev-v1.1.json, train-v2.0.json, dev-v2.0.json,
cmrc2018_train.json, cmrc2018_dev.json, DRCD_training.json, DRCD_dev.json, all in SQuAD's format; xquad (Artetxe et al. 2020); tiny, a smoke run on
invented paragraphs. Your own: --config.data.source=squad:train.json --config.data.validation_source=squad:dev.json.

xquad learns from the English questions of $PTM_DATA/qa/xquad and is measured on the Chinese ones, in characters. These are translations of the English
ones, so that what is measured is the transfer between languages alone; to learn from SQuAD as published, --config.data.source=squad:DIR/train-v1.1.json.
Of CMRC 2018 $PTM_DATA has no training set; its trial set takes the place of one: --config.data.source=squad:$PTM_DATA/qa/cmrc2018/cmrc2018_trial.json
--config.data.validation_source=squad:$PTM_DATA/qa/cmrc2018/cmrc2018_dev.json --config.train.steps=250 --config.schedule.warmup_steps=25.

SQuAD: rate 5e-5, 3 epochs (2.0: 2), 32 questions a step (2.0: 48), windows of 384 with a stride of 128 (Devlin et al. 2019, sections 4.2 and 4.3, and
published code); the Chinese sets 3e-5, 2 epochs, windows of 512 (Cui et al. 2019). Rows are packed, so that a step has about so many in fewer rows.

Published, dev: BERT-base SQuAD 1.1 EM 80.8 F1 88.5; CMRC 2018 EM 65.5 F1 84.5; XQuAD, mBERT from SQuAD, F1 en 83.5 zh 58.0. Not run at these sizes here.
"""

import os
from pathlib import Path

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import task
from ptm.models import bert
from ptm.objectives import span_qa

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/squad"
# Files of training and validation, questions, mean tokens of their windows, length, questions of a step, epochs, rate.
SETS = {
    "squad1": ("$PTM_SQUAD/train-v1.1", "$PTM_SQUAD/dev-v1.1", 87_599, 175, 384, 32, 3, 5e-5),
    "squad2": ("$PTM_SQUAD/train-v2.0", "$PTM_SQUAD/dev-v2.0", 130_319, 175, 384, 48, 2, 5e-5),
    "cmrc2018": ("$PTM_SQUAD/cmrc2018_train", "$PTM_SQUAD/cmrc2018_dev", 10_142, 500, 512, 32, 2, 3e-5),
    "drcd": ("$PTM_SQUAD/DRCD_training", "$PTM_SQUAD/DRCD_dev", 26_936, 500, 512, 32, 2, 3e-5),
    "xquad": ("$PTM_DATA/qa/xquad/xquad.en", "$PTM_DATA/qa/xquad/xquad.zh", 1190, 181, 384, 32, 3, 5e-5),
}
TINY = {"squad2": ("train-v2.0", "dev-v2.0"), "xquad": ("train-v1.1", "xquad.zh")}  # of the others train-v1.1, dev-v1.1


def get_config(argument: str = ""):
    """The config of a set (default squad1); `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=tuple(SETS))
    train, dev, questions, tokens, length, of_a_step, epochs, rate = SETS[chosen]
    if scale:
        train, dev = (f"{MINIATURES}/{file}" for file in (TINY[chosen] if chosen in TINY else ("train-v1.1", "dev-v1.1")))
    rows = max(1, round(of_a_step * tokens / length))
    epoch = max(1, round(questions * tokens / (rows * length)))
    cfg = config.base(
        objective=span_qa.Config(
            metrics=("cmrc",) if chosen in ("cmrc2018", "drcd", "xquad") else ("squad",),
            max_answer=50 if chosen in ("cmrc2018", "drcd", "xquad") else 30,
            null_threshold=0.0 if chosen == "squad2" else None,
        ),
        evals={"dev": task.Config(every=epoch)},
        train=Train(steps=epochs * epoch, batch_size=rows),
        data=Data(
            source=(os.path.expandvars(f"squad:{train}.json"),), validation_source=(os.path.expandvars(f"squad:{dev}.json"),),
            columns=("text=question", "context=context", "answers=answers"), length=length,
        ),
        optimizer=Optimizer(learning_rate=rate, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=epochs * epoch // 10),
        checkpoint=Checkpoint(every=epoch, metric="dev/f1", mode="max"),
        log=Log(every=20),
    )  # fmt: skip
    if scale:
        recipe.tiny(cfg, model=bert.BertConfig(max_length=256, dropout=0.0, attention_dropout=0.0), length=256)
        cfg.objective.update(doc_stride=64, max_question=64)
    return cfg
