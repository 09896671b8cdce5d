"""T5 1.0 and 1.1 (model_type t5): no biases; relative positions lie in the first layer of each side and serve all of its layers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptm.fields import ConfigError
from ptm.hf.tables import ACTIVATIONS, BODY, Architecture, Family, Fixed, Ignored, Implied, Joint, Key, Rule, copy_of, dense, linear, norm
from ptm.hf.transfer import Source
from ptm.nn.heads import head_names

TABLE = BODY + "shared.weight"


def _side(ours: str, theirs: str, *, cross: bool, gated: bool) -> list[Rule]:
    """The rules of the encoder, or of the decoder."""
    layer, block = f"{ours}/layers", f"{BODY}{theirs}.block.{{n}}.layer"

    def attention(name: str, sublayer: str) -> list[Rule]:
        maps = ((f"{layer}/{name}/query", "q", 1), (f"{layer}/{name}/key", "k", 1), (f"{layer}/{name}/value", "v", 1), (f"{layer}/{name}/out", "o", 2))
        return [rule for path, letter, inputs in maps for rule in dense(path, f"{sublayer}.{letter}", inputs=inputs, bias=False)]

    last = f"{block}.{2 if cross else 1}"
    found = [
        Rule(f"{ours}/relative_bias/embedding", f"{BODY}{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *attention("attention", f"{block}.0.SelfAttention"),
        *norm(f"{layer}/attention_norm", f"{block}.0.layer_norm", bias=False),
        *dense(f"{layer}/mlp/wo", f"{last}.DenseReluDense.wo", bias=False),
        *norm(f"{layer}/mlp_norm", f"{last}.layer_norm", bias=False),
        *norm(f"{ours}/final_norm", f"{BODY}{theirs}.final_layer_norm", bias=False),
    ]
    if cross:
        found += attention("cross_attention", f"{block}.1.EncDecAttention")
        found += norm(f"{layer}/cross_attention_norm", f"{block}.1.layer_norm", bias=False)
    inner = {"gate": "wi_0", "wi": "wi_1"} if gated else {"wi": "wi"}
    return found + [rule for name, their in inner.items() for rule in dense(f"{layer}/mlp/{name}", f"{last}.DenseReluDense.{their}", bias=False)]


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of both sides and of the heads `lm`, `classify:N`, `qa`."""
    found = [Rule("token_embed/embedding", TABLE)]
    found += _side("encoder", "encoder", cross=False, gated=config.gated) + _side("decoder", "decoder", cross=True, gated=config.gated)
    kinds = head_names(heads)
    if "lm" in kinds and not config.tie_embeddings:
        found.append(Rule("lm_head/kernel", "lm_head.weight", linear()))
    if "classify" in kinds:
        found += dense("classify_head/dense", "classification_head.dense") + dense("classify_head/labels", "classification_head.out_proj")
    if "qa" in kinds:
        found += dense("qa_head", "qa_outputs")
    return found


def _read_projection(theirs: Mapping[str, Any], *, default: str) -> dict[str, Any]:
    value = theirs["feed_forward_proj"] if "feed_forward_proj" in theirs else default
    gate, _, name = str(value).rpartition("-")
    known = {"gelu": "gelu_tanh"} if value == "gated-gelu" else {}  # the reference takes the tanh form where it is gated
    activations = ACTIVATIONS | known
    if gate not in ("", "gated") or name not in activations:
        raise ConfigError(f"feed_forward_proj={value!r} is not supported; supported: ACTIVATION or gated-ACTIVATION with one of {', '.join(ACTIVATIONS)}")
    read = {"gated": gate == "gated", "activation": activations[name]}
    # What the reference works out of it is in its files too, and there it counts.
    written = {"is_gated_act": read["gated"], "dense_act_fn": read["activation"]}
    given = {key: ACTIVATIONS.get(theirs[key]) if key == "dense_act_fn" else theirs[key] for key in written if key in theirs}
    if wrong := [f"{key}={theirs[key]!r}" for key, meant in given.items() if meant != written[key]]:
        raise ConfigError(f"feed_forward_proj={value!r} and {', '.join(wrong)} contradict each other")
    return read


