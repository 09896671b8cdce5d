"""XLNet (model_type xlnet): attention's matrices are (width, heads, head width), o too; each layer has three biases of its own."""

from collections.abc import Mapping
from typing import Any

from ptm.fields import ConfigError
from ptm.hf.tables import ACTIVATIONS, BODY, Architecture, Family, Fixed, Joint, Key, Rule, copy_of, dense, linear, norm, permuted, reshaped
from ptm.nn.heads import head_names

LAYER, THEIRS = "encoder/layers", BODY + "layer.{n}"
SAME = {
    "query/kernel": "q", "key/kernel": "k", "value/kernel": "v", "position/kernel": "r", "segment/embedding": "seg_embed",
    "content/bias": "r_w_bias", "position/bias": "r_r_bias", "segment/bias": "r_s_bias",
}  # fmt: skip


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of the body and of the heads `lm`, `classify:N`, `tag:N`, `qa`."""
    found = [
        Rule("token_embed/embedding", BODY + "word_embedding.weight"),
        Rule("mask_embed", BODY + "mask_emb", reshaped(1, 1, config.width)),
        *(Rule(f"{LAYER}/attention/{ours}", f"{THEIRS}.rel_attn.{theirs}") for ours, theirs in SAME.items()),
        Rule(f"{LAYER}/attention/out/kernel", f"{THEIRS}.rel_attn.o", permuted(1, 2, 0)),
        *norm(f"{LAYER}/attention_norm", f"{THEIRS}.rel_attn.layer_norm"),
        *dense(f"{LAYER}/mlp/wi", f"{THEIRS}.ff.layer_1"),
        *dense(f"{LAYER}/mlp/wo", f"{THEIRS}.ff.layer_2"),
        *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.ff.layer_norm"),
    ]
    kinds = head_names(heads)
    if "lm" in kinds:
        found.append(Rule("lm_head/bias", "lm_loss.bias"))
        if not config.tie_embeddings:
            found.append(Rule("lm_head/kernel", "lm_loss.weight", linear()))
    if "classify" in kinds:
        found += dense("classify_head/dense", "sequence_summary.summary") + dense("classify_head/labels", "logits_proj")
    if "tag" in kinds:
        found += dense("tag_head", "classifier")
    if "qa" in kinds:
        found += dense("qa_head", "qa_outputs")
    return found


def _read_clamp(theirs: Mapping[str, Any]) -> dict[str, Any]:
    length = theirs["clamp_len"] if "clamp_len" in theirs else -1
    return {"clamp_len": length if length > 0 else None}


def _read_head_dim(theirs: Mapping[str, Any]) -> dict[str, Any]:
    width, heads, given = (theirs[key] if key in theirs else default for key, default in (("d_model", 1024), ("n_head", 16), ("d_head", None)))
    if given is not None and given * heads != width:
        raise ConfigError(f"d_head={given!r} is not supported; supported: d_model / n_head")
    return {}


XLNET = Family(
    model_type="xlnet",
    name="xlnet",
    keys=(
        Key("vocab_size", "vocab_size", 32000),
        Key("width", "d_model", 1024),
        Key("num_layers", "n_layer", 24),
        Key("num_heads", "n_head", 16),
        Joint(_read_head_dim, lambda config: {}),
        Key("mlp_width", "d_inner", 4096, write=lambda config: config.mlp_width or 4 * config.width),
        Key("activation", "ff_activation", "gelu", ACTIVATIONS),
        Key("attn_type", "attn_type", "bi", {"bi": "bi", "uni": "uni"}),
        Joint(_read_clamp, lambda config: {"clamp_len": -1 if config.clamp_len is None else config.clamp_len}),
        Key("tie_embeddings", "tie_word_embeddings", True),
        Key("norm_eps", "layer_norm_eps", 1e-12),
        Key("dropout", "dropout", 0.1, free=True),
        Joint(lambda theirs: {"attention_dropout": theirs["dropout"] if "dropout" in theirs else 0.1}, lambda config: {}, free=True),
        Key("init_std", "initializer_range", 0.02, free=True),
        Fixed("untie_r", True),
        Fixed("bi_data", False),
        Fixed("same_length", False),
        Fixed("summary_type", "last"),
        Fixed("summary_use_proj", True),
        Fixed("summary_activation", "tanh"),
    ),
    aliases={"n_token": "vocab_size", "hidden_size": "d_model", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    rules=rules,
    architectures=(
        Architecture("XLNetLMHeadModel", ("lm",), "transformer.", {"lm": "logits"}),
        Architecture("XLNetForSequenceClassification", ("classify",), "transformer.", {"classify": "logits"}),
        Architecture("XLNetForTokenClassification", ("tag",), "transformer.", {"tag": "logits"}),
        Architecture("XLNetForQuestionAnsweringSimple", ("qa",), "transformer.", {"qa": "start_logits end_logits"}),
        Architecture("XLNetModel", (), "", {}),
    ),
    signs={"lm": "lm_loss.bias", "classify": "logits_proj.weight", "tag": "classifier.weight", "qa": "qa_outputs.weight"},
    ignored=(copy_of(r"lm_loss\.weight", BODY + "word_embedding.weight"),),
)
