"""GPT-2 (model_type gpt2) and GPT (openai-gpt): matrices are (inputs, outputs), query, key and value lie side by side in one of them."""

from typing import Any

from ptm.hf.tables import (
    ACTIVATIONS,
    BODY,
    Architecture,
    Family,
    Fixed,
    Implied,
    Joint,
    Key,
    Rule,
    causal_mask,
    conv,
    copy_of,
    dense,
    flat,
    fused,
    linear,
    mask_value,
    norm,
    numbers,
)
from ptm.nn.heads import head_names

LAYER, THEIRS = "decoder/layers", BODY + "h.{n}"


def head_rules(config: Any, heads: tuple[str, ...], *, tag: str) -> list[Rule]:
    """Parameters of a decoder's heads `lm`, `classify:N`, `tag:N` (their name of it is `tag`), `qa`."""
    found, kinds = [], head_names(heads)
    if "lm" in kinds and not config.tie_embeddings:
        found.append(Rule("lm_head/kernel", "lm_head.weight", linear()))
    if "classify" in kinds:
        found += dense("classify_head/labels", "score", bias=False)
    if "tag" in kinds:
        found += dense("tag_head", tag)
    if "qa" in kinds:
        found += dense("qa_head", "qa_outputs")
    return found


def _rules(config: Any, heads: tuple[str, ...], *, tokens: str, positions: str) -> list[Rule]:
    parts = [f"{LAYER}/attention/{part}" for part in ("query", "key", "value")]
    found = [
        Rule("token_embed/embedding", tokens),
        Rule("position_embed/embedding", positions),
        Rule(tuple(f"{part}/kernel" for part in parts), f"{THEIRS}.attn.c_attn.weight", fused(conv(), axis=1)),
        Rule(tuple(f"{part}/bias" for part in parts), f"{THEIRS}.attn.c_attn.bias", fused(flat, axis=0)),
        *dense(f"{LAYER}/attention/out", f"{THEIRS}.attn.c_proj", inputs=2, kernel=conv),
        *norm(f"{LAYER}/attention_norm", f"{THEIRS}.ln_1"),
        *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.ln_2"),
        *dense(f"{LAYER}/mlp/wi", f"{THEIRS}.mlp.c_fc", kernel=conv),
        *dense(f"{LAYER}/mlp/wo", f"{THEIRS}.mlp.c_proj", kernel=conv),
    ]
    return found + head_rules(config, heads, tag="classifier")


def gpt2_rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of GPT-2 and of the heads `lm`, `classify:N`, `tag:N`, `qa`."""
    return _rules(config, heads, tokens=BODY + "wte.weight", positions=BODY + "wpe.weight") + norm("decoder/final_norm", BODY + "ln_f")


def gpt_rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of GPT, which has no final norm, and of the heads `lm`, `classify:N`."""
    return _rules(config, heads, tokens=BODY + "tokens_embed.weight", positions=BODY + "positions_embed.weight")


SHARED = (
    Key("width", "n_embd", 768),
    Key("num_layers", "n_layer", 12),
    Key("num_heads", "n_head", 12),
    Key("norm_eps", "layer_norm_epsilon", 1e-5),
    Key("tie_embeddings", "tie_word_embeddings", True),
    Implied("use_bias", True),
    Key("dropout", "resid_pdrop", 0.1, free=True),
    Joint(lambda theirs: {}, lambda config: {"embd_pdrop": config.dropout}, free=True),  # ours has one rate for both; on reading that of the sublayers holds
    Key("attention_dropout", "attn_pdrop", 0.1, free=True),
    Key("init_std", "initializer_range", 0.02, free=True),
)
ALIASES = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
MASK = causal_mask(BODY + r"h\.\d+\.attn\.bias")

GPT2 = Family(
    model_type="gpt2",
    name="gpt",
    keys=(
        Key("vocab_size", "vocab_size", 50257),
        Key("max_length", "n_positions", 1024),
        Key("mlp_width", "n_inner", None, write=lambda config: config.mlp_width or 4 * config.width),
        Key("activation", "activation_function", "gelu_new", ACTIVATIONS),
        Key("scale_attention", "scale_attn_weights", True),
        Key("scale_by_layer", "scale_attn_by_inverse_layer_idx", False),
        Implied("prenorm", True),
        Fixed("add_cross_attention", False),
        *SHARED,
    ),
    aliases=ALIASES,
    rules=gpt2_rules,
    architectures=(
        Architecture("GPT2LMHeadModel", ("lm",), "transformer.", {"lm": "logits"}),
        Architecture("GPT2ForSequenceClassification", ("classify",), "transformer.", {"classify": "logits"}),
        Architecture("GPT2ForTokenClassification", ("tag",), "transformer.", {"tag": "logits"}),
        Architecture("GPT2ForQuestionAnswering", ("qa",), "transformer.", {"qa": "start_logits end_logits"}),
        Architecture("GPT2Model", (), "", {}),
    ),
    signs={"classify": "score.weight", "tag": "classifier.weight", "qa": "qa_outputs.weight"},
    ignored=(
        copy_of(r"lm_head\.weight", BODY + "wte.weight"),
        MASK,
        mask_value(BODY + r"h\.\d+\.attn\.masked_bias"),
    ),
    writes=lambda config: config.prenorm,
)

GPT = Family(
    model_type="openai-gpt",
    name="gpt",
    keys=(
        Key("vocab_size", "vocab_size", 40478),
        Key("max_length", "n_positions", 512),
        # The reference's gelu of this model is the tanh form.
        Key("activation", "afn", "gelu", {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}),
        Implied("prenorm", False),
        Implied("scale_attention", True),
        Implied("scale_by_layer", False),
        Implied("mlp_width", None),
        *SHARED,
    ),
    aliases=ALIASES,
    rules=gpt_rules,
    architectures=(
        Architecture("OpenAIGPTLMHeadModel", ("lm",), "transformer.", {"lm": "logits"}),
        Architecture("OpenAIGPTForSequenceClassification", ("classify",), "transformer.", {"classify": "logits"}),
        Architecture("OpenAIGPTModel", (), "", {}),
    ),
    signs={"classify": "score.weight"},
    ignored=(copy_of(r"lm_head\.weight", BODY + "tokens_embed.weight"), MASK, numbers(BODY + "position_ids")),
    writes=lambda config: not config.prenorm,
)
