"""SuperGLUE (Wang et al. 2019): BoolQ, CB, COPA, MultiRC, ReCoRD, RTE, WiC, WSC, and the diagnostics AX-b and AX-g, which RTE's model answers.

    PTM_SUPERGLUE=DIR ptm train --config=configs/finetune/superglue.py:boolq --config.init=hf:DIR --workdir=runs/superglue/boolq
    PTM_SUPERGLUE=DIR ptm train --config=configs/finetune/superglue.py:all,text --config.init=hf:DIR --workdir=runs/superglue/text
    ptm submission --benchmark=superglue --runs='runs/superglue/*' --output=submission

PTM_SUPERGLUE names the folder with the official folders BoolQ, CB, ..., WSC, AX-b, AX-g. Words, in any order:

    boolq cb copa multirc record rte wic wsc   the task; `all` is the mixture of them, as text
    bert roberta                               settings, below; bert if none is given
    text                                       the task as text to text, for encoder-decoders and decoders (Raffel et al. 2020)
    test                                       answer the test sets too at the end, for a submission; of RTE the diagnostics as well
    tiny                                       a smoke run on invented texts: no checkpoint, no folder

How an encoder reads them: CB, RTE, BoolQ and MultiRC (passage; question and answer) as pairs. WiC as a pair, the word before the first sentence.
WSC as a pair of the text, its *pronoun* between asterisks, and the noun. COPA as two choices with its question in words. ReCoRD by extraction of the
entity, whose exact match and F1 are SQuAD's. MultiRC's F1 over answers (f1a) and exact match over questions are those of Khashabi et al. 2018.

bert: rate 1e-5, 10 epochs at most (Wang et al. 2019, section 5.1), here 32 texts a step, 3 epochs for sets above 20,000. roberta: 2e-5, decay 0.1,
warm-up over 6 % (Liu et al. 2019, table 10). text: the prefixes of Raffel et al. 2020 (appendix D), 2**18 steps of 128 rows, Adafactor at a constant
1e-3; WSC's is not the paper's: the noun is given and the answer is True or False, so that no example is left out. ReCoRD's first right entity is learned.
`all` draws in proportion to the number of examples, that of large tasks taken as 2**16.

Published: BERT-large 69.0 on average (test; table 3 of Wang et al. 2019), T5's baseline 71.36 (dev). Not run at these sizes here.
"""

import os
from pathlib import Path
from typing import NamedTuple

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import task
from ptm.fields import ConfigError
from ptm.models import bert, t5
from ptm.objectives import choose, classify, seq2seq, span_qa

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/superglue"
TEXTS = 32  # of a step
LIMIT = 2**16
LARGE = 20_000
TWO_WAY = ("entailment", "not_entailment")
BOTH = ("false", "true")


class Task(NamedTuple):
    """A task: format and folder, columns of what is read and of the truth, metrics, the best first, training texts, their mean tokens, length of a row."""

    format: str
    folder: str
    read: tuple[str, ...]
    truth: tuple[str, ...]
    metrics: tuple[str, ...]
    examples: int
    tokens: int
    length: int
    written: str  # T5's input, and what it is to write
    target: str
    labels: tuple[str, ...] = ()
    best: str = "accuracy"
    together: str | None = None


