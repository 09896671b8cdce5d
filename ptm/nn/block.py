"""One layer of a Transformer: attention, optional cross-attention, feed-forward, each with its residual and norm."""

import flax.linen as nn
import jax.numpy as jnp

from ptm.nn.attention import Attention
from ptm.nn.context import Context
from ptm.nn.dropout import Dropout
from ptm.nn.masks import Mask
from ptm.nn.mlp import MLP
from ptm.nn.norm import Norm
from ptm.nn.shape import BlockConfig, LayerKind


class Block(nn.Module):
    """x_BLD -> x_BLD. `memory_BID` is what cross-attention reads, or its keys and values (None: it is left out); `cache` is this layer's, `index` its number.

    Also gives the cache, the largest logit and, where `maps` asks for them, the weights of attention and cross-attention.
    """

    config: BlockConfig
    context: Context
    kind: LayerKind
    train: bool
    maps: bool = False

    @nn.compact
    def __call__(self, x_BLD, cache, index, mask: Mask, bias_BHLT, positions_BL, memory_BID, memory_mask: Mask | None):
        c, context, kind = self.config, self.context, self.kind
        tops, maps = [], {"attention": None, "cross_attention": None}

        def norm(name):
            return Norm(c.norm, c.norm_eps, "norm" in c.biases, name=name)

        def dropped(y):
            y = Dropout(c.dropout, deterministic=not self.train)(y)
            return context.layout.constrain(y, "batch", "residual_length", "residual")

        def sublayer(x, name, function):
            if not c.prenorm:
                return norm(name)(x + dropped(function(x)))
            return x + dropped(function(norm(name)(x) if name != "attention_norm" or kind.attention_norm else x))

        def self_attention(x):
            nonlocal cache
            rotary = kind.rotary or c.rotary
            y, cache, top, maps["attention"] = Attention(c, context, rotary=rotary, maps=self.maps, name="attention")(
                x, x, mask=mask.replace(window=kind.window), bias_BHLT=bias_BHLT, positions_BL=positions_BL, cache=cache, index=index, train=self.train
            )
            tops.append(top)
            return y

        def cross_attention(x):
            attention = Attention(c, context, rotary=None, maps=self.maps, name="cross_attention")
            y, _, top, maps["cross_attention"] = attention(x, memory_BID, mask=memory_mask, index=index, train=self.train)
            tops.append(top)
            return y

        mlp = MLP(context, c.width, c.mlp_width, c.activation, c.gated, "mlp" in c.biases, c.mlp_dropout, c.mlp_in_std, c.mlp_out_std, name="mlp")
        if c.parallel:
            y_BLD = norm("attention_norm")(x_BLD)
            x_BLD = x_BLD + dropped(self_attention(y_BLD) + mlp(y_BLD, train=self.train))
        else:
            x_BLD = sublayer(x_BLD, "attention_norm", self_attention)
            if c.cross and memory_BID is not None:
                x_BLD = sublayer(x_BLD, "cross_attention_norm", cross_attention)
            x_BLD = sublayer(x_BLD, "mlp_norm", lambda x: mlp(x, train=self.train))
        seen = [top for top in tops if top is not None]
        return x_BLD, (cache, jnp.max(jnp.stack(seen)) if seen else None, maps["attention"], maps["cross_attention"])


class Memory(nn.Module):
    """What a block's cross-attention makes of `memory_BID`, with the block's parameters: keys and values as a cache holds them."""

    config: BlockConfig
    context: Context

    @nn.compact
    def __call__(self, memory_BID):
        return Attention(self.config, self.context, rotary=None, name="cross_attention")(None, memory_BID)
