"""Quickstart: any family with any of its objectives, pretrained on English text that every Python carries, in minutes on 2 CPU cores.

    ptm train --config=configs/quickstart.py --workdir=runs/quickstart                    # GPT-2, left to right
    ptm train --config=configs/quickstart.py:bert --workdir=runs/quickstart-bert
    ptm train --config=configs/quickstart.py:albert,sop --workdir=runs/quickstart-albert-sop

A family alone trains with its own objective. Data: the language reference topics of `pydoc_data.topics` and the docstrings of the standard
library, 5 % of the documents held out by a hash. ':tiny' is a smoke run of seconds: configs/quickstart.py:bert,tiny.
"""

from ptm import config, recipe
from ptm.config import Checkpoint, Compute, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import albert, bert, electra, gpt, llama, modernbert, t5, xlnet
from ptm.objectives import causal, denoising, mlm, pairs, permutation, prefix, rtd, span_corruption, ul2

# Family: its objectives, its own first.
FAMILIES = {
    "gpt": ("causal", "prefix", "ul2"),
    "gpt1": ("causal", "prefix", "ul2"),
    "llama": ("causal", "prefix", "ul2"),
    "bert": ("mlm", "spans", "nsp", "sop", "sentences", "causal", "prefix"),
    "roberta": ("sentences", "mlm", "spans"),
    "modernbert": ("mlm", "spans", "sentences"),
    "albert": ("sop", "mlm", "nsp", "sentences"),
    "electra": ("rtd", "mlm"),
    "xlnet": ("permutation",),
    "t5": ("corruption", "denoising", "prefix", "ul2"),
}
STEPS = {"gpt": 480, "bert": 640, "t5": 600}  # of others 480
POST_NORM = ("gpt1", "bert", "roberta", "albert", "electra", "xlnet")


def _model(family: str, *, layers: int, width: int, heads: int, length: int):
    shape = {"num_layers": layers, "width": width, "num_heads": heads}
    plain = {**shape, "dropout": 0.0, "attention_dropout": 0.0}
    if family in ("gpt", "gpt1"):
        return gpt.Config(**plain, max_length=length, prenorm=family == "gpt")
    if family == "llama":
        return llama.Config(**plain, max_length=length, num_kv_heads=heads // 2, mlp_width=8 * width // 3)
    if family == "modernbert":
        return modernbert.Config(**plain, max_length=length, mlp_width=8 * width // 3, window=length // 4)
    if family == "albert":
        return albert.Config(**plain, max_length=length, embed_width=width // 2)
    if family == "electra":
        return electra.Config(**plain, max_length=length, embed_width=width // 2, generator_fraction=0.5)
    if family == "xlnet":
        return xlnet.Config(**plain)
    if family == "t5":
        return t5.Config(**{**shape, "num_layers": layers // 2}, head_dim=width // heads, mlp_width=4 * width, activation="gelu_tanh", gated=True, dropout=0.0)
    return {"bert": bert.BertConfig, "roberta": bert.RobertaConfig}[family](**plain, max_length=length)


def _objective(word: str, *, length: int):
    made = {
        "causal": causal.Config(),
        "prefix": prefix.Config(input_length=length),
        "ul2": ul2.Config(input_length=length),
        "mlm": mlm.Config(unit="whole_word"),
        "spans": mlm.Config(unit="span"),
        "nsp": pairs.Config(task="nsp", unit="whole_word"),
        "sop": pairs.Config(task="sop", unit="ngram"),
        "sentences": pairs.Config(task="none", format="full_sentences"),
        "rtd": rtd.Config(),
        "permutation": permutation.Config(),
        "corruption": span_corruption.Config(input_length=length),
        "denoising": denoising.Config(variant="bert_style", input_length=length),
    }
    return made[word]


def get_config(argument: str = ""):
    """The config of a family (default gpt) with one of its objectives (default its own); `tiny` makes it a smoke run."""
    objectives = tuple(dict.fromkeys(word for words in FAMILIES.values() for word in words))
    family, objective, scale = recipe.words(argument, recipes=tuple(FAMILIES), objectives=objectives)
    objective = objective or FAMILIES[family][0]
    if objective not in FAMILIES[family]:
        raise ConfigError(f"{family} has no recipe for {objective}; its objectives: {', '.join(FAMILIES[family])}.")
    tiny = scale == "tiny"
    layers, width, heads = (2, 32, 2) if tiny else (4, 192, 6)
    length = 32 if tiny else 128
    steps = 20 if tiny else STEPS[family] if family in STEPS else 480
    two_rows = family == "t5"
    # The decoder's row holds the spans that are missing from the encoder's; where it holds the whole text, it is as long.
    own = {"corruption": 16 if tiny else 48}
    sentinels = 64 if objective == "ul2" else 32 if two_rows else 0
    return config.base(
        model=_model(family, layers=layers, width=width, heads=heads, length=length),
        objective=_objective(objective, length=length),
        evals={"validation": loss.Config(every=10 if tiny else steps // 4)},
        train=Train(steps=steps, batch_size=8 if tiny else 16),
        data=Data(source=("python_docs:",), length=own[objective] if objective in own else length),
        tokenizer=Tokenizer(
            kind="bytes" if tiny else "sentencepiece", vocab_size=4096, algorithm="bpe", sentinels=sentinels
        ),
        # Post-norm models stay at the frequencies of words under the rate that suits the pre-norm ones.
        optimizer=Optimizer(learning_rate=7e-4 if family in POST_NORM and not tiny else 2e-3, weight_decay=0.1, b2=0.98),
        schedule=Schedule(name="cosine", warmup_steps=steps // 10, final_factor=0.1),
        compute=Compute(scan_layers=False),
        checkpoint=Checkpoint(every=10 if tiny else steps // 4),
        log=Log(every=5 if tiny else 20),
    )  # fmt: skip
