"""GLUE (Wang et al. 2019): CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, and the diagnostics AX, which MNLI's model answers.

    PTM_GLUE=DIR ptm train --config=configs/finetune/glue.py:sst2 --config.init=hf:DIR --workdir=runs/glue/sst2
    PTM_GLUE=DIR ptm train --config=configs/finetune/glue.py:mnli,roberta,test --config.init=hub:FacebookAI/roberta-base --workdir=runs/glue/mnli
    PTM_GLUE=DIR ptm train --config=configs/finetune/glue.py:all,text --config.init=hf:DIR --workdir=runs/glue/text
    ptm submission --benchmark=glue --runs='runs/glue/*' --output=submission

PTM_GLUE names the folder with the official folders CoLA, SST-2, ..., WNLI, and AX/diagnostic.tsv. Words, in any order:

    cola sst2 mrpc stsb qqp mnli qnli rte wnli   the task; `all` is the mixture of them, as text
    bert roberta electra electra_small           published settings, below; bert if none is given
    text                                         the task as text to text, for encoder-decoders and decoders (Raffel et al. 2020)
    test                                         answer the test set too at the end, for a submission
    tiny                                         a smoke run on invented sentences: no checkpoint, no folder

bert: 32 texts a step, 3 epochs, rate 3e-5 of the paper's 2e-5 ... 5e-5, warm-up over 10 % (Devlin et al. 2019, A.3). roberta: 10 epochs, 2e-5, 6 % (Liu
et al. 2019, table 10). electra: 1e-4 (small: 3e-4) with 0.8 from each layer to the one below, 3 epochs, of RTE and STS-B 10 (Clark et al. 2020, table 7).
Texts are packed, so that a step has about 32 of them in fewer rows; exactly 32: --config.data.packing=none --config.train.batch_size=32.
text: the prefixes and label words of Raffel et al. 2020 (appendix D), 2**18 steps of 128 rows, Adafactor at a constant 1e-3 (section 3.1.3); `all`
draws in proportion to the number of examples, that of large tasks taken as 2**16 (section 3.5.2). WNLI, which the paper leaves out, has words of its own.

Three of the sets lie in $PTM_DATA in other layouts. In place of the official files:

    sst2 --config.data.source=tsv:$PTM_DATA/classify/sst2/alps_train.tsv,tsv:$PTM_DATA/classify/sst2/alps_dev.tsv
         --config.data.validation_source=tsv:$PTM_DATA/classify/sst2/alps_test.tsv
    stsb --config.data.source=tsv:$PTM_DATA/classify/stsb/sts-train.csv --config.data.validation_source=tsv:$PTM_DATA/classify/stsb/sts-dev.csv
         --config.data.columns=text=5,pair=6,label=4
    rte  --config.data.source=tsv:$PTM_DATA/classify/rte/train.tsv,tsv:$PTM_DATA/classify/rte/val.tsv
         --config.data.validation_source=tsv:$PTM_DATA/classify/rte/dev.tsv
         --config.data.columns=text=sentence1,pair=sentence2,label=label,1:text=1,1:pair=2,1:label=3

Published, dev: BERT-base MNLI-m 84.4, QNLI 88.4, MRPC 86.7, SST-2 92.7 (table 5); ELECTRA-small 79.9 on average; T5's baseline 83.28.
None was run at these sizes here.
"""

import os
from pathlib import Path
from typing import NamedTuple

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import task
from ptm.fields import ConfigError
from ptm.models import bert, t5
from ptm.objectives import classify, regress, seq2seq

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/glue"
LENGTH = 128
TEXTS = 32  # of a step
LIMIT = 2**16
NLI = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")


class Task(NamedTuple):
    """A task: its folder, columns of the texts, column of the label, labels (none: a number), metrics, the best first, training texts and their mean tokens."""

    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    examples: int
    tokens: int
    written: str  # T5's input
    words: tuple[str, ...] = ()  # T5's labels, in the order of `labels`; those themselves if none are given


