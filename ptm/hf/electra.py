"""ELECTRA (model_type electra): theirs knows generator and discriminator as two models; what we train as one is two directories, side by side."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptm import tree
from ptm.fields import ConfigError
from ptm.hf import bert
from ptm.hf.tables import BODY, Architecture, Family, Fixed, Joint, Key, Rule, copy_of, dense, norm, numbers
from ptm.hf.transfer import Imported
from ptm.models.electra import EMBEDDINGS, TIED
from ptm.nn.heads import head_names

PARTS = ("generator", "discriminator")
# What one of their directories says of the two encoders: the only one is of full size and has the embeddings.
ALONE = {"generator_fraction": 1.0, "tie_embeddings": "embeddings"}


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of the generator with the head `mlm`, or of the discriminator with the heads `rtd`, `classify:N`, `tag:N`, `qa`."""
    kinds = head_names(heads)
    part = "generator" if kinds == {"mlm"} else "discriminator"
    found = [dataclasses.replace(rule, ours=f"{part}/{rule.ours}") if rule.layered else rule for rule in bert.rules(config, tuple(kinds & {"tag", "qa"}))]
    if config.embed_width not in (None, config.width):
        found += dense(f"{part}/embed_projection", BODY + "embeddings_project")
    if "mlm" in kinds:
        if config.activation != "gelu":
            raise ConfigError(f"model.activation={config.activation} has no counterpart in a generator of theirs, whose head always has gelu")
        found += dense("mlm_head/dense", "generator_predictions.dense") + norm("mlm_head/norm", "generator_predictions.LayerNorm")
        found += [Rule("mlm_head/bias", "generator_lm_head.bias")]
    if "rtd" in kinds:
        found += dense("rtd_head/dense", "discriminator_predictions.dense") + dense("rtd_head/labels", "discriminator_predictions.dense_prediction")
    if "classify" in kinds:
        found += dense("classify_head/dense", "classifier.dense") + dense("classify_head/labels", "classifier.out_proj")
    return found


def _write_alone(config: Any) -> dict[str, Any]:
    wrong = [f"model.{key}={getattr(config, key)!r}" for key, value in ALONE.items() if getattr(config, key) != value]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)} speaks of two encoders; a directory of theirs holds one")
    return {}


ELECTRA = Family(
    model_type="electra",
    name="electra",
    keys=(
        Key("vocab_size", "vocab_size", 30522),
        Key("max_length", "max_position_embeddings", 512),
        Key("embed_width", "embedding_size", 128, write=lambda config: config.embed_width or config.width),
        Key("width", "hidden_size", 256),
        Key("num_layers", "num_hidden_layers", 12),
        Key("num_heads", "num_attention_heads", 4),
        Key("mlp_width", "intermediate_size", 1024, write=lambda config: config.mlp_width or 4 * config.width),
        Key("num_types", "type_vocab_size", 2),
        Key("activation", "hidden_act", "gelu", bert.ACTIVATIONS),
        Key("norm_eps", "layer_norm_eps", 1e-12),
        Key("dropout", "hidden_dropout_prob", 0.1, free=True),
        Key("attention_dropout", "attention_probs_dropout_prob", 0.1, free=True),
        Key("init_std", "initializer_range", 0.02, free=True),
        Joint(lambda theirs: dict(ALONE), _write_alone, free=True),  # free: a run adds a generator of its own
        Fixed("position_embedding_type", "absolute"),
        Fixed("is_decoder", False),
        Fixed("add_cross_attention", False),
        Fixed("tie_word_embeddings", True),
    ),
    rules=rules,
    architectures=(
        Architecture("ElectraForPreTraining", ("rtd",), "electra.", {"rtd": "logits"}),
        Architecture("ElectraForMaskedLM", ("mlm",), "electra.", {"mlm": "logits"}),
        Architecture("ElectraForSequenceClassification", ("classify",), "electra.", {"classify": "logits"}),
        Architecture("ElectraForTokenClassification", ("tag",), "electra.", {"tag": "logits"}),
        Architecture("ElectraForQuestionAnswering", ("qa",), "electra.", {"qa": "start_logits end_logits"}),
        Architecture("ElectraModel", (), "", {}),
    ),
    signs={
        "rtd": "discriminator_predictions.dense_prediction.weight", "mlm": "generator_predictions.dense.weight", "classify": "classifier.out_proj.weight",
        "tag": "classifier.weight", "qa": "qa_outputs.weight",
    },
    ignored=(copy_of(r"generator_lm_head\.weight", BODY + "embeddings.word_embeddings.weight"), numbers(BODY + r"embeddings\.position_ids")),
)  # fmt: skip


