"""ModernBERT (model_type modernbert): query, key and value in one matrix, gate and input of the feed-forward in another."""

from collections.abc import Mapping
from typing import Any

from ptm.fields import ConfigError
from ptm.hf.tables import ACTIVATIONS, BODY, Architecture, Family, Joint, Key, Rule, copy_of, dense, flat, fused, linear, norm
from ptm.hf.transfer import Source, found_heads
from ptm.nn.heads import head_names

LAYER, THEIRS = "encoder/layers", BODY + "layers.{n}"


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of the body and of the heads `mlm`, `classify:N`, `tag:N`, `qa`."""
    qkv = [f"{LAYER}/attention/{part}" for part in ("query", "key", "value")]
    gated = [f"{LAYER}/mlp/gate", f"{LAYER}/mlp/wi"]
    found = [
        Rule("token_embed/embedding", BODY + "embeddings.tok_embeddings.weight"),
        *norm("embed_norm", BODY + "embeddings.norm", bias=config.norm_bias),
        Rule(tuple(f"{part}/kernel" for part in qkv), f"{THEIRS}.attn.Wqkv.weight", fused(linear(), axis=0)),
        *dense(f"{LAYER}/attention/out", f"{THEIRS}.attn.Wo", inputs=2, bias=config.attention_bias),
        Rule(tuple(f"{part}/kernel" for part in gated), f"{THEIRS}.mlp.Wi.weight", fused(linear(), axis=0)),
        *dense(f"{LAYER}/mlp/wo", f"{THEIRS}.mlp.Wo", bias=config.mlp_bias),
        *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.mlp_norm", bias=config.norm_bias),
        *norm("encoder/final_norm", BODY + "final_norm", bias=config.norm_bias),
    ]
    if config.num_layers > 1:  # the first layer has no norm before attention; where it is the only one, ours has none either
        found.append(Rule(f"{LAYER}/attention_norm/scale", f"{THEIRS}.attn_norm.weight", absent={0: 1.0}))
        found += [Rule(f"{LAYER}/attention_norm/bias", f"{THEIRS}.attn_norm.bias", absent={0: 0.0})] * config.norm_bias
    if config.attention_bias:
        found.append(Rule(tuple(f"{part}/bias" for part in qkv), f"{THEIRS}.attn.Wqkv.bias", fused(flat, axis=0)))
    if config.mlp_bias:
        found.append(Rule(tuple(f"{part}/bias" for part in gated), f"{THEIRS}.mlp.Wi.bias", fused(flat, axis=0)))
    for kind in ("mlm", "classify", "tag", "qa"):
        if kind in head_names(heads):
            found += dense(f"{kind}_head/dense", "head.dense", bias=config.head_bias) + norm(f"{kind}_head/norm", "head.norm", bias=config.norm_bias)
            if kind != "mlm":
                found += dense(f"{kind}_head/labels", "classifier")
                continue
            if not config.tie_embeddings:
                found += dense("mlm_head/decoder", "decoder", bias=False)
            if config.decoder_bias:
                found.append(Rule("mlm_head/bias", "decoder.bias"))
    return found


def _read_positions(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """New configs say it in rope_parameters and layer_types, older ones in global_rope_theta, local_rope_theta, global_attn_every_n_layers."""
    thetas, told = {}, theirs.get("rope_parameters") or {}
    if unknown := sorted(set(told) - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"rope_parameters has {', '.join(unknown)}; supported: full_attention and sliding_attention, each with its rope_theta")
    for ours, kind, older, default in (
        ("global_theta", "full_attention", "global_rope_theta", 160000.0), ("local_theta", "sliding_attention", "local_rope_theta", 10000.0)
    ):  # fmt: skip
        given = told.get(kind) or {}
        if given.get("rope_type", given.get("type", "default")) != "default" or given.get("partial_rotary_factor", 1.0) != 1.0 or theirs.get("rope_scaling"):
            raise ConfigError("rope_parameters of another rope_type than default, or for a part of a head, are not supported")
        thetas[ours] = float(given.get("rope_theta", theirs.get(older, default)))
    layers, types = theirs.get("num_hidden_layers", 22), theirs.get("layer_types")
    if types is None:
        return {"global_every": theirs.get("global_attn_every_n_layers", 3), **thetas}
    full = [n for n, kind in enumerate(types) if kind == "full_attention"]
    every = full[1] if len(full) > 1 else layers
    if [kind == "full_attention" for kind in types] != [n % every == 0 for n in range(layers)]:
        raise ConfigError(f"layer_types={types} is not supported; supported: full_attention in layers 0, n, 2n, ...")
    return {"global_every": every, **thetas}


def _write_positions(config: Any) -> dict[str, Any]:
    return {
        "layer_types": ["sliding_attention" if n % config.global_every else "full_attention" for n in range(config.num_layers)],
        "global_attn_every_n_layers": config.global_every, "global_rope_theta": config.global_theta, "local_rope_theta": config.local_theta,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": config.global_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_theta},
        },
    }  # fmt: skip


def _adjust(source: Source, keys: dict[str, Any]) -> None:
    """Our classification reads the first position; where the hidden states are averaged, the same head says something else."""
    theirs = source.directory.config
    pooling = theirs.get("classifier_pooling", "cls")
    if pooling != "cls" and any(head.startswith("classify") for head in found_heads(MODERNBERT, source)):
        raise ConfigError(f"classifier_pooling={pooling!r} is not supported where there is a head for classification; supported: 'cls'")


MODERNBERT = Family(
    model_type="modernbert",
    name="modernbert",
    keys=(
        Key("vocab_size", "vocab_size", 50368),
        Key("max_length", "max_position_embeddings", 8192),
        Key("width", "hidden_size", 768),
        Key("num_layers", "num_hidden_layers", 22),
        Key("num_heads", "num_attention_heads", 12),
        Key("mlp_width", "intermediate_size", 1152),
        Key("activation", "hidden_activation", "gelu", ACTIVATIONS),
        Key("head_activation", "classifier_activation", "gelu", ACTIVATIONS),
        Key("window", "local_attention", 128),
        Key("tie_embeddings", "tie_word_embeddings", True),
        Key("attention_bias", "attention_bias", False),
        Key("mlp_bias", "mlp_bias", False),
        Key("norm_bias", "norm_bias", False),
        Key("head_bias", "classifier_bias", False),
        Key("decoder_bias", "decoder_bias", True),
        Key("norm_eps", "norm_eps", 1e-5),
        Key("dropout", "mlp_dropout", 0.0, free=True),
        Joint(lambda theirs: {}, lambda config: dict.fromkeys(("embedding_dropout", "classifier_dropout"), config.dropout), free=True),
        Key("attention_dropout", "attention_dropout", 0.0, free=True),
        Key("init_std", "initializer_range", 0.02, free=True),
        Joint(_read_positions, _write_positions),
        # Which hidden state stands for a row matters to classification alone, which reads the first (see _adjust).
        Joint(lambda theirs: {}, lambda config: {"classifier_pooling": "cls"}),
    ),
    rules=rules,
    architectures=(
        Architecture("ModernBertForMaskedLM", ("mlm",), "model.", {"mlm": "logits"}),
        Architecture("ModernBertForSequenceClassification", ("classify",), "model.", {"classify": "logits"}),
        Architecture("ModernBertForTokenClassification", ("tag",), "model.", {"tag": "logits"}),
        Architecture("ModernBertForQuestionAnswering", ("qa",), "model.", {"qa": "start_logits end_logits"}),
        Architecture("ModernBertModel", (), "", {}),
    ),
    # A directory for masked language modelling is told by its class alone: its head's dense layer is that of the others, its decoder may be tied.
    signs={"classify": "classifier.weight", "tag": "classifier.weight", "qa": "classifier.weight"},
    ignored=(copy_of(r"decoder\.weight", BODY + "embeddings.tok_embeddings.weight"),),
    adjust=_adjust,
)