PAIR = "sentence1: {sentence1} sentence2: {sentence2}"
TASKS = {
    "cola": Task("CoLA", ("3",), "1", ("0", "1"), ("matthews", "accuracy"), 8551, 11, "cola sentence: {3}", ("unacceptable", "acceptable")),
    "sst2": Task("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",), 67349, 13, "sst2 sentence: {sentence}", ("negative", "positive")),
    "mrpc": Task(
        "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("f1_binary", "accuracy"), 3668, 53,
        "mrpc sentence1: {#1 String} sentence2: {#2 String}", ("not_equivalent", "equivalent"),
    ),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman"), 5749, 28, f"stsb {PAIR}"),
    "qqp": Task(
        "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("f1_binary", "accuracy"), 363_846, 30,
        "qqp question1: {question1} question2: {question2}", ("not_duplicate", "duplicate"),
    ),
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label", NLI, ("accuracy",), 392_702, 39, "mnli hypothesis: {sentence2} premise: {sentence1}"),
    "qnli": Task("QNLI", ("question", "sentence"), "label", TWO_WAY, ("accuracy",), 104_743, 50, "qnli question: {question} sentence: {sentence}"),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", TWO_WAY, ("accuracy",), 2490, 72, f"rte {PAIR}"),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), "label", ("0", "1"), ("accuracy",), 635, 37, f"wnli {PAIR}", ("not_entailment", "entailment")),
}  # fmt: skip
# Epochs, rate, rate of each layer relative to the one above, weight decay, share of warm-up.
SETTINGS = {
    "bert": (3, 3e-5, 1.0, 0.01, 0.1),
    "roberta": (10, 2e-5, 1.0, 0.1, 0.06),
    "electra": (3, 1e-4, 0.8, 0.0, 0.1),
    "electra_small": (3, 3e-4, 0.8, 0.0, 0.1),
}
LONGER = {"rte": 10, "stsb": 10}  # epochs of ELECTRA
ALL = "all"
TEXT = "text"


def _columns(name: str, *, written: bool, tested: bool = False) -> tuple[str, ...]:
    """data.columns of a task's training and dev files, or of its test file, which has no label."""
    made = TASKS[name]
    texts, text = made.texts, made.written
    if tested and name == "cola":
        texts, text = ("sentence",), "cola sentence: {sentence}"  # the one that has a header there
    entries = [f"text={text}"] if written else [f"{field}={column}" for field, column in zip(("text", "pair"), texts)]
    if tested:
        return tuple(entries)
    if not written:
        return (*entries, f"label={made.label}")
    if not made.labels:
        return (*entries, f"target={{{made.label}~0.2}}")  # to the nearest multiple (section 2.4)
    return (*entries, f"target={{{'|'.join([made.label, *(f'{label}={word}' for label, word in zip(made.labels, made.words or made.labels))])}}}")


def _objective(name: str, *, written: bool):
    if written:
        return seq2seq.Config(input_length=512, metrics=("accuracy",))
    made = TASKS[name]
    return classify.Config(labels=made.labels, metrics=made.metrics) if made.labels else regress.Config(metrics=made.metrics)


def _evals(name: str, *, written: bool, tested: bool, alone: bool, every: int, steps: int, root: str) -> dict[str, task.Config]:
    """The evals of a task: `name` on its dev set, which is the run's validation split where it is alone, NAME_test on its test set."""
    made = TASKS[name]
    if name == "mnli":
        dev = {"mnli": "MNLI/dev_matched", "mnli_mismatched": "MNLI/dev_mismatched"}
        tests = {"mnli_test": "MNLI/test_matched", "mnli_mismatched_test": "MNLI/test_mismatched", "ax_test": "AX/diagnostic"}
    else:
        dev, tests = {name: f"{made.folder}/dev"}, {f"{name}_test": f"{made.folder}/test"}
    metrics = tuple(f"f1_binary:{made.words[1]}" if metric == "f1_binary" else metric for metric in made.metrics) if written else ()
    columns = {tested: _columns(name, written=written, tested=tested) for tested in (False, True)}
    evals = {}
    for other, file in dev.items():
        where = {} if alone and other == name else {"source": (_source(file, root),), "columns": columns[False]}
        evals[other] = task.Config(every=every, metrics=metrics, **where)
    for other, file in tests.items() if tested else ():
        evals[other] = task.Config(every=steps, metrics=metrics, source=(_source(file, root),), columns=columns[True])
    return evals


