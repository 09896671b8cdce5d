"""Encoder-decoders of two models (model_type encoder-decoder): the tables of the sides, under `encoder.` and `decoder.`, and cross-attention."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ptm import tree
from ptm.fields import ConfigError
from ptm.hf import bert, transfer
from ptm.hf.bert import BERT
from ptm.hf.gpt import GPT2
from ptm.hf.roberta import ROBERTA
from ptm.hf.tables import BODY, Architecture, Family, Fixed, Ignored, Joint, Rule, conv, dense, flat, fused, named, norm
from ptm.models import encoder_decoder

DECODES = {"is_decoder": True, "add_cross_attention": True}

NO_IDS = {"bos_token_id": None, "eos_token_id": None}  # those of the whole count; the defaults may lie beyond the vocabulary


class Side(NamedTuple):
    """A decoder's table, class, prefix of its body, our head, and the rules of its cross-attention."""

    table: Family
    architecture: str
    prefix: str
    head: str
    cross: list[Rule]


def _gpt_cross() -> list[Rule]:
    layer, theirs = "decoder/layers/cross_attention", BODY + "h.{n}.crossattention"
    return [
        *dense(f"{layer}/query", f"{theirs}.q_attn", kernel=conv),
        Rule((f"{layer}/key/kernel", f"{layer}/value/kernel"), f"{theirs}.c_attn.weight", fused(conv(), axis=1)),
        Rule((f"{layer}/key/bias", f"{layer}/value/bias"), f"{theirs}.c_attn.bias", fused(flat, axis=0)),
        *dense(f"{layer}/out", f"{theirs}.c_proj", inputs=2, kernel=conv),
        *norm(f"{layer}_norm", BODY + "h.{n}.ln_cross_attn"),
    ]


def _bert_cross() -> list[Rule]:
    layer, theirs = f"{bert.LAYER}/cross_attention", f"{bert.THEIRS}.crossattention"
    maps = [rule for name in ("query", "key", "value") for rule in dense(f"{layer}/{name}", f"{theirs}.self.{name}")]
    return [*maps, *dense(f"{layer}/out", f"{theirs}.output.dense", inputs=2), *norm(f"{layer}_norm", f"{theirs}.output.LayerNorm")]


# By the name of our family.
DECODERS = {
    "bert": Side(BERT, "BertLMHeadModel", "bert.", "mlm", _bert_cross()),
    "roberta": Side(ROBERTA, "RobertaForCausalLM", "roberta.", "mlm", _bert_cross()),
    "gpt": Side(GPT2, "GPT2LMHeadModel", "transformer.", "lm", _gpt_cross()),
}
ENCODERS = {name: side.table for name, side in DECODERS.items() if name != "gpt"}


def _moved(rule: Rule, side: str, prefix: str) -> Rule:
    """A rule of a model, for that model as a side."""

    def below(name: str) -> str:
        return f"{side}.{named(name, prefix)}"

    ours = tuple(f"{side}/{path}" for path in rule.paths)
    return dataclasses.replace(rule, ours=ours if len(ours) > 1 else ours[0], theirs=below(rule.theirs), copies=tuple(map(below, rule.copies)))


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of both sides and of the head `lm`, which is that of the decoder's model."""
    encoder, decoder = config.side("encoder"), config.side("decoder")
    side = DECODERS[decoder.name]
    found = [_moved(rule, "encoder", "") for rule in ENCODERS[encoder.name].rules(encoder, ())]
    own = side.table.rules(decoder, (side.head,) if "lm" in heads else ())
    return found + [_moved(rule, "decoder", side.prefix) for rule in (*own, *side.cross)]


