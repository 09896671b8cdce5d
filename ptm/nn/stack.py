"""A stack of Transformer layers with what surrounds them: relative bias, final norm, cache."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ptm.nn.block import Block
from ptm.nn.context import Context
from ptm.nn.layers import Sharing, run_layers, stacked_params
from ptm.nn.masks import Mask
from ptm.nn.norm import Norm
from ptm.nn.position import RelativeBias, RelativeConfig
from ptm.nn.shape import BlockConfig, LayerKind


@flax.struct.dataclass
class Output:
    """What a model returns.

    hidden_BLD: the last hidden states; cache: after the call; attention_max: the largest attention logit (None if no backend shows it);
    states_NBLD: where asked for, the stack's input and the hidden states after each layer, the last after the final norm;
    query_BSD: XLNet's query stream at the selected positions.
    """

    hidden_BLD: jax.Array
    cache: Any = None
    attention_max: jax.Array | None = None
    states_NBLD: jax.Array | None = None
    query_BSD: jax.Array | None = None


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
        self, x_BLD, *, mask: Mask, positions_BL=None, memory_BID=None, memory_mask: Mask | None = None, cache: Any = None, states: bool = False, train: bool
    ) -> Output:
        c, context = self.config, self.context
        kinds = self.kinds or (LayerKind(),) * self.num_layers
        assert len(kinds) == self.num_layers
        bias_1HLT = None
        if self.relative is not None:
            bias_1HLT = RelativeBias(self.relative, c.num_heads, name="relative_bias")(x_BLD.shape[1], mask.key_segments_BT.shape[1], mask.offset)
        arguments = (mask, bias_1HLT, positions_BL, memory_BID, memory_mask)

        def block(kind: LayerKind) -> Block:
            return Block(c, context, kind, train, parent=None)

        def make(rng: jax.Array) -> Any:
            first = jax.tree.map(lambda leaf: leaf[0], cache)
            return block(kinds[-1]).init({"params": rng, "dropout": rng}, x_BLD, first, 0, *arguments)["params"]

        def apply(kind: LayerKind, params: Any, x_BLD: jax.Array, cache: Any, index: Any, rng: jax.Array | None) -> tuple[jax.Array, Any]:
            rngs = None if rng is None else {"dropout": rng}
            x_BLD, out = block(kind).apply({"params": params}, x_BLD, cache, index, *arguments, rngs=rngs)
            return x_BLD, (*out, x_BLD if states else None)

        params = stacked_params(self, make, num_layers=self.num_layers, sharing=self.sharing)
        rng = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        start_BLD = x_BLD
        x_BLD, (cache, tops_N, states_NBLD) = run_layers(apply, params, x_BLD, cache, kinds=kinds, context=context, sharing=self.sharing, rng=rng)
        if c.prenorm:
            x_BLD = Norm(c.norm, c.norm_eps, "norm" in c.biases, name="final_norm")(x_BLD)
        if states:
            states_NBLD = jnp.concatenate([start_BLD[None], states_NBLD[:-1], x_BLD[None]])
        return Output(hidden_BLD=x_BLD, cache=cache, attention_max=None if tops_N is None else jnp.max(tops_N), states_NBLD=states_NBLD)


def empty_cache(config: BlockConfig, context: Context, *, num_layers: int, rows: int, length: int) -> dict[str, jax.Array]:
    """Zero keys and values [N, B, T, H, K] for decoding up to `length` tokens."""
    shape = (num_layers, rows, length, config.num_kv_heads or config.num_heads, config.head_dim)
    return {name: jnp.zeros(shape, context.dtype) for name in ("key", "value")}
