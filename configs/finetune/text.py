"""Your own texts and labels: classification, or regression on a number, of a text or a pair of texts. The everyday case.

    ptm train --config=configs/finetune/text.py --config.init=hf:DIR --config.data.source=tsv:train.tsv --workdir=runs/reviews
    ptm train --config=configs/finetune/text.py --config.init=hf:DIR --config.data.source=csv:train.csv --config.data.validation_source=csv:dev.csv \\
        --config.data.columns=text=premise,pair=hypothesis,label=gold --workdir=runs/pairs
    ptm train --config=configs/finetune/text.py:regress --config.init=hf:DIR --config.data.source=jsonl:scores.jsonl --workdir=runs/scores
    ptm train --config=configs/finetune/text.py --config.init=hf:DIR --config.data.source=tsv:$PTM_DATA/classify/chnsenticorp/chnsenticorp.zip/train.tsv \\
        --config.data.validation_source=tsv:$PTM_DATA/classify/chnsenticorp/chnsenticorp.zip/dev.tsv --config.data.columns=text=text_a,label=label ...

tsv, csv, jsonl, json and parquet, also compressed, with columns `text` and `label` unless data.columns says otherwise; columns given as numbers from 0 for
tables without a header. Labels are those found in the training data. Without validation_source a tenth of the records is held out. Seldom labels:
--config.objective.class_weights=balanced. Frozen encoder under a new head: --config.optimizer.freeze='(?!classify_head|pooler).*'
--config.optimizer.learning_rate=1e-3; low-rank: --config.lora.rank=8. Several seeds: --seeds=5.

Words: classify (default), regress; tiny, a smoke run on invented reviews. BERT's settings (Devlin et al. 2019, A.3): rate 3e-5, warm-up over 10 %, rows of
128 tokens, into which texts are packed; 1,000 steps of 8 rows are ours: set --config.train.steps to 3 epochs or so of your data and
--config.schedule.warmup_steps to a tenth of them, and --config.data.length to what most texts fit into.
"""

from pathlib import Path

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import loss, task
from ptm.models import bert
from ptm.objectives import classify, regress

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/own"
LENGTH = 128


def get_config(argument: str = ""):
    """The config of classification (`classify`, default) or of regression (`regress`); `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=("classify", "regress"))
    table = f"tsv:{MINIATURES}/{'reviews' if chosen == 'classify' else 'scores'}.tsv"
    cfg = config.base(
        objective=classify.Config() if chosen == "classify" else regress.Config(),
        evals={"validation": loss.Config(every=100), "dev": task.Config(every=100, metrics=("accuracy", "f1_macro") if chosen == "classify" else ())},
        train=Train(steps=1000, batch_size=8),
        data=Data(
            source=(table if scale else "tsv:train.tsv",), validation_source=(table,) if scale else (), holdout=0.1,
            columns=("text=text", "label=label"), length=LENGTH,
        ),
        optimizer=Optimizer(learning_rate=3e-5, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=100),
        checkpoint=Checkpoint(every=100, metric="dev/accuracy" if chosen == "classify" else "dev/pearson", mode="max"),
        log=Log(every=10),
    )  # fmt: skip
    return recipe.tiny(cfg, model=bert.BertConfig(max_length=LENGTH, dropout=0.0, attention_dropout=0.0), length=LENGTH) if scale else cfg
