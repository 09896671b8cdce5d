"""CLUE (Xu et al. 2020), Chinese: AFQMC, TNEWS, IFLYTEK, CMNLI, OCNLI, CLUEWSC2020, CSL, CMRC 2018, CHID and C3.

    PTM_CLUE=DIR ptm train --config=configs/finetune/clue.py:tnews --config.init=hf:DIR --workdir=runs/clue/tnews
    PTM_CLUE=DIR ptm train --config=configs/finetune/clue.py:cmrc2018,test --config.init=hf:DIR --workdir=runs/clue/cmrc2018
    ptm submission --benchmark=clue --runs='runs/clue/*' --output=submission

PTM_CLUE names the folder with afqmc, tnews, iflytek, cmnli, ocnli, cluewsc2020, csl, cmrc2018, chid and c3, each with the files of its official archive
(train.json, dev.json, test.json; of OCNLI train.50k.json, of C3 d-*.json and m-*.json, of C3 and CHID the test1.1.json). Words, in any order:

    afqmc tnews iflytek cmnli ocnli cluewsc csl cmrc2018 chid c3   the task
    test                                                           answer the test set too at the end, for a submission
    tiny                                                           a smoke run on invented sentences: no checkpoint, no folder

Rate 2e-5, 3 epochs, warm-up over 10 %, 32 texts a step, packed into fewer rows, as in the published baselines; their exceptions: CSL 1e-5 and 5 epochs,
CMRC 2018 3e-5 and 2 epochs, C3 8 epochs. CLUEWSC's 20 epochs are ours. Pairs without an agreed label ('-' in CMNLI and OCNLI) are named and left out.
CLUEWSC is a pair of the text, its *pronoun* between asterisks, and the noun; CSL one of abstract and keywords; CMRC 2018 is answered by extraction.
The candidates of CHID and C3 share a row of 512 positions, 51 for each of CHID's ten (20 characters on either side of the blank) and 128 for each of
C3's four, where the baselines read C3 with 512 for each; models without a table of positions take more: --config.data.length=2048.

Published, BERT-base (dev; Xu et al. 2020): TNEWS 56.6 (test), CMNLI 79.4 matched, CMRC 2018 EM 64.8 F1 85.5, CHID 82.2. Not run here.
"""

import os
from pathlib import Path
from typing import NamedTuple

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import task
from ptm.models import bert
from ptm.objectives import choose, classify, span_qa

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/clue"
TEXTS = 32  # of a step


class Task(NamedTuple):
    """A task: format, folder, columns, those of the truth, training records and their mean tokens, length of a row, epochs, rate, names of the splits' files."""

    format: str
    folder: str
    read: tuple[str, ...]
    truth: str
    examples: int
    tokens: int
    length: int = 128
    epochs: int = 3
    rate: float = 2e-5
    files: tuple[str, str, str] = ("train", "dev", "test")


PAIR = ("text=sentence1", "pair=sentence2")
AGREED = "label={label|entailment=entailment|neutral=neutral|contradiction=contradiction}"
CHOICES = ("text=text", "choices=choices")
TASKS = {
    "afqmc": Task("jsonl", "afqmc", PAIR, "label=label", 34_334, 30),
    "tnews": Task("jsonl", "tnews", ("text=sentence",), "label=label", 53_360, 26),
    "iflytek": Task("jsonl", "iflytek", ("text=sentence",), "label=label", 12_133, 125),
    "cmnli": Task("jsonl", "cmnli", PAIR, AGREED, 391_782, 55),
    "ocnli": Task("jsonl", "ocnli", PAIR, AGREED, 50_437, 40, files=("train.50k", "dev", "test")),
    "cluewsc": Task("cluewsc", "cluewsc2020", ("text=text", "pair=noun"), "label=label", 1244, 75, epochs=20),
    "csl": Task("csl", "csl", ("text=text", "pair=keywords"), "label=label", 20_000, 240, length=256, epochs=5, rate=1e-5),
    "cmrc2018": Task("squad", "cmrc2018", ("text=text", "context=context"), "answers=answers", 10_142, 500, length=512, epochs=2, rate=3e-5),
    "chid": Task("chid", "chid", CHOICES, "label=label", 577_157, 500, length=512, files=("train", "dev", "test1.1")),
    "c3": Task("c3", "c3", (*CHOICES, "pair=question"), "label=label", 11_869, 480, length=512, epochs=8, files=("?-train", "?-dev", "test1.1")),
}
LABELS = {"cmnli": ("entailment", "neutral", "contradiction"), "ocnli": ("entailment", "neutral", "contradiction"), "cluewsc": ("false", "true")}


def _objective(name: str):
    if name == "cmrc2018":
        return span_qa.Config(metrics=("cmrc",), max_answer=50)
    if name in ("chid", "c3"):
        return choose.Config(max_choices=10 if name == "chid" else 4)
    return classify.Config(labels=LABELS[name] if name in LABELS else ())


def get_config(argument: str = ""):
    """The config of a task (default afqmc); see above for the words."""
    words = recipe.words(argument, recipes=tuple(TASKS), extras=("test",))
    name, made = words.recipe, TASKS[words.recipe]
    root = str(MINIATURES) if words.scale else "$PTM_CLUE"
    train, dev, test = (os.path.expandvars(f"{made.format}:{root}/{made.folder}/{file}.json") for file in made.files)
    rows = max(1, round(TEXTS * made.tokens / made.length))
    epoch = made.examples * made.tokens / (rows * made.length)
    steps = round(made.epochs * epoch)
    evals = {name: task.Config(every=max(1, round(epoch)))}
    if "test" in argument.split(","):
        evals[f"{name}_test"] = task.Config(every=steps, source=(test,), columns=made.read)
    cfg = config.base(
        objective=_objective(name),
        evals=evals,
        train=Train(steps=steps, batch_size=rows),
        data=Data(source=(train,), validation_source=(dev,), columns=(*made.read, made.truth), length=made.length, max_bad_records=1000),
        optimizer=Optimizer(learning_rate=made.rate, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=steps // 10),
        checkpoint=Checkpoint(every=max(1, round(epoch)), metric=f"{name}/{'f1' if name == 'cmrc2018' else 'accuracy'}", mode="max"),
        log=Log(every=20),
    )
    if words.scale:
        length = 1024 if name == "chid" else 256  # bytes, of which a Chinese character has three
        recipe.tiny(cfg, model=bert.BertConfig(max_length=length, dropout=0.0, attention_dropout=0.0), length=length)
        if "doc_stride" in cfg.objective:
            cfg.objective.update(doc_stride=64, max_question=64)
    return cfg
