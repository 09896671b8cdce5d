"""A stack of Transformer layers with what surrounds them: relative bias, final norm, cache."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ptm.nn.attention import heads_first
from ptm.nn.block import Block, Memory
from ptm.nn.context import Context
from ptm.nn.layers import Sharing, apart, run_apart, run_layers, stacked_params
from ptm.nn.masks import Mask
from ptm.nn.norm import Norm
from ptm.nn.position import RelativeBias, RelativeConfig
from ptm.nn.shape import BlockConfig, LayerKind


@flax.struct.dataclass
class Output:
    """What a model returns.

    hidden_BLD: the last hidden states; cache: after the call; attention_max: the largest attention logit (None if no backend shows it);
    states_NBLD: where asked for, the stack's input and the hidden states after each layer, the last after the final norm;
    query_BSD: XLNet's query stream at the selected positions; maps_NBHLT and cross_maps_NBHLT: where asked for, the weights of every layer's
    attention and cross-attention, float32, those of a query summing to 1.
    """

    hidden_BLD: jax.Array
    cache: Any = None
    attention_max: jax.Array | None = None
    states_NBLD: jax.Array | None = None
    query_BSD: jax.Array | None = None
    maps_NBHLT: jax.Array | None = None
    cross_maps_NBHLT: jax.Array | None = None


class Stack(nn.Module):
    """`num_layers` blocks, a final norm where the blocks are pre-norm, and a bias by relative position where `relative` is given.

    `kinds` says what is static of each layer (empty: all alike), `sharing` which layers have parameters in common.
    """

    config: BlockConfig
    context: Context
    num_layers: int
    relative: RelativeConfig | None = None
    kinds: tuple[LayerKind, ...] = ()
    sharing: Sharing | None = None

    @nn.compact
    def __call__(
        self, x_BLD, *, mask: Mask, positions_BL=None, memory_BID=None, memory_mask: Mask | None = None, cache: Any = None, states: bool = False,
        maps: bool = False, train: bool,
    ) -> Output:  # fmt: skip
        c, context = self.config, self.context
        kinds = self.kinds or (LayerKind(),) * self.num_layers
        assert len(kinds) == self.num_layers
        bias_BHLT = None
        if self.relative is not None:
            bias_BHLT = RelativeBias(self.relative, c.num_heads, name="relative_bias")(*mask.indices())

        def block(kind: LayerKind, context: Context = context) -> Block:
            return Block(c, context, kind, train, maps, parent=None)

        def make(rng: jax.Array) -> Any:
            # Layers that now encode and now decode are made whole, whichever comes first. Parameters are drawn for all layers at once, and fused kernels
            # of attention cannot be mapped over layers.
            memory = (x_BLD, mask) if c.cross and memory_BID is None else (memory_BID, memory_mask)
            return block(kinds[-1], dataclasses.replace(context, attention="xla")).init({"params": rng, "dropout": rng}, x_BLD, None, 0, mask, bias_BHLT, positions_BL, *memory)["params"]

        def apply(kind: LayerKind, params: Any, x_BLD: jax.Array, item: Any, index: Any, rng: jax.Array | None) -> tuple[jax.Array, Any]:
            rngs = None if rng is None else {"dropout": rng}
            cache, memory = (None, memory_BID) if item is None else item
            x_BLD, out = block(kind).apply({"params": params}, x_BLD, cache, index, mask, bias_BHLT, positions_BL, memory, memory_mask, rngs=rngs)
            return x_BLD, (*out, x_BLD if states else None)

        params = stacked_params(self, make, num_layers=self.num_layers, sharing=self.sharing)
        rng = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        start_BLD = x_BLD
        if cache is None and not isinstance(params, tuple):
            x_BLD, outputs = run_layers(apply, params, x_BLD, None, kinds=kinds, context=context, sharing=self.sharing, rng=rng)
        else:
            memories = memory_BID if isinstance(memory_BID, tuple) else (memory_BID,) * self.num_layers
            caches = (None,) * self.num_layers if cache is None else cache
            x_BLD, outputs = run_apart(apply, apart(params), x_BLD, list(zip(caches, memories)), kinds=kinds)
            cache = None if cache is None else tuple(out[0] for out in outputs)
            outputs = jax.tree.map(lambda *parts: jnp.stack(parts), *((None, *out[1:]) for out in outputs))
        _, tops_N, maps_NBHLT, cross_maps_NBHLT, states_NBLD = outputs
        if c.prenorm:
            # As an array: XLA on TPUs would else compute it again within each product of the vocabulary's logits.
            x_BLD = jax.lax.optimization_barrier(Norm(c.norm, c.norm_eps, "norm" in c.biases, name="final_norm")(x_BLD))
        if states:
            states_NBLD = jnp.concatenate([start_BLD[None], states_NBLD[:-1], x_BLD[None]])
        return Output(
            hidden_BLD=x_BLD, cache=cache, attention_max=None if tops_N is None else jnp.max(tops_N), states_NBLD=states_NBLD,
            maps_NBHLT=maps_NBHLT, cross_maps_NBHLT=cross_maps_NBHLT,
        )  # fmt: skip

    def memory(self, memory_BID: jax.Array) -> tuple[dict[str, jax.Array], ...]:
        """Keys and values of each layer's cross-attention, which decoding reads again for every token."""
        block = Memory(self.config, self.context, parent=None)
        return tuple(block.apply({"params": params}, memory_BID) for params in apart(self.get_variable("params", "layers")))


def empty_cache(config: BlockConfig, context: Context, *, num_layers: int, rows: int, length: int) -> tuple[dict[str, jax.Array], ...]:
    """Zero keys and values of each layer for decoding up to `length` tokens, as `Attention` holds them."""
    zeros_BTHK = jnp.zeros((rows, length, config.num_kv_heads or config.num_heads, config.head_dim), context.dtype)
    held = heads_first(zeros_BTHK, joined=context.layout.mesh.size == 1)
    return tuple(dict.fromkeys(("key", "value"), held) for _ in range(num_layers))