def _source(file: str, root: str) -> str:
    return os.path.expandvars(f"tsv:{root}/{file}.tsv")  # an unset variable stays, and so stands in the message that the file is missing


def _dev(name: str) -> str:
    return f"{TASKS[name].folder}/dev{'_matched' if name == 'mnli' else ''}"


def get_config(argument: str = ""):
    """The config of a task (default sst2) with published settings (default bert), or as text; see above for the words."""
    words = recipe.words(argument, recipes=("sst2", *(name for name in TASKS if name != "sst2"), ALL), objectives=(*SETTINGS, TEXT), extras=("test",))
    chosen, tested = words.recipe, "test" in argument.split(",")
    if chosen == ALL and words.objective not in ("", TEXT):
        raise ConfigError(f"all has no recipe for {words.objective}; its settings: {TEXT}. Tasks with heads of their own cannot share one run.")
    written = chosen == ALL or words.objective == TEXT
    root = str(MINIATURES) if words.scale else "$PTM_GLUE"
    names = tuple(TASKS) if chosen == ALL else (chosen,)
    if written:
        steps, rows, length, every = 2**18, 128, 16, 5000
        optimizer, schedule = Optimizer(name="adafactor", learning_rate=1e-3, weight_decay=0.0, clip_norm=None), Schedule(name="constant")
    else:
        made = TASKS[chosen]
        epochs, rate, layerwise_decay, weight_decay, warmup = SETTINGS[words.objective or "bert"]
        epochs = LONGER[chosen] if words.objective.startswith("electra") and chosen in LONGER else epochs
        rows, length = max(1, round(TEXTS * made.tokens / LENGTH)), LENGTH
        epoch = made.examples * made.tokens / (rows * LENGTH)
        steps, every = round(epochs * epoch), max(1, round(epoch))
        optimizer = Optimizer(learning_rate=rate, weight_decay=weight_decay, eps=1e-6, layerwise_decay=layerwise_decay)
        schedule = Schedule(name="linear", warmup_steps=round(warmup * steps))
    evals: dict[str, task.Config] = {}
    columns: list[str] = []
    for number, name in enumerate(names):
        evals |= _evals(name, written=written, tested=tested, alone=len(names) == 1, every=every, steps=steps, root=root)
        columns += [entry if len(names) == 1 else f"{number}:{entry}" for entry in _columns(name, written=written)]
    best = evals[names[0]].metrics or TASKS[names[0]].metrics
    cfg = config.base(
        objective=_objective(chosen, written=written),
        evals=evals,
        train=Train(steps=steps, batch_size=rows),
        data=Data(
            source=tuple(_source(f"{TASKS[name].folder}/train", root) for name in names),
            validation_source=tuple(_source(_dev(name), root) for name in names),
            weights=tuple(float(min(TASKS[name].examples, LIMIT)) for name in names) if len(names) > 1 else (),
            columns=tuple(columns), length=length,
        ),
        optimizer=optimizer, schedule=schedule,
        checkpoint=Checkpoint(
            every=every, metric=f"{names[0]}/{best[0].partition(':')[0].replace('f1_binary', 'f1')}", mode="max",
            **({"keep_best": 0} if len(names) > 1 else {}),  # no one metric says which is the best for all
        ),
        log=Log(every=100 if written else 20),
    )  # fmt: skip
    if words.scale:
        recipe.tiny(cfg, model=t5.Config(dropout=0.0) if written else bert.BertConfig(max_length=LENGTH, dropout=0.0, attention_dropout=0.0), length=LENGTH)
        cfg.data.length = length  # of answers in words less than of inputs
    return cfg
