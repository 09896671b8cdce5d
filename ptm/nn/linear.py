"""Affine maps over one or several dimensions."""

import math
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
        kernel = self.param("kernel", self.init(self.std), (*self.inputs, *self.outputs), jnp.float32).astype(self.context.dtype)
        count = len(self.inputs)
        x, lead = x.astype(self.context.dtype), x.shape[: x.ndim - count]
        if self.context.layout.mesh.size == 1:
            # As plain matrices: with several leading dimensions XLA's CPU backend transposes the activations for the kernel's gradient, which
            # took two thirds of a step. Split over devices, rows and positions must stay apart.
            y = (x.reshape(-1, math.prod(self.inputs)) @ kernel.reshape(math.prod(self.inputs), -1)).reshape(*lead, *self.outputs)
        else:
            y = jax.lax.dot_general(x, kernel, ((tuple(range(x.ndim - count, x.ndim)), tuple(range(count))), ((), ())))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32).astype(self.context.dtype)
        return y
