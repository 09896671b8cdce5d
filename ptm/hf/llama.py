"""Llama, Mistral, Qwen 2 and Qwen 3: four model_types of one family of ours, which differ in biases, norms of heads, and windows."""

from collections.abc import Mapping
from typing import Any

from ptm.fields import ConfigError
from ptm.hf.gpt import head_rules
from ptm.hf.tables import ACTIVATIONS, BODY, Architecture, Family, Implied, Joint, Key, Rule, copy_of, dense, norm

LAYER, THEIRS = "decoder/layers", BODY + "layers.{n}"


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of the body and of the heads `lm`, `classify:N`, `tag:N`, `qa`."""
    qkv, attention = {"bias": config.qkv_bias}, f"{LAYER}/attention"
    found = [
        Rule("token_embed/embedding", BODY + "embed_tokens.weight"),
        *dense(f"{attention}/query", f"{THEIRS}.self_attn.q_proj", **qkv),
        *dense(f"{attention}/key", f"{THEIRS}.self_attn.k_proj", **qkv),
        *dense(f"{attention}/value", f"{THEIRS}.self_attn.v_proj", **qkv),
        *dense(f"{attention}/out", f"{THEIRS}.self_attn.o_proj", inputs=2, bias=config.out_bias),
        *norm(f"{LAYER}/attention_norm", f"{THEIRS}.input_layernorm", bias=False),
        *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.post_attention_layernorm", bias=False),
        *dense(f"{LAYER}/mlp/gate", f"{THEIRS}.mlp.gate_proj", bias=config.mlp_bias),
        *dense(f"{LAYER}/mlp/wi", f"{THEIRS}.mlp.up_proj", bias=config.mlp_bias),
        *dense(f"{LAYER}/mlp/wo", f"{THEIRS}.mlp.down_proj", bias=config.mlp_bias),
        *norm("decoder/final_norm", BODY + "norm", bias=False),
    ]
    if config.qk_norm:
        found += norm(f"{attention}/query_rms", f"{THEIRS}.self_attn.q_norm", bias=False) + norm(f"{attention}/key_rms", f"{THEIRS}.self_attn.k_norm", bias=False)
    return found + head_rules(config, heads, tag="score")


# Kinds of rotary positions that are read, with the keys that each must have.
NEEDED = {"default": (), "linear": ("factor",), "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")}


def _read_rotary(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """New configs say everything in rope_parameters; older ones in rope_theta and rope_scaling, which counts where both are there."""
    given = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    theta = given.get("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in NEEDED:
        raise ConfigError(f"rope_type={kind!r} is not supported; supported: {', '.join(NEEDED)}")
    if missing := [key for key in NEEDED[kind] if key not in given]:
        raise ConfigError(f"rope_parameters of rope_type {kind} lacks {', '.join(missing)}")
    share = given.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    unknown = set(given) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *NEEDED["llama3"]}
    if share != 1.0 or unknown:
        what = ", ".join(sorted(unknown)) or f"partial_rotary_factor={share!r}"
        raise ConfigError(f"{what} of rope_parameters is not supported; supported: rope_theta, {', '.join(NEEDED['llama3'])}")
    if kind == "default":
        return {"rotary_theta": float(theta)}
    if kind == "linear":
        return {"rotary_theta": float(theta), "rotary_factor": float(given["factor"])}
    return {
        "rotary_theta": float(theta), "rotary_factor": float(given["factor"]), "rotary_original_length": int(given["original_max_position_embeddings"]),
        "rotary_low": float(given["low_freq_factor"]), "rotary_high": float(given["high_freq_factor"]),
    }  # fmt: skip


def _write_rotary(config: Any) -> dict[str, Any]:
    """In the new form and in the older one, which earlier versions of the reference library read."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rotary_original_length is not None:
        scaling = {
            "rope_type": "llama3", "factor": config.rotary_factor, "original_max_position_embeddings": config.rotary_original_length,
            "low_freq_factor": config.rotary_low, "high_freq_factor": config.rotary_high,
        }  # fmt: skip
    elif config.rotary_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": config.rotary_factor}
    older = {} if scaling["rope_type"] == "default" else {"rope_scaling": scaling}
    return {"rope_parameters": {**scaling, "rope_theta": config.rotary_theta}, "rope_theta": config.rotary_theta, **older}


def _read_windows(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's layers from max_window_layers on have windows, unless layer_types says which."""
    if not theirs.get("use_sliding_window", False) or theirs.get("sliding_window", 4096) is None:
        if "sliding_attention" in (theirs.get("layer_types") or ()):
            raise ConfigError("layer_types has sliding_attention while use_sliding_window is false")
        return {"window": None}
    window, layers = theirs.get("sliding_window", 4096), theirs.get("num_hidden_layers", 32)
    default = ["sliding_attention" if n >= theirs.get("max_window_layers", 28) else "full_attention" for n in range(layers)]
    local = [kind == "sliding_attention" for kind in theirs.get("layer_types") or default]
    if len(local) != layers:
        raise ConfigError(f"layer_types names {len(local)} layers, num_hidden_layers={layers}")
    if not any(local):
        return {"window": None}
    first = local.index(True)
    full = [n for n in range(first, layers) if not local[n]]
    every = full[0] + 1 if full else None
    if local != [n >= first and (every is None or (n + 1) % every != 0) for n in range(layers)]:
        raise ConfigError(f"layer_types={theirs['layer_types']} is not supported; supported: sliding_attention from a layer on, but for every n-th")
    return {"window": window, "window_from": first, "global_every": every}


def _write_windows(config: Any) -> dict[str, Any]:
    local = [kind.window is not None for kind in config.kinds()] or [False] * config.num_layers
    return {
        "use_sliding_window": any(local), "sliding_window": config.window, "max_window_layers": config.window_from if any(local) else config.num_layers,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in local],
    }  # fmt: skip


