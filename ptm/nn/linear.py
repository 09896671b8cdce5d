"""Affine maps over one or several dimensions."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context


class Linear(nn.Module):
    """Contracts the last len(`inputs`) dimensions of x with a kernel [*inputs, *outputs]; adds a bias [*outputs]."""

    context: Context
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float
    use_bias: bool = True
    init: Callable = nn.initializers.normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.init(self.std), (*self.inputs, *self.outputs), jnp.float32)
        contracted = len(self.inputs)
        x_dims = tuple(range(x.ndim - contracted, x.ndim))
        y = jax.lax.dot_general(x.astype(self.context.dtype), kernel.astype(self.context.dtype), ((x_dims, tuple(range(contracted))), ((), ())))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32).astype(self.context.dtype)
        return y
