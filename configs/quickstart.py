"""Quickstart: GPT, BERT or T5 pretrained on English text that every Python carries, in about 3 minutes on 2 CPU cores.

    ptm train --config=configs/quickstart.py --workdir=runs/quickstart            # GPT
    ptm train --config=configs/quickstart.py:bert --workdir=runs/quickstart-bert
    ptm train --config=configs/quickstart.py:t5 --workdir=runs/quickstart-t5

Data: the language reference topics of `pydoc_data.topics` and the docstrings of the standard library, 5 % of the documents held out by
a hash. ':tiny' is a smoke run of seconds: configs/quickstart.py:bert,tiny.
"""

from ptm import config
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import bert, gpt, t5
from ptm.objectives import causal, mlm, span_corruption


def get_config(argument: str = ""):
    """The config of `gpt` (default), `bert` or `t5`, with `tiny` for a smoke run."""
    recipe, scale = config.words(argument, recipes=("gpt", "bert", "t5"))
    tiny = scale == "tiny"
    layers, width, heads = (2, 32, 2) if tiny else (4, 192, 6)
    length = 32 if tiny else 128
    if recipe == "gpt":
        model = gpt.Config(num_layers=layers, width=width, num_heads=heads, max_length=length, dropout=0.0, attention_dropout=0.0)
        objective = causal.Config()
    elif recipe == "bert":
        model = bert.BertConfig(num_layers=layers, width=width, num_heads=heads, max_length=length, dropout=0.0, attention_dropout=0.0)
        objective = mlm.Config(unit="whole_word")
    else:
        model = t5.Config(
            num_layers=layers // 2, width=width, num_heads=heads, head_dim=width // heads, mlp_width=4 * width, activation="gelu_tanh", gated=True, dropout=0.0
        )
        objective = span_corruption.Config(input_length=length)
    steps = 20 if tiny else {"gpt": 480, "bert": 640, "t5": 600}[recipe]
    return config.base(
        model=model,
        objective=objective,
        evals={"validation": loss.Config(every=10 if tiny else steps // 4)},
        train=Train(steps=steps, batch_size=8 if tiny else 16),
        data=Data(source=("python_docs:",), length=(length // 2 if tiny else 48) if recipe == "t5" else length),
        tokenizer=Tokenizer(
            kind="bytes" if tiny else "sentencepiece", vocab_size=4096, algorithm="bpe", sentinels=32 if recipe == "t5" else 0
        ),
        # A post-norm BERT stays at the frequencies of words under the rate that suits the two pre-norm models.
        optimizer=Optimizer(learning_rate=7e-4 if recipe == "bert" and not tiny else 2e-3, weight_decay=0.1, b2=0.98),
        schedule=Schedule(name="cosine", warmup_steps=steps // 10, final_factor=0.1),
        compute=Compute(scan_layers=False),
        checkpoint=Checkpoint(every=10 if tiny else steps // 4),
        log=Log(every=5 if tiny else 20),
    )
