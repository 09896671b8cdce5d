"""Tables that are looked up, and used again as the output projection where embeddings are tied."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context
from ptm.nn.linear import contract


class Embed(nn.Module):
    """A table [size, D]: `__call__` looks ids up, `attend` projects hidden states onto the rows."""

    context: Context
    size: int
    width: int
    std: float

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(self.std), (self.size, self.width), jnp.float32)

    @property
    def _leaf(self) -> str:
        return "/".join((*self.path, "embedding"))

    def _gathered(self, table_VD: jax.Array) -> jax.Array:
        return self.context.layout.gathered(self._leaf, table_VD)

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        x_BLD = self._gathered(self.embedding)[ids_BL]  # float32: so the gradient adds up all places of a piece
        return self.context.layout.constrain(x_BLD.astype(self.context.dtype), "batch", "residual_length", "residual")

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits [..., size] of hidden states [..., D]."""
        x = self.context.scaled(x, self._leaf)
        return contract(x, self._gathered(self.embedding.astype(self.context.dtype)).T, dims=1, context=self.context, dtype=self.context.logits)
