"""Small networks on top of hidden states."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context
from ptm.nn.embed import Embed
from ptm.nn.linear import Linear
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.norm import Norm


class MLMHead(nn.Module):
    """Dense, activation, norm, projection on the token table, bias (Devlin et al. 2019, published code)."""

    context: Context
    width: int
    vocab_size: int
    activation: str
    norm_eps: float
    std: float

    @nn.compact
    def __call__(self, hidden: jax.Array, table: Embed) -> jax.Array:
        y = Linear(self.context, (self.width,), (self.width,), self.std, name="dense")(hidden)
        y = Norm("layer", self.norm_eps, name="norm")(ACTIVATIONS[self.activation](y))
        return table.attend(y) + self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32).astype(self.context.dtype)


class Pooler(nn.Module):
    """tanh(dense(first position)): BERT's summary of a row."""

    context: Context
    width: int
    std: float

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        return jnp.tanh(Linear(self.context, (self.width,), (self.width,), self.std, name="dense")(hidden_BLD[:, 0]))
