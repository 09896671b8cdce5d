"""A small BERT, or T5, on the English or Chinese text of $PTM_DATA, for half an hour on one CPU core: what benchmarks/small_tasks.py fine-tunes.

    PTM_DATA=DIR ptm train --config=configs/small.py:en --workdir=runs/small-en
    PTM_DATA=DIR python benchmarks/characters.py runs/small-en/tokenizer/vocab.txt > characters.txt
    PTM_DATA=DIR ptm train --config=configs/small.py:zh --config.init=ckpt:runs/small-en --config.tokenizer.path=runs/small-en/tokenizer \\
        --config.tokenizer.extra=characters.txt --workdir=runs/small-zh
    PTM_DATA=DIR ptm train --config=configs/small.py:en,denoising --workdir=runs/small-t5

en reads the training sentences of SST-2 without their labels, WikiText-2 (the parts that are there), War and Peace, and the training e-mails of AESLC; zh
the contexts of CMRC 2018, the training reviews of ChnSentiCorp without their labels, and the THUCNews titles. The shares of documents give each source a
similar number of tokens, the sentences of SST-2 more. `tiny` is a smoke run on text that every Python carries.

BERT (Devlin et al. 2019) at 4 layers of width 192, with masked language modelling alone. Ours, for a budget of minutes: no dropout, a larger initial
spread, a fifth of the tokens masked, rate 1e-3, 8 rows of 128 tokens a step, a vocabulary of 8,192 word pieces from the same text. The English loss stays
at the frequencies of words for the first 2,500 steps. The Chinese one, from fresh parameters, was still there after 7,000 steps (5.79); from the English
model, whose layers know how to look at neighbours, it falls at once (5.20 after 1,000), and so zh goes on from it with its characters added.

denoising: a T5 of 3 + 3 layers of that width learns to write a text of which it sees a part (Raffel et al. 2020, section 3.3.1, BERT-style), and with it
to copy, which summaries want: after 1,000 steps the loss falls from the frequencies of words, 4.3, to 0.7 after 4,000 and below 0.6 after 8,000. Subject lines:

    PTM_DATA=DIR ptm train --config=configs/finetune/summarization.py --config.init=ckpt:runs/small-t5 --workdir=runs/small-aeslc \
        --config.objective.prefix= --config.objective.input_length=128 --config.data.length=32 --config.objective.label_smoothing=0.1 \
        --config.objective.beams=4 --config.model.dropout=0.1 --config.train.batch_size=16 --config.train.steps=1200 --config.evals.test.every=1200 \
        --config.optimizer.learning_rate=0.005 --config.schedule.name=linear --config.compute.scan_layers=false
"""

import os

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import bert, t5
from ptm.objectives import denoising, mlm

# Sources with the share of their documents and the column of their text (none: lines of plain text), pieces of a vocabulary, and steps of BERT.
TEXTS = {
    "en": (
        {
            "tsv:$PTM_DATA/classify/sst2/alps_train.tsv": (0.8, "sentence"),
            "text:$PTM_DATA/lm/warandpeace/warandpeace.txt": (0.08, ""),
            "text:$PTM_DATA/lm/wikitext2/wiki.*.tokens": (0.08, ""),
            "jsonl:$PTM_DATA/seq2seq/aeslc/train_3000.jsonl": (0.04, "body"),
        },
        8192,
        11_000,
    ),
    "zh": (
        {
            "squad:$PTM_DATA/qa/cmrc2018/cmrc2018_*.json": (0.1, "context"),
            "tsv:$PTM_DATA/classify/chnsenticorp/chnsenticorp.zip/train.tsv": (0.5, "text_a"),
            "tsv:$PTM_DATA/classify/thucnews/dev.txt": (0.4, "0"),
        },
        6000,
        6000,
    ),
}


def get_config(argument: str = ""):
    """The config of `en` (default) or `zh`, with `mlm` (default) or `denoising`; `tiny` makes it a smoke run."""
    chosen, objective, scale = recipe.words(argument, recipes=tuple(TEXTS), objectives=("mlm", "denoising"))
    sources, pieces, steps = TEXTS[chosen]
    data = Data(
        source=tuple(os.path.expandvars(source) for source in sources),
        weights=tuple(share for share, _ in sources.values()),
        columns=("text=text", *(f"{index}:text={column}" for index, (_, column) in enumerate(sources.values()) if column)),
        document="paragraph", length=128, holdout=0.01,
    )  # fmt: skip
    if objective == "denoising":
        learner = {
            "model": t5.Config(num_layers=3, width=192, num_heads=3, mlp_width=768, dropout=0.0),
            "objective": denoising.Config(variant="bert_style", input_length=128),
            "tokenizer": Tokenizer(kind="sentencepiece", algorithm="bpe", vocab_size=pieces, lowercase=True, sentinels=1),
            "optimizer": Optimizer(name="adafactor", learning_rate=0.015, weight_decay=0.0, b2=0.98),
        }
    else:
        learner = {
            "model": bert.BertConfig(num_layers=4, width=192, num_heads=3, max_length=512, dropout=0.0, attention_dropout=0.0, init_std=0.05),
            "objective": mlm.Config(rate=0.2),
            "tokenizer": Tokenizer(kind="wordpiece", vocab_size=pieces, lowercase=True),
            "optimizer": Optimizer(learning_rate=1e-3, weight_decay=0.01, b2=0.98, eps=1e-6),
        }
    cfg = config.base(
        **learner,
        evals={"validation": loss.Config(every=1000, batches=40)},
        train=Train(steps=8000 if objective == "denoising" else steps, batch_size=8),
        data=Data() if scale else data,
        schedule=Schedule(name="linear", warmup_steps=500),
        compute=Compute(scan_layers=False),
        checkpoint=Checkpoint(every=1000),
        log=Log(every=100),
    )
    return recipe.tiny(cfg) if scale else cfg
