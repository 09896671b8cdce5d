"""The families, and the pure functions of a model that everything above works with."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm import lora as lora_lib
from ptm import tree
from ptm.fields import ConfigError
from ptm.models import albert, bert, electra, encoder_decoder, gpt, llama, modernbert, t5, xlnet
from ptm.nn.context import Context
from ptm.nn.heads import COMMON_HEADS, split_head
from ptm.nn.layers import apart
from ptm.nn.readers import bilstm_flops
from ptm.nn.stack import Output


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of MODELS: the config dataclass, the module and the published sizes (overrides of the config)."""

    config: type
    module: type[nn.Module]
    sizes: dict[str, dict[str, Any]]


MODELS: dict[str, Family] = {
    "gpt": Family(gpt.Config, gpt.GPT, gpt.SIZES),
    "bert": Family(bert.BertConfig, bert.Bert, bert.SIZES),
    "roberta": Family(bert.RobertaConfig, bert.Bert, bert.ROBERTA_SIZES),
    "llama": Family(llama.Config, llama.Llama, llama.SIZES),
    "modernbert": Family(modernbert.Config, modernbert.ModernBert, modernbert.SIZES),
    "albert": Family(albert.Config, albert.Albert, albert.SIZES),
    "electra": Family(electra.Config, electra.Electra, electra.SIZES),
    "xlnet": Family(xlnet.Config, xlnet.XLNet, xlnet.SIZES),
    "t5": Family(t5.Config, t5.T5, t5.SIZES),
    "encoder_decoder": Family(encoder_decoder.Config, encoder_decoder.EncoderDecoder, encoder_decoder.SIZES),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A module as pure functions of its parameters (nested plain dicts).

    `lora` are the options of low-rank adaptation, whose factors are then among the parameters; `initial` has factors of initial values by path.
    `teacher` is the model that this one learns from, for the losses of distillation, `teacher_params` its parameters; a traced step is given them.
    """

    module: nn.Module
    lora: Any = None
    initial: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    teacher: "Model | None" = None
    teacher_params: Any = None

    @property
    def config(self) -> Any:
        return self.module.config

    def init(self, rng: jax.Array, lengths: dict[str, int]) -> dict[str, Any]:
        """Fresh parameters, float32, the factors of low-rank adaptation among them; `lengths` are the dimensions of a row."""
        batch = {name: jnp.ones((1, lengths["L"]), jnp.int32) for name in ("tokens_BL", "segments_BL")} | {"positions_BL": jnp.zeros((1, lengths["L"]), jnp.int32)}
        if "I" in lengths:
            batch |= {name: jnp.ones((1, lengths["I"]), jnp.int32) for name in ("inputs_BI", "input_segments_BI")}
        params = self.module.init(rng, batch, method="touch")["params"]
        if self.initial:
            params = tree.map_paths(lambda path, leaf: leaf * self.initial[path] if path in self.initial else leaf, params)
        return params if self.lora is None else {**params, lora_lib.KEY: lora_lib.init(rng, params, self.lora)}

    def merged(self, params: Any) -> tuple["Model", Any]:
        """The model without low-rank factors and the parameters that make it compute the same: for loops, which else merge them in each round."""
        return (self, params) if self.lora is None else (dataclasses.replace(self, lora=None), lora_lib.merge(params, self.lora))

    def _apply(self, params: Any, *args: Any, method: str | None = None, rng: jax.Array | None = None, **kwargs: Any) -> Any:
        _, params = self.merged(params)
        return self.module.apply({"params": params}, *args, method=method, rngs=None if rng is None else {"dropout": rng}, **kwargs)

    def hidden(
        self, params: Any, batch: dict[str, jax.Array], *, mask: str, head: str | None = None, train: bool = False, rng: jax.Array | None = None, **options: Any
    ) -> Output:
        """Last hidden states of a batch under a kind of mask; `rng` drives dropout when `train`.

        `head` is the one that will read them, for models of several encoders and for what stands between. `options` are those of the family: `cache` of decoders, `part` of
        ELECTRA, `states` for the hidden states of all layers, `maps` for the attention weights of all layers.
        """
        part = {} if head is None else self.module.part_for(head)
        readers = set() if head is None else self.module.readers(head)
        if "layer_mix" in readers:
            options["states"] = True
        out = self._apply(params, batch, mask=mask, train=train, rng=rng, **part, **options)
        return out.replace(hidden_BLD=self._apply(params, out, batch["segments_BL"], method="refine")) if readers else out

    def encode(self, params: Any, batch: dict[str, jax.Array], *, states: bool = False, maps: bool = False) -> Output:
        """Hidden states of an encoder-decoder's encoder."""
        return self._apply(params, batch, method="encode", states=states, maps=maps)

    def memory(self, params: Any, encoded: Output) -> tuple[dict[str, jax.Array], ...]:
        """Keys and values that an encoder-decoder's decoder makes of the encoder's hidden states, a layer each; `decode` takes them in their place."""
        return self._apply(params, encoded, method="memory")

    def decode(self, params: Any, batch: dict[str, jax.Array], encoded: Output | tuple, *, cache: Any = None, states: bool = False, maps: bool = False) -> Output:
        """Hidden states of an encoder-decoder's decoder."""
        return self._apply(params, batch, encoded, method="decode", cache=cache, states=states, maps=maps)

    def logits(self, params: Any, hidden: jax.Array, *, head: str, train: bool = False, rng: jax.Array | None = None) -> jax.Array:
        """Output of a head for hidden states [..., D]; `rng` drives dropout when `train`."""
        return self._apply(params, hidden, head, train, method="logits", rng=rng)

    def forward_flops(self, lengths: dict[str, int], positions: int, *, heads: tuple[str, ...]) -> float:
        """FLOPs of one row's forward pass through what `heads` need, with vocabulary logits at `positions` positions."""
        sizes = dict(map(split_head, heads))
        reading = bilstm_flops(width=self.config.width, num_layers=sizes["bilstm"], length=lengths["L"]) if "bilstm" in sizes else 0.0
        return self.module.forward_flops(lengths, positions, heads) + reading

    def for_decoding(self, params: Any) -> tuple["Model", Any]:
        """The model and its parameters as a loop over tokens wants them: merged, each layer of the decoder apart, so that no token copies any."""
        model, params = self.merged(params)

        def cut(node: dict[str, Any]) -> dict[str, Any]:
            return {name: apart(part) if name == "layers" else cut(part) if isinstance(part, dict) else part for name, part in node.items()}

        return model, {**params, "decoder": cut(params["decoder"])}

    def empty_cache(self, *, rows: int, length: int) -> Any:
        """A cache for decoding up to `length` tokens of `rows` rows."""
        return self.module.empty_cache(rows, length)


def make(config: Any, *, context: Context, heads: tuple[str, ...], lora: Any = None, initial: Mapping[str, float] | None = None) -> Model:
    """The model of a family's config with the heads that an objective declares, low-rank factors where `lora` (config.Lora) has a rank, and factors of initial values.

    Raises ConfigError for a head that it has not.
    """
    for head in heads:
        if split_head(head)[0] not in (*config.heads, *COMMON_HEADS):
            fitting = [name for name, family in MODELS.items() if split_head(head)[0] in family.config.heads]
            raise ConfigError(f"model {config.name} has no head {head}; it has {', '.join(config.heads)}. Families with it: {', '.join(fitting) or 'none'}.")
    module = MODELS[config.name].module(config=config, context=context, heads=heads)
    return Model(module, lora=None if lora is None or lora.rank is None else lora, initial=initial or {})