def split(config: Any, heads: tuple[str, ...], params: Mapping[str, Any]) -> dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]]:
    """(config, heads, parameters) of each encoder that the heads need as a model of its own, by its name in PARTS."""
    flat, found = tree.paths(params), {}
    body = {path: leaf for path, leaf in flat.items() if path.partition("/")[0] in EMBEDDINGS}
    if "mlm" in heads:
        width, num_heads, mlp_width = config.generator_shape()
        sizes = {"width": width, "num_heads": num_heads, "mlp_width": mlp_width, "embed_width": config.embed_width or config.width}
        encoder = "discriminator" if config.tie_embeddings == "all" else "generator"
        own = {path.removeprefix("generator/"): leaf for path, leaf in flat.items() if path.startswith("generator/")}
        embeddings = {path: leaf for path, leaf in {**body, **own}.items() if path.partition("/")[0] in EMBEDDINGS}
        rest = {"generator/" + path.removeprefix(f"{encoder}/"): leaf for path, leaf in flat.items() if path.startswith(f"{encoder}/")}
        rest = {path: leaf for path, leaf in rest.items() if path.split("/")[1] not in EMBEDDINGS}
        head = {path: leaf for path, leaf in flat.items() if path.startswith("mlm_head/")}
        found["generator"] = (dataclasses.replace(config, **sizes, **ALONE), ("mlm",), tree.unflatten({**embeddings, **rest, **head}))
    if others := tuple(head for head in heads if head != "mlm"):
        kept = {path: leaf for path, leaf in flat.items() if path.partition("/")[0] not in ("generator", "mlm_head")}
        found["discriminator"] = (dataclasses.replace(config, **ALONE), others, tree.unflatten(kept))
    return found


def join(generator: Imported, discriminator: Imported) -> Imported:
    """The model of two directories. Raises ConfigError if the generator's shape is no fraction of the discriminator's.

    What is equal in both counts as tied.
    """
    small, large = generator.config, discriminator.config
    ours, theirs = tree.paths(generator.params), tree.paths(discriminator.params)

    def equal(names: tuple[str, ...]) -> bool:
        return all(np.array_equal(leaf, theirs[path]) for path, leaf in ours.items() if path.partition("/")[0] in names)

    encoder = {path.replace("generator/", "discriminator/", 1): leaf for path, leaf in ours.items() if path.startswith("generator/")}
    alike = all(path in theirs and np.array_equal(leaf, theirs[path]) for path, leaf in encoder.items())
    tie = next(name for name in ("all", "embeddings", "tokens", "none") if equal(TIED[name]) and (name != "all" or alike))
    config = dataclasses.replace(large, generator_fraction=small.width / large.width, tie_embeddings=tie)
    sizes = ("num_layers", "vocab_size", "max_length", "num_types", "activation", "norm_eps", "init_std", "dropout", "attention_dropout")
    wrong = [f"{key}={getattr(small, key)} beside {getattr(large, key)}" for key in sizes if getattr(small, key) != getattr(large, key)]
    shape = (small.width, small.num_heads, small.mlp_width or 4 * small.width)
    if config.generator_shape() != shape:
        wrong.append(f"width, heads and feed-forward {shape}, not {config.generator_shape()}, that fraction of the discriminator's")
    if (small.embed_width or small.width) != (large.embed_width or large.width):
        wrong.append(f"embed_width={small.embed_width} beside {large.embed_width}")
    if wrong:
        raise ConfigError(f"generator and discriminator do not make one model: {'; '.join(wrong)}. Read them one by one.")
    own = {f"generator/{path}": leaf for path, leaf in ours.items() if path.partition("/")[0] in EMBEDDINGS and path.partition("/")[0] not in TIED[tie]}
    rest = {path: leaf for path, leaf in ours.items() if path.startswith("mlm_head/") or path.startswith("generator/") and tie != "all"}
    notes = list(dict.fromkeys([*generator.notes, *discriminator.notes]))
    return Imported(discriminator.family, config, ("mlm", *discriminator.heads), tree.unflatten({**theirs, **own, **rest}), notes)
