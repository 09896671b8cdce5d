"""Models for accelerator pods: what `ptm plan` is asked about first (docs/scale.md).

    ptm plan --config=configs/scale.py:gpt_1b --topology=v5p:4x4x4 --config.mesh.fsdp=64
    ptm train --config=configs/scale.py:gpt_1b --workdir=runs/gpt_1b --config.mesh.fsdp=64 --config.data.source=jsonl:c4/*.jsonl

gpt_1b: 24 layers of width 2048, the 1.3 billion of Brown et al. 2020 (table 2.1) at heads of 128; gpt_7b: 32 of 4096, its 6.7 billion; both with learned
positions, tied embeddings and a vocabulary of 50,304 (a multiple of 128). bert_large: Devlin et al. 2019 at length 512. t5_3b, t5_11b: Raffel et al. 2020,
span corruption of 512 tokens, Adafactor. 8,192 positions a device of 64 devices, their logits at once; bfloat16 activations and logits, float32 parameters and
state, layers recomputed in the backward pass. None was run at this size here: docs/scale.md has what their compiled steps need. `tiny` is a smoke run on text that every Python carries.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Mesh, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.models import bert, gpt, t5
from ptm.objectives import causal, mlm, span_corruption

DEVICES = 64
GPT = {"max_length": 2048, "vocab_size": 50_304, "dropout": 0.0, "attention_dropout": 0.0, "use_bias": True}
# Model, objective, length of a row (its positions with the encoder's), pieces of the vocabulary.
SCALES = {
    "gpt_1b": (gpt.Config(num_layers=24, width=2048, num_heads=16, **GPT), causal.Config(), 2048, 2048, 50_257),
    "gpt_7b": (gpt.Config(num_layers=32, width=4096, num_heads=32, **GPT), causal.Config(), 2048, 2048, 50_257),
    "bert_large": (bert.BertConfig(**bert.SIZES["large"], dropout=0.1, attention_dropout=0.0, vocab_size=30_592), mlm.Config(), 512, 512, 30_522),
    "t5_3b": (t5.Config(**t5.SIZES["3b"], dropout=0.0, vocab_size=32_128), span_corruption.Config(input_length=512), 114, 626, 32_000),
    "t5_11b": (t5.Config(**t5.SIZES["11b"], dropout=0.0, vocab_size=32_128), span_corruption.Config(input_length=512), 114, 626, 32_000),
}


def get_config(argument: str = ""):
    """The config of one of SCALES (default gpt_1b); `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=tuple(SCALES))
    model, objective, length, positions, pieces = SCALES[chosen]
    is_t5 = chosen.startswith("t5")
    cfg = config.base(
        model=model,
        objective=objective,
        evals={"validation": loss.Config(every=2000, batches=20)},
        train=Train(steps=100_000, batch_size=8192 // positions * DEVICES),
        data=Data(length=length),
        tokenizer=Tokenizer(kind="sentencepiece" if is_t5 else "wordpiece" if chosen == "bert_large" else "bpe", vocab_size=pieces, sentinels=100 if is_t5 else 0),
        optimizer=Optimizer(name="adafactor", learning_rate=0.01, weight_decay=0.0) if is_t5 else Optimizer(learning_rate=2e-4, weight_decay=0.1, b2=0.95),
        schedule=Schedule(name="rsqrt" if is_t5 else "cosine", warmup_steps=2000, final_factor=0.0 if is_t5 else 0.1),
        mesh=Mesh(data=1, fsdp=-1),
        compute=Compute(dtype="bfloat16", logits="bfloat16", remat="full", loss_chunk=8192),
        checkpoint=Checkpoint(every=2000),
        log=Log(every=20),
    )
    return recipe.tiny(cfg) if scale else cfg
