"""What the studies train: the recipes of configs/ at three sizes, so that a study's stages are `experiments/recipes.py:NAME,SCALE`.

    ptm train --config=experiments/recipes.py:bert,nsp,tiny --workdir=runs/bert

Pretraining: bert bert_512 roberta albert electra t5 xlnet gpt; ltr ltr_512, BERT's shape as a decoder that learns left to right (Devlin et al. 2019, section 5.1);
masked, a BERT of ELECTRA's shape and settings (Clark et al. 2020, section 3.4); xlnet_masked, XLNet's network on masked tokens;
t5_decoder, a decoder in place of T5; a second word is another of the family's objectives, as in configs/quickstart.py. Fine-tuning: sst2 rte stsb ner, and at full size mnli qnli mrpc squad1 squad2;
with `text` the task is put into words. Scales:

    full    the published recipe as configs/ has it. Text: $PTM_CORPUS/*.txt, documents apart by empty lines; tasks: $PTM_GLUE, $PTM_SQUAD, $PTM_NER.
    small   6 layers of width 384, rows of 128, 64 a step, 20,000 steps, 8,192 pieces: minutes a run of one GPU. Text and tasks: $PTM_DATA.
    tiny    2 layers of width 128, rows of 64, 16 a step, 3,000 steps, 2,048 pieces: two minutes a run of one CPU core. Text and tasks: $PTM_DATA.
            (A masked model's validation perplexity was 333 after 1,000 of these steps and 259 after 3,000; at 2e-3 265.)

The text of small and tiny is that of configs/small.py:en, 8 MB; `documents` leaves out the single sentences of SST-2, for objectives that want neighbours. Ours at these
sizes, as there: no dropout in pretraining, a larger initial spread. Tasks: SST-2 with GLUE's dev set, the train and dev sets of RTE and the STS benchmark,
Wikigold, of which a tenth is held out.
"""

import os
from pathlib import Path
from typing import NamedTuple

from ptm import config, recipe
from ptm.config import ConfigDict
from ptm.models import bert, gpt
from ptm.objectives import causal, mlm

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PUBLISHED = {
    "bert": "bert.py:base", "bert_512": "bert.py:base_512", "ltr": "bert.py:base", "ltr_512": "bert.py:base_512", "roberta": "roberta.py:base",
    "albert": "albert.py:base", "electra": "electra.py:base", "masked": "electra.py:base", "t5": "t5.py:base", "t5_decoder": "t5.py:base", "xlnet": "xlnet.py:base",
    "xlnet_masked": "xlnet.py:base", "gpt": "scale.py:gpt_1b",
}  # fmt: skip
OBJECTIVES = ("mlm", "nsp", "sop", "sentences", "rtd", "corruption", "denoising", "prefix", "permutation")
TASKS = {
    "sst2": "glue.py:sst2", "rte": "glue.py:rte", "stsb": "glue.py:stsb", "mnli": "glue.py:mnli", "qnli": "glue.py:qnli", "mrpc": "glue.py:mrpc",
    "squad1": "squad.py:squad1", "squad2": "squad.py:squad2", "ner": "ner.py:conll2003",
}  # fmt: skip


SHAPE = ("num_layers", "width", "num_heads", "max_length", "dropout", "attention_dropout", "init_std")  # what families of decoders and encoders have in common


class Scale(NamedTuple):
    """Layers, width, heads, pieces, length and rows of a step, steps and rate in pretraining; texts of a step, steps and rate in fine-tuning."""

    layers: int
    width: int
    heads: int
    pieces: int
    length: int
    rows: int
    steps: int
    rate: float
    init_std: float
    texts: int
    tuning_steps: int
    tuning_rate: float


SCALES = {
    "small": Scale(6, 384, 6, 8192, 128, 64, 20_000, 5e-4, 0.04, 32, 3000, 1e-4),
    "tiny": Scale(2, 128, 4, 2048, 64, 16, 3000, 1e-3, 0.08, 32, 400, 1e-3),
}
# Where $PTM_DATA has tasks: sources of training and validation (none: a tenth is held out), and columns where its layout is not the official one.
ALPS, RTE, STSB = "$PTM_DATA/classify/sst2/alps_", "$PTM_DATA/classify/rte/", "$PTM_DATA/classify/stsb/sts-"
HERE = {
    "sst2": ((f"tsv:{ALPS}train.tsv", f"tsv:{ALPS}dev.tsv"), (f"tsv:{ALPS}test.tsv",), ()),
    "rte": (
        (f"tsv:{RTE}train.tsv", f"tsv:{RTE}val.tsv"), (f"tsv:{RTE}dev.tsv",),
        ("text=sentence1", "pair=sentence2", "label=label", "1:text=1", "1:pair=2", "1:label=3"),
    ),
    "stsb": ((f"tsv:{STSB}train.csv",), (f"tsv:{STSB}dev.csv",), ("text=5", "pair=6", "label=4")),
    "ner": (("conll:$PTM_DATA/tag/wikigold/wikigold.conll.txt",), (), ()),
}  # fmt: skip