def _family(model_type: str, prefix: str, *keys: Any, writes: Any) -> Family:
    return Family(
        model_type=model_type,
        name="llama",
        keys=(
            Key("width", "hidden_size", 4096),
            Key("num_layers", "num_hidden_layers", 32),
            Key("num_heads", "num_attention_heads", 32),
            Key("activation", "hidden_act", "silu", ACTIVATIONS),
            Key("norm_eps", "rms_norm_eps", 1e-6),
            Key("tie_embeddings", "tie_word_embeddings", False),
            Key("attention_dropout", "attention_dropout", 0.0, free=True),
            Key("init_std", "initializer_range", 0.02, free=True),
            Joint(_read_rotary, _write_rotary),
            Implied("norm", "rms"),
            Implied("norm_bias", False),
            Implied("gated", True),
            Implied("parallel", False),
            Implied("rotary_share", 1.0),
            *keys,
        ),
        rules=rules,
        architectures=(
            Architecture(f"{prefix}ForCausalLM", ("lm",), "model.", {"lm": "logits"}),
            Architecture(f"{prefix}ForSequenceClassification", ("classify",), "model.", {"classify": "logits"}),
            Architecture(f"{prefix}ForTokenClassification", ("tag",), "model.", {"tag": "logits"}),
            Architecture(f"{prefix}ForQuestionAnswering", ("qa",), "transformer.", {"qa": "start_logits end_logits"}),
            Architecture(f"{prefix}Model", (), "", {}),
        ),
        signs={"classify": "score.weight", "tag": "score.weight", "qa": "qa_outputs.weight"},
        ignored=(copy_of(r"lm_head\.weight", BODY + "embed_tokens.weight"),),
        writes=writes,
    )


def _kv_heads(default: int | None) -> Key:
    return Key("num_kv_heads", "num_key_value_heads", default, write=lambda config: config.num_kv_heads or config.num_heads)


def _head_dim(default: int | None) -> Key:
    return Key("head_dim", "head_dim", default, write=lambda config: config.head_dim or config.width // config.num_heads)


def _write_attention_bias(config: Any) -> dict[str, Any]:
    if config.qkv_bias != config.out_bias:
        raise ConfigError(f"model.qkv_bias={config.qkv_bias} and model.out_bias={config.out_bias} have no counterpart; they must be equal")
    return {"attention_bias": config.qkv_bias}


def _read_attention_bias(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("qkv_bias", "out_bias"), theirs.get("attention_bias", False))


ATTENTION_BIAS = Joint(_read_attention_bias, _write_attention_bias)
NO_WINDOW = (Implied("window", None), Implied("window_from", 0), Implied("global_every", None))


def _plain(config: Any) -> bool:
    """No biases at all."""
    return not (config.qkv_bias or config.out_bias or config.mlp_bias)


QWEN3 = _family(
    "qwen3", "Qwen3", Key("vocab_size", "vocab_size", 151936), Key("mlp_width", "intermediate_size", 22016),
    Key("max_length", "max_position_embeddings", 32768), _kv_heads(32), _head_dim(128), Implied("qk_norm", True), ATTENTION_BIAS,
    Implied("mlp_bias", False), Joint(_read_windows, _write_windows),
    writes=lambda config: config.qk_norm,
)  # fmt: skip
MISTRAL = _family(
    "mistral", "Mistral", Key("vocab_size", "vocab_size", 32000), Key("mlp_width", "intermediate_size", 14336),
    Key("max_length", "max_position_embeddings", 131072), _kv_heads(8), _head_dim(None), Implied("qk_norm", False), Implied("qkv_bias", False),
    Implied("out_bias", False), Implied("mlp_bias", False), Key("window", "sliding_window", 4096), *NO_WINDOW[1:],
    writes=lambda config: config.window is not None and not config.window_from and config.global_every is None and _plain(config),
)  # fmt: skip
QWEN2 = _family(
    "qwen2", "Qwen2", Key("vocab_size", "vocab_size", 151936), Key("mlp_width", "intermediate_size", 22016),
    Key("max_length", "max_position_embeddings", 32768), _kv_heads(32), _head_dim(None), Implied("qk_norm", False), Implied("qkv_bias", True),
    Implied("out_bias", False), Implied("mlp_bias", False), Joint(_read_windows, _write_windows),
    writes=lambda config: config.qkv_bias and not config.out_bias,
)  # fmt: skip
LLAMA = _family(
    "llama", "Llama", Key("vocab_size", "vocab_size", 32000), Key("mlp_width", "intermediate_size", 11008),
    Key("max_length", "max_position_embeddings", 2048), _kv_heads(None), _head_dim(None), Implied("qk_norm", False), ATTENTION_BIAS,
    Key("mlp_bias", "mlp_bias", False), *NO_WINDOW,
    writes=lambda config: True,
)  # fmt: skip