NLI = ("text=premise", "pair=hypothesis")
TRUE = "{label|false=False|true=True}"
CAUSE = "{question|cause=What was the cause of this?|effect=What happened as a result?}"
TASKS = {
    "boolq": Task(
        "jsonl", "BoolQ", ("text=passage", "pair=question"), ("label={label}",), ("accuracy",), 9427, 140, 256,
        "boolq passage: {passage} question: {question}", TRUE, BOTH,
    ),
    "cb": Task(
        "jsonl", "CB", NLI, ("label=label",), ("f1_macro", "accuracy"), 250, 80, 256,
        "cb hypothesis: {hypothesis} premise: {premise}", "{label}", ("entailment", "contradiction", "neutral"), "f1_macro",
    ),
    "copa": Task(
        "jsonl", "COPA", ("text=premise", f"pair={CAUSE}", "choices.0=choice1", "choices.1=choice2"), ("label=label",), ("accuracy",), 400, 50, 128,
        "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}", "{label|0=choice1|1=choice2}",
    ),
    "multirc": Task(
        "multirc", "MultiRC", ("text=text", "pair={question} {answer}", "group=group"), ("label={label}",), ("multirc", "accuracy"), 27_243, 320, 512,
        "multirc question: {question} answer: {answer} paragraph: {text}", "{label|0=False|1=True}", ("0", "1"), "f1a", "group",
    ),
    "record": Task(
        "record", "ReCoRD", ("text=text", "context=context"), ("answers=answers",), ("squad",), 100_730, 310, 512,
        "record query: {text} entities: {listed} passage: {context}", "names", (), "f1",
    ),
    "rte": Task("jsonl", "RTE", NLI, ("label=label",), ("accuracy",), 2490, 72, 256, "rte hypothesis: {hypothesis} premise: {premise}", "{label}", TWO_WAY),
    "wic": Task(
        "jsonl", "WiC", ("text={word}: {sentence1}", "pair=sentence2"), ("label={label}",), ("accuracy",), 5428, 27, 128,
        "wic pos: sentence1: {sentence1} sentence2: {sentence2} word: {word}", TRUE, BOTH,
    ),
    "wsc": Task(
        "wsc", "WSC", ("text=text", "pair=noun"), ("label={label}",), ("accuracy",), 554, 30, 128, "wsc: {text} noun: {noun}", TRUE, BOTH,
    ),
}  # fmt: skip
# Name, folder, columns of the texts, metric, and what belongs together. Their files tell the truth.
DIAGNOSTICS = (
    ("axb", "AX-b", ("sentence1", "sentence2"), "matthews", ()),
    ("axg", "AX-g", ("premise", "hypothesis"), "parity", ("group={pair_id}",)),
)
# Rate, weight decay, share of warm-up.
SETTINGS = {"bert": (1e-5, 0.01, 0.1), "roberta": (2e-5, 0.1, 0.06)}
ALL = "all"
TEXT = "text"


def _columns(name: str, *, written: bool, tested: bool = False) -> tuple[str, ...]:
    """data.columns of a task's training and dev files, or of its test file, which does not tell the truth."""
    made = TASKS[name]
    if not written:
        return made.read if tested else (*made.read, *made.truth)
    grouped = tuple(entry for entry in made.read if entry.startswith("group="))
    return (f"text={made.written}", *grouped, *(() if tested else (f"target={made.target}",)))


def _objective(name: str, *, written: bool):
    if written:
        return seq2seq.Config(input_length=512, metrics=("accuracy",))
    if name == "copa":
        return choose.Config(max_choices=2)
    if name == "record":
        return span_qa.Config()
    return classify.Config(labels=TASKS[name].labels)


def _source(name: str, file: str, root: str) -> str:
    return os.path.expandvars(f"{TASKS[name].format}:{root}/{TASKS[name].folder}/{file}.jsonl")  # an unset variable stays, and stands in the message


