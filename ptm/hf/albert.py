"""ALBERT (model_type albert): the blocks of a layer lie by group and number in the group."""

import dataclasses
from typing import Any

from ptm.hf.tables import ACTIVATIONS, BODY, Architecture, Family, Fixed, Implied, Key, Rule, copy_of, dense, norm, numbers
from ptm.nn.heads import head_names

LAYER, THEIRS = "encoder/layers", BODY + "encoder.albert_layer_groups.{group}.albert_layers.{inner}"


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of the body and of the heads `mlm`, `pooled`, `pair`, `classify:N`, `tag:N`, `qa`."""
    layers = [
        *dense(f"{LAYER}/attention/query", f"{THEIRS}.attention.query"),
        *dense(f"{LAYER}/attention/key", f"{THEIRS}.attention.key"),
        *dense(f"{LAYER}/attention/value", f"{THEIRS}.attention.value"),
        *dense(f"{LAYER}/attention/out", f"{THEIRS}.attention.dense", inputs=2),
        *norm(f"{LAYER}/attention_norm", f"{THEIRS}.attention.LayerNorm"),
        *dense(f"{LAYER}/mlp/wi", f"{THEIRS}.ffn"),
        *dense(f"{LAYER}/mlp/wo", f"{THEIRS}.ffn_output"),
        *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.full_layer_layer_norm"),
    ]
    found = [dataclasses.replace(rule, index=lambda n: {"group": n // config.inner_layers, "inner": n % config.inner_layers}) for rule in layers]
    found += [
        Rule("token_embed/embedding", BODY + "embeddings.word_embeddings.weight"),
        Rule("position_embed/embedding", BODY + "embeddings.position_embeddings.weight"),
        Rule("type_embed/embedding", BODY + "embeddings.token_type_embeddings.weight"),
        *norm("embed_norm", BODY + "embeddings.LayerNorm"),
        *dense("embed_projection", BODY + "encoder.embedding_hidden_mapping_in"),
    ]
    kinds = head_names(heads)
    if "mlm" in kinds:
        found += dense("mlm_head/dense", "predictions.dense") + norm("mlm_head/norm", "predictions.LayerNorm") + [Rule("mlm_head/bias", "predictions.bias")]
    if kinds & {"pooled", "pair", "classify"}:
        found += dense("pooler/dense", BODY + "pooler")
    for kind, ours, theirs in (
        ("pair", "pair_head", "sop_classifier.classifier"), ("classify", "classify_head/labels", "classifier"), ("tag", "tag_head", "classifier"),
        ("qa", "qa_head", "qa_outputs"),
    ):  # fmt: skip
        found += dense(ours, theirs) if kind in kinds else []
    return found


ALBERT = Family(
    model_type="albert",
    name="albert",
    keys=(
        Key("vocab_size", "vocab_size", 30000),
        Key("max_length", "max_position_embeddings", 512),
        Key("embed_width", "embedding_size", 128),
        Key("width", "hidden_size", 4096),
        Key("num_layers", "num_hidden_layers", 12),
        Key("num_groups", "num_hidden_groups", 1),
        Key("inner_layers", "inner_group_num", 1),
        Key("num_heads", "num_attention_heads", 64),
        Key("mlp_width", "intermediate_size", 16384, write=lambda config: config.mlp_width or 4 * config.width),
        Key("num_types", "type_vocab_size", 2),
        Key("activation", "hidden_act", "gelu_new", ACTIVATIONS),
        Key("norm_eps", "layer_norm_eps", 1e-12),
        Key("dropout", "hidden_dropout_prob", 0.0, free=True),
        Key("attention_dropout", "attention_probs_dropout_prob", 0.0, free=True),
        Key("classify_dropout", "classifier_dropout_prob", 0.1, free=True),
        Key("init_std", "initializer_range", 0.02, free=True),
        Implied("share", "all"),
        Implied("tie_embeddings", True),
        Fixed("tie_word_embeddings", True),  # untied, theirs keeps a second bias that nothing reads
        Fixed("position_embedding_type", "absolute"),
    ),
    rules=rules,
    architectures=(
        Architecture("AlbertForPreTraining", ("mlm", "pooled", "pair"), "albert.", {"mlm": "prediction_logits", "pair": "sop_logits"}),
        Architecture("AlbertForMaskedLM", ("mlm",), "albert.", {"mlm": "logits"}),
        Architecture("AlbertForSequenceClassification", ("pooled", "classify"), "albert.", {"classify": "logits"}),
        Architecture("AlbertForTokenClassification", ("tag",), "albert.", {"tag": "logits"}),
        Architecture("AlbertForQuestionAnswering", ("qa",), "albert.", {"qa": "start_logits end_logits"}),
        Architecture("AlbertModel", ("pooled",), "", {"pooled": "pooler_output"}),
        Architecture("AlbertModel", (), "", {}),
    ),
    signs={
        "mlm": "predictions.dense.weight",
        "pooled": BODY + "pooler.weight",
        "pair": "sop_classifier.classifier.weight",
        "classify": "classifier.weight",
        "tag": "classifier.weight",
        "qa": "qa_outputs.weight",
    },
    implies={"pair": "pooled", "classify": "pooled"},
    ignored=(
        copy_of(r"predictions\.decoder\.weight", BODY + "embeddings.word_embeddings.weight"),
        copy_of(r"predictions\.decoder\.bias", "predictions.bias"),
        numbers(BODY + r"embeddings\.position_ids"),
    ),
)