def get_config(argument: str = ""):
    """The config of a pretraining (default bert) or a task, at `full` (default), `small` or `tiny`."""
    words = recipe.words(
        argument, recipes=(*PUBLISHED, *TASKS), objectives=(*OBJECTIVES, "text"), scales=("full", *SCALES), extras=("documents",)
    )  # fmt: skip
    name, objective = words.recipe, words.objective
    if words.scale in SCALES:
        scale = SCALES[words.scale]
        return _task(name, objective, scale) if name in TASKS else _pretraining(name, objective, scale, documents="documents" in argument.split(","))
    if name in TASKS:
        return _load(f"finetune/{TASKS[name]}", objective)
    cfg = _load(PUBLISHED[name], objective if name.startswith("t5") else "")
    cfg.data.update(source=(os.path.expandvars("text:$PTM_CORPUS/*.txt"),), document="paragraph")
    return SHAPED[name](cfg) if name in SHAPED else cfg


def _load(spec: str, *words: str) -> ConfigDict:
    return recipe.load(",".join([f"{CONFIGS}/{spec}", *filter(None, words)]))


def _left_to_right(cfg: ConfigDict) -> ConfigDict:
    """The run of an encoder as that of a decoder of its shape, with norms after the residuals as BERT has them."""
    model = gpt.Config(**{key: cfg.model[key] for key in SHAPE}, prenorm=False, activation="gelu", residual_std=cfg.model.init_std)
    config.set_section(cfg, "model", model)
    config.set_section(cfg, "objective", causal.Config())
    return cfg


def _masked(cfg: ConfigDict) -> ConfigDict:
    """ELECTRA's run as that of a BERT of the discriminator's shape, with embeddings as wide as its layers."""
    config.set_section(cfg, "objective", mlm.Config(rate=cfg.objective.rate))
    config.set_section(cfg, "model", bert.BertConfig(**{key: cfg.model[key] for key in SHAPE}))
    return cfg


def _masked_xlnet(cfg: ConfigDict) -> ConfigDict:
    """XLNet's run on masked tokens: its network, without memory."""
    config.set_section(cfg, "objective", mlm.Config())
    return cfg


def _decoder(cfg: ConfigDict) -> ConfigDict:
    """T5's run as that of a decoder of one side's shape, on input and target in one row."""
    kept = {key: cfg.model[key] for key in ("num_layers", "width", "num_heads", "dropout")}
    config.set_section(cfg, "model", gpt.Config(**kept, mlp_width=cfg.model.mlp_width, max_length=4 * cfg.objective.input_length, attention_dropout=cfg.model.dropout))
    return cfg


SHAPED = {"ltr": _left_to_right, "ltr_512": _left_to_right, "masked": _masked, "t5_decoder": _decoder, "xlnet_masked": _masked_xlnet}


def _pretraining(name: str, objective: str, scale: Scale, *, documents: bool) -> ConfigDict:
    family = name if name == "gpt" else PUBLISHED[name].partition(".")[0]
    cfg = _load(f"quickstart.py:{family}", objective)
    sizes = {
        "num_layers": scale.layers, "width": scale.width, "num_heads": scale.heads, "max_length": 4 * scale.length, "embed_width": scale.width // 2,
        "head_dim": scale.width // scale.heads, "mlp_width": 4 * scale.width, "init_std": scale.init_std,
    }  # fmt: skip
    for key, size in sizes.items():
        if key in cfg.model and cfg.model[key] is not None:  # what is None follows from the others
            cfg.model[key] = size
    if "input_length" in cfg.objective:
        cfg.data.length = cfg.data.length * scale.length // cfg.objective.input_length
        cfg.objective.input_length = scale.length
    else:
        cfg.data.length = scale.length
    texts = _load("small.py:en").data
    first = 1 if documents else 0
    columns = tuple(entry if ":" not in entry else f"{int(entry.partition(':')[0]) - first}:{entry.partition(':')[2]}" for entry in texts.columns)
    cfg.data.update(
        source=texts.source[first:], weights=texts.weights[first:], document=texts.document, holdout=0.02,
        columns=tuple(entry for entry in columns if not entry.startswith("-")),
    )  # fmt: skip
    cfg.tokenizer.update(vocab_size=scale.pieces, lowercase=True)
    cfg.optimizer.learning_rate = scale.rate
    cfg.train.update(steps=scale.steps, batch_size=scale.rows)
    cfg.schedule.warmup_steps = scale.steps // 10
    cfg.checkpoint.every = cfg.evals["validation"].every = scale.steps // 4
    return SHAPED[name](cfg) if name in SHAPED else cfg


def _task(name: str, objective: str, scale: Scale) -> ConfigDict:
    if name not in HERE:
        raise config.ConfigError(f"{name} has no data at this size; tasks of small and tiny: {', '.join(HERE)}.")
    cfg = _load(f"finetune/{TASKS[name]}", objective)
    source, validation, columns = HERE[name]
    cfg.data.update(
        source=tuple(map(os.path.expandvars, source)), validation_source=tuple(map(os.path.expandvars, validation)), holdout=0.1,
        columns=columns or cfg.data.columns,
    )  # fmt: skip
    if "input_length" in cfg.objective:
        cfg.objective.input_length = scale.length
    else:
        cfg.train.batch_size = max(1, cfg.train.batch_size * cfg.data.length // scale.length)
        cfg.data.length = scale.length
    cfg.train.steps = scale.tuning_steps
    cfg.optimizer.learning_rate = scale.tuning_rate
    cfg.schedule.update(name="linear", warmup_steps=scale.tuning_steps // 10)
    cfg.checkpoint.every = scale.tuning_steps // 2
    for options in cfg.evals.values():
        options.every = scale.tuning_steps // 2
    cfg.compute.scan_layers = False
    return cfg