def _evals(name: str, *, written: bool, tested: bool, alone: bool, every: int, steps: int, root: str) -> dict[str, task.Config]:
    """The evals of a task: `name` on its dev set, NAME_test on its test set; where it is not alone, its dev set is named, too."""
    made = TASKS[name]
    metrics = tuple("multirc:True" if metric == "multirc" and written else metric for metric in made.metrics)
    shared = {"metrics": metrics, "together": made.together}
    where = {} if alone else {"source": (_source(name, "val", root),), "columns": _columns(name, written=written)}
    evals = {name: task.Config(every=every, **shared, **where)}
    if tested:
        columns = _columns(name, written=written, tested=True)
        evals[f"{name}_test"] = task.Config(every=steps, source=(_source(name, "test", root),), columns=columns, **shared)
    if tested and name == "rte":
        for other, folder, texts, metric, group in DIAGNOSTICS:
            columns = (
                (f"text=rte hypothesis: {{{texts[1]}}} premise: {{{texts[0]}}}", "target={label}")
                if written
                else (f"text={texts[0]}", f"pair={texts[1]}", "label=label")
            )
            evals[f"{other}_test"] = task.Config(
                every=steps, source=(os.path.expandvars(f"jsonl:{root}/{folder}/{folder}.jsonl"),), columns=(*columns, *group),
                metrics=(metric, "accuracy"), together="group" if group else None,
            )  # fmt: skip
    return evals


def get_config(argument: str = ""):
    """The config of a task (default boolq) with published settings (default bert), or as text; see above for the words."""
    words = recipe.words(argument, recipes=(*TASKS, ALL), objectives=(*SETTINGS, TEXT), extras=("test",))
    chosen, tested = words.recipe, "test" in argument.split(",")
    if chosen == ALL and words.objective not in ("", TEXT):
        raise ConfigError(f"all has no recipe for {words.objective}; its settings: {TEXT}. Tasks with heads of their own cannot share one run.")
    written = chosen == ALL or words.objective == TEXT
    root = str(MINIATURES) if words.scale else "$PTM_SUPERGLUE"
    names = tuple(TASKS) if chosen == ALL else (chosen,)
    if written:
        steps, rows, length, every = 2**18, 128, 32, 5000
        optimizer, schedule = Optimizer(name="adafactor", learning_rate=1e-3, weight_decay=0.0, clip_norm=None), Schedule(name="constant")
    else:
        made = TASKS[chosen]
        rate, weight_decay, warmup = SETTINGS[words.objective or "bert"]
        rows, length = max(1, round(TEXTS * made.tokens / made.length)), made.length
        epoch = made.examples * made.tokens / (rows * length)
        steps, every = round((3 if made.examples > LARGE else 10) * epoch), max(1, round(epoch))
        optimizer = Optimizer(learning_rate=rate, weight_decay=weight_decay, eps=1e-6)
        schedule = Schedule(name="linear", warmup_steps=round(warmup * steps))
    evals: dict[str, task.Config] = {}
    columns: list[str] = []
    for number, name in enumerate(names):
        evals |= _evals(name, written=written, tested=tested, alone=len(names) == 1, every=every, steps=steps, root=root)
        columns += [entry if len(names) == 1 else f"{number}:{entry}" for entry in _columns(name, written=written)]
    cfg = config.base(
        objective=_objective(chosen, written=written),
        evals=evals,
        train=Train(steps=steps, batch_size=rows),
        data=Data(
            source=tuple(_source(name, "train", root) for name in names), validation_source=tuple(_source(name, "val", root) for name in names),
            weights=tuple(float(min(TASKS[name].examples, LIMIT)) for name in names) if len(names) > 1 else (),
            columns=tuple(columns), length=length,
        ),
        optimizer=optimizer, schedule=schedule,
        checkpoint=Checkpoint(
            every=every, metric=f"{names[0]}/{TASKS[names[0]].best}", mode="max",
            **({"keep_best": 0} if len(names) > 1 else {}),  # no one metric says which is the best for all
        ),
        log=Log(every=100 if written else 20),
    )  # fmt: skip
    if words.scale:
        longest = 256
        recipe.tiny(cfg, model=t5.Config(dropout=0.0) if written else bert.BertConfig(max_length=longest, dropout=0.0, attention_dropout=0.0), length=longest)
        cfg.data.length = length if written else longest  # of answers in words less than of inputs
        if "doc_stride" in cfg.objective:
            cfg.objective.update(doc_stride=64, max_question=64)
    return cfg
