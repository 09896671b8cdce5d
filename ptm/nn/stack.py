"""A stack of equal layers with stacked parameters, looped over or unrolled: the same parameters, the same numbers."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ptm.nn.block import Block, BlockConfig
from ptm.nn.context import Context
from ptm.nn.masks import Mask
from ptm.nn.norm import Norm
from ptm.nn.position import RelativeBias, RelativeConfig

POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


@flax.struct.dataclass
class Output:
    """What a model returns: the last hidden states, the cache after the call, the largest attention logit (None if no backend shows it)."""

    hidden_BLD: jax.Array
    cache: Any = None
    attention_max: jax.Array | None = None


class Stack(nn.Module):
    """`num_layers` blocks, a final norm where the blocks are pre-norm, and a bias by relative position where `relative` is given."""

    config: BlockConfig
    context: Context
    num_layers: int
    relative: RelativeConfig | None = None

    @nn.compact
    def __call__(self, x_BLD, *, mask: Mask, memory_BID=None, memory_mask: Mask | None = None, cache: Any = None, train: bool) -> Output:
        c, context = self.config, self.context
        bias_1HLT = None
        if self.relative is not None:
            bias_1HLT = RelativeBias(self.relative, c.num_heads, name="relative_bias")(x_BLD.shape[1], mask.key_segments_BT.shape[1], mask.offset)
        block = Block
        if context.remat != "none":
            # Inside a loop the compiler cannot merge the recomputation with the first pass, so its guard against that is not needed.
            block = nn.remat(Block, policy=POLICIES[context.remat], prevent_cse=not context.scan_layers)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.num_layers,
            unroll=1 if context.scan_layers else self.num_layers,
        )
        x_BLD, (cache, tops_N) = layers(c, context, train, name="layers")(x_BLD, cache, mask, bias_1HLT, memory_BID, memory_mask)
        if c.prenorm:
            x_BLD = Norm(c.norm, c.norm_eps, c.use_bias, name="final_norm")(x_BLD)
        return Output(hidden_BLD=x_BLD, cache=cache, attention_max=None if tops_N is None else jnp.max(tops_N))


def empty_cache(config: BlockConfig, context: Context, *, num_layers: int, rows: int, length: int) -> dict[str, jax.Array]:
    """Zero keys and values [N, B, T, H, K] for decoding up to `length` tokens."""
    shape = (num_layers, rows, length, config.num_heads, config.head_dim)
    return {name: jnp.zeros(shape, context.dtype) for name in ("key", "value")}
