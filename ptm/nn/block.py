"""One layer of a Transformer: attention, optional cross-attention, feed-forward, each with its residual and norm."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ptm.nn.attention import Attention
from ptm.nn.context import Context
from ptm.nn.masks import Mask
from ptm.nn.mlp import MLP
from ptm.nn.norm import Norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Shape of a layer. `*_std` are standard deviations of the initialisation of kernels."""

    width: int
    num_heads: int
    head_dim: int
    mlp_width: int
    prenorm: bool
    norm: str = "layer"
    norm_eps: float
    use_bias: bool = True
    activation: str
    gated: bool = False
    cross: bool = False
    scale: float
    dropout: float = 0.0  # of each sublayer's output
    attention_dropout: float = 0.0  # of attention weights
    mlp_dropout: float = 0.0  # of the hidden layer of the feed-forward
    query_std: float
    key_std: float
    attention_out_std: float
    mlp_in_std: float
    mlp_out_std: float


class Block(nn.Module):
    """x_BLD -> x_BLD. `memory_BID` is what cross-attention reads; `cache` is this layer's slice of the stack's cache."""

    config: BlockConfig
    context: Context
    train: bool

    @nn.compact
    def __call__(self, x_BLD, cache, mask: Mask, bias_1HLT, memory_BID, memory_mask: Mask | None):
        c, context = self.config, self.context
        tops = []

        def attention(name: str) -> Attention:
            return Attention(
                context, c.width, c.num_heads, c.head_dim, c.scale, c.use_bias, c.attention_dropout, c.query_std, c.key_std, c.attention_out_std, name=name
            )

        def sublayer(x, name, function):
            norm = Norm(c.norm, c.norm_eps, c.use_bias, name=name)
            y = function(norm(x) if c.prenorm else x)
            y = nn.Dropout(c.dropout, deterministic=not self.train)(y)
            y = context.layout.constrain(y, "batch", "residual_length", "residual")
            return x + y if c.prenorm else norm(x + y)

        def self_attention(x):
            nonlocal cache
            y, cache, top = attention("attention")(x, x, mask=mask, bias_1HLT=bias_1HLT, cache=cache, train=self.train)
            tops.append(top)
            return y

        def cross_attention(x):
            y, _, top = attention("cross_attention")(x, memory_BID, mask=memory_mask, train=self.train)
            tops.append(top)
            return y

        mlp = MLP(context, c.width, c.mlp_width, c.activation, c.gated, c.use_bias, c.mlp_dropout, c.mlp_in_std, c.mlp_out_std, name="mlp")
        x_BLD = sublayer(x_BLD, "attention_norm", self_attention)
        if c.cross:
            x_BLD = sublayer(x_BLD, "cross_attention_norm", cross_attention)
        x_BLD = sublayer(x_BLD, "mlp_norm", lambda x: mlp(x, train=self.train))
        seen = [top for top in tops if top is not None]
        return x_BLD, (cache, jnp.max(jnp.stack(seen)) if seen else None)


def block_flops(config: BlockConfig, *, length: int, keys: int, memory: int = 0) -> float:
    """Multiply-adds x 2 of one layer's forward pass for one row: matrix products and attention over all keys (no discount for causal masks)."""
    heads = config.num_heads * config.head_dim
    projections = 2 * length * config.width * heads * 2 + 2 * keys * config.width * heads * 2
    attention = 2 * 2 * length * keys * heads
    feed_forward = 2 * length * config.width * config.mlp_width * (3 if config.gated else 2)
    cross = 0.0
    if config.cross:
        cross = 2 * length * config.width * heads * 2 + 2 * memory * config.width * heads * 2 + 2 * 2 * length * memory * heads
    return projections + attention + feed_forward + cross