def _write_projection(config: Any) -> dict[str, Any]:
    if config.gated and config.activation == "gelu":
        raise ConfigError("model.activation=gelu with model.gated has no counterpart: gated-gelu of theirs is gelu_tanh")
    name = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    if config.gated and config.activation == "gelu_tanh":
        name = "gelu"
    return {"feed_forward_proj": f"gated-{name}" if config.gated else name}


def _read_scale(theirs: Mapping[str, Any]) -> dict[str, Any]:
    # Newer versions say whether hidden states are scaled before the projection; in older ones it follows from tied embeddings.
    for key in ("scale_decoder_outputs", "tie_word_embeddings"):
        if key in theirs:
            return {"tie_embeddings": bool(theirs[key])}
    return {"tie_embeddings": True}


def _write_scale(config: Any) -> dict[str, Any]:
    return {"scale_decoder_outputs": config.tie_embeddings, "tie_word_embeddings": config.tie_embeddings}


def _adjust(source: Source, keys: dict[str, Any]) -> None:
    if keys["tie_embeddings"] and "lm_head.weight" in source and TABLE in source and not np.array_equal(source.read("lm_head.weight"), source.read(TABLE)):
        raise ConfigError("lm_head.weight differs from shared.weight, yet the config ties them; set tie_word_embeddings to false if the model is of T5 1.1")


T5 = Family(
    model_type="t5",
    name="t5",
    keys=(
        Key("vocab_size", "vocab_size", 32128),
        Key("width", "d_model", 512),
        Key("head_dim", "d_kv", 64),
        Key("mlp_width", "d_ff", 2048),
        Key("num_layers", "num_layers", 6),
        Key("decoder_layers", "num_decoder_layers", None, write=lambda config: config.decoder_layers or config.num_layers),
        Key("num_heads", "num_heads", 8),
        Key("num_buckets", "relative_attention_num_buckets", 32),
        Key("max_distance", "relative_attention_max_distance", 128),
        Key("norm_eps", "layer_norm_epsilon", 1e-6),
        Joint(functools.partial(_read_projection, default="relu"), _write_projection),
        Joint(_read_scale, _write_scale),
        Key("dropout", "dropout_rate", 0.1, free=True),
        Key("init_factor", "initializer_factor", 1.0, free=True),
        Fixed("is_encoder_decoder", True, written=True),
    ),
    aliases={"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv"},
    rules=rules,
    architectures=(
        Architecture("T5ForConditionalGeneration", ("lm",), "", {"lm": "logits"}),
        Architecture("T5ForSequenceClassification", ("classify",), "transformer.", {"classify": "logits"}),
        Architecture("T5ForQuestionAnswering", ("qa",), "", {"qa": "start_logits end_logits"}),
        Architecture("T5Model", (), "", {}),
    ),
    signs={"classify": "classification_head.out_proj.weight", "qa": "qa_outputs.weight"},
    ignored=(
        copy_of(BODY + r"(encoder|decoder)\.embed_tokens\.weight", TABLE),
        copy_of(r"lm_head\.weight", TABLE),
        # Files of the first releases hold a table that the published model does not use.
        Ignored(BODY + r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight", "a table of cross-attention", lambda array, read: True),
    ),
    adjust=_adjust,
    tokenizers={"sentencepiece": "T5Tokenizer"},
)

# Xue et al. 2021: 1.1 with defaults of its own, never tied. We write it as t5, which says the same.
_DEFAULTS = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
MT5 = dataclasses.replace(
    T5,
    model_type="mt5",
    keys=(
        *(dataclasses.replace(key, default=_DEFAULTS[key.theirs]) if key.theirs in _DEFAULTS else key for key in T5.keys if isinstance(key, Key)),
        Joint(functools.partial(_read_projection, default="gated-gelu"), _write_projection),
        Implied("tie_embeddings", False),
        Fixed("is_encoder_decoder", True, written=True),
    ),
    architectures=tuple(dataclasses.replace(architecture, name="M" + architecture.name) for architecture in T5.architectures),
    writes=lambda config: False,
)
