"""Dialogue: a decoder or encoder-decoder that goes on with a conversation, learned from JSON lines of turns.

    ptm train --config=configs/finetune/dialogue.py --config.init=hf:DIR --config.data.source=chat:train.jsonl \\
        --config.data.validation_source=chat:dev.jsonl --workdir=runs/dialogue

A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}. Each turn of the assistant is an example: the
model reads all that was said before, a line `role: content` for each turn and `assistant:` at the end, and learns the reply alone. Longer histories lose
their end, which is the question: keep them within --config.objective.input_length. Without validation_source a part of the dialogues is held out.

Words: decoder (default) reads and writes in one row, encoder_decoder has rows of its own for both; tiny is a smoke run on invented dialogues.
Rate 5e-5, linear, warm-up over 5 %; these are ours, as are 1,000 steps: set --config.train.steps to 3 epochs or so of your data. The reply is measured
by BLEU and chrF, which say little about a conversation; read predictions/dev-*.jsonl.
"""

from pathlib import Path

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import loss, task
from ptm.models import gpt, t5
from ptm.objectives import seq2seq

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/own"


def get_config(argument: str = ""):
    """The config for a `decoder` (default) or an `encoder_decoder`; `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=("decoder", "encoder_decoder"))
    one_row = chosen == "decoder"
    cfg = config.base(
        objective=seq2seq.Config(input_length=384, max_new_tokens=128, truncate=True, metrics=("bleu", "chrf")),
        evals={"validation": loss.Config(every=100), "dev": task.Config(every=500, examples=200)},
        train=Train(steps=1000, batch_size=16),
        data=Data(
            source=(f"chat:{MINIATURES}/dialogues.jsonl" if scale else "chat:train.jsonl",),
            validation_source=(f"chat:{MINIATURES}/dialogues.jsonl",) if scale else (), columns=("text=text", "target=reply"),
            length=512 if one_row else 128,
        ),
        optimizer=Optimizer(learning_rate=5e-5, weight_decay=0.01),
        schedule=Schedule(name="linear", warmup_steps=50),
        checkpoint=Checkpoint(every=100),
        log=Log(every=10),
    )  # fmt: skip
    if scale:
        length = 192 if one_row else 96
        recipe.tiny(cfg, model=gpt.Config(max_length=length, dropout=0.0, attention_dropout=0.0) if one_row else t5.Config(dropout=0.0), length=length)
        cfg.objective.max_new_tokens = 32
        cfg.evals.dev.every = cfg.train.steps  # a smoke run generates once
    return cfg
