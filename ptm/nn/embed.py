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

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        layout = self.context.layout
        # Gathering from a table split over its width would make the partitioner replicate the result: bring the width together first.
        table_VD = layout.constrain(self.embedding, "vocab", None)
        return layout.constrain(table_VD[ids_BL].astype(self.context.dtype), "batch", "residual_length", "residual")

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits [..., size], float32, of hidden states [..., D]."""
        table_VD = self.context.layout.constrain(self.embedding, "vocab", None)
        return contract(x, table_VD.T, dims=1, context=self.context, dtype=jnp.float32)