def _ignored() -> tuple[Ignored, ...]:
    """What the sides' own tables ignore, below the sides."""

    def moved(entry: Ignored, side: str, prefix: str) -> Ignored:
        def check(array: Any, read: Callable[[str], Any]) -> bool:
            return entry.check(array, lambda name: read(f"{side}.{named(name, prefix)}"))

        return Ignored(rf"{side}\.{named(entry.pattern, re.escape(prefix))}", entry.what, check)

    found = [moved(entry, "encoder", "") for table in ENCODERS.values() for entry in table.ignored]
    found += [moved(entry, "decoder", side.prefix) for side in DECODERS.values() for entry in side.table.ignored]
    return (*found, Ignored(r"encoder\.pooler\.dense\.(weight|bias)", "a pooler", lambda array, read: True))


def _pooler(config: Any) -> dict[str, tuple[int, ...]]:
    width = config.parts["encoder"].width
    return {"encoder.pooler.dense.weight": (width, width), "encoder.pooler.dense.bias": (width,)}


def _read_side(theirs: Mapping[str, Any], name: str, tables: Mapping[str, Family], given: Mapping[str, Any]) -> Any:
    if not isinstance(theirs.get(name), Mapping):
        raise ConfigError(f"{name} is missing")
    side = theirs[name]
    known = {table.model_type: table for table in tables.values()}
    if side.get("model_type") not in known:
        raise ConfigError(f"{name}.model_type={side.get('model_type')!r} is not supported; supported: {', '.join(known)}")
    if wrong := [f"{name}.{key}={side.get(key, False)!r}" for key, value in given.items() if side.get(key, False) != value]:
        raise ConfigError(f"{', '.join(wrong)} is not supported; supported: {given}")
    table = known[side["model_type"]]
    keys = tuple(key for key in table.keys if not isinstance(key, Fixed) or key.theirs not in DECODES)
    config, problems = transfer.read_config(dataclasses.replace(table, keys=keys), side)
    if config is None:
        raise ConfigError("; ".join(f"{name}: {problem.removeprefix('config').strip()}" for problem in problems))
    return config


def _read(theirs: Mapping[str, Any]) -> dict[str, Any]:
    encoder = _read_side(theirs, "encoder", ENCODERS, dict.fromkeys(DECODES, False))
    decoder = _read_side(theirs, "decoder", {name: side.table for name, side in DECODERS.items()}, DECODES)
    if encoder.vocab_size != decoder.vocab_size:
        raise ConfigError(f"encoder.vocab_size={encoder.vocab_size} and decoder.vocab_size={decoder.vocab_size} are not supported; supported: equal ones")
    parts = {name: dataclasses.replace(part, vocab_size=None) for name, part in (("encoder", encoder), ("decoder", decoder))}
    return {"parts": parts, "vocab_size": encoder.vocab_size, "share": False}


def _write(config: Any) -> dict[str, Any]:
    if config.share:
        raise ConfigError("model.share=true has no counterpart; there is: false, with the parameters of both sides equal")
    side = DECODERS[config.parts["decoder"].name]
    encoder = transfer.write_config(ENCODERS[config.parts["encoder"].name], config.side("encoder"), ())
    decoder = transfer.write_config(side.table, config.side("decoder"), (side.head,))
    return {"encoder": {**encoder, "is_decoder": False}, "decoder": {**decoder, **DECODES, **NO_IDS, "architectures": [side.architecture]}}


def unshared(config: Any, params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config and parameters without shared ones that compute the same: the encoder's are a copy."""
    if not config.share:
        return config, dict(params)
    drop = ("cross_attention", "mlm_head/")
    encoder = {path: leaf for path, leaf in tree.paths(params["decoder"]).items() if not any(part in path for part in drop)}
    return dataclasses.replace(config, share=False), {**params, "encoder": tree.unflatten(encoder)}


ENCODER_DECODER = Family(
    model_type="encoder-decoder",
    name=encoder_decoder.Config.name,
    keys=(Joint(_read, _write), Fixed("is_encoder_decoder", True, written=True), Fixed("tie_encoder_decoder", False)),
    rules=rules,
    architectures=(Architecture("EncoderDecoderModel", ("lm",), "", {"lm": "logits"}),),
    ignored=_ignored(),
    unused=_pooler,
)
