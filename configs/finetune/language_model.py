"""Language modelling goes on, on your own text: a decoder such as GPT-2 learns the style of stories, poems or a field.

    ptm train --config=configs/finetune/language_model.py --config.init=hf:DIR --config.data.source='text:stories/*.txt' --config.data.document=file \\
        --workdir=runs/stories

A document is a line of the text, or with data.document a paragraph or a file; 5 % of the documents are held out, with --config.data.holdout_by=tail the
last characters of each. An encoder goes on with its own objective in the same way: --config=configs/finetune/language_model.py:mlm. The head lm (mlm)
of the checkpoint is kept. With little text: --config.lora.rank=8, or fewer steps. `tiny` is a smoke run on text that every Python carries.

Rate 5e-5, linear, warm-up over 5 %, 16 rows of 256 tokens, dropout as the model has it; these are ours, as are 1,000 steps.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import loss
from ptm.models import bert, gpt
from ptm.objectives import causal, mlm


def get_config(argument: str = ""):
    """The config of a decoder (`causal`, default) or an encoder (`mlm`); `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=("causal", "mlm"))
    cfg = config.base(
        objective=causal.Config() if chosen == "causal" else mlm.Config(),
        evals={"validation": loss.Config(every=100)},
        train=Train(steps=1000, batch_size=16),
        data=Data(source=("python_docs:",) if scale else ("text:train.txt",), length=256),
        optimizer=Optimizer(learning_rate=5e-5, weight_decay=0.01),
        schedule=Schedule(name="linear", warmup_steps=50),
        checkpoint=Checkpoint(every=100),
        log=Log(every=10),
    )
    plain = {"max_length": 32, "dropout": 0.0, "attention_dropout": 0.0}
    return recipe.tiny(cfg, model=gpt.Config(**plain) if chosen == "causal" else bert.BertConfig(**plain)) if scale else cfg
