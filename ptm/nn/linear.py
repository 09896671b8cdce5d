"""Affine maps over one or several dimensions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context


def contract(x: jax.Array, kernel: jax.Array, *, dims: int, context: Context) -> jax.Array:
    """The last `dims` dimensions of x against the first `dims` of the kernel, in the context's type."""
    x, kernel = x.astype(context.dtype), kernel.astype(context.dtype)
    if context.layout.mesh.size > 1:
        # Split over devices, rows and positions must stay apart.
        return jax.lax.dot_general(x, kernel, ((tuple(range(x.ndim - dims, x.ndim)), tuple(range(dims))), ((), ())))
    # As plain matrices: with several leading dimensions XLA's CPU backend copies a transpose of the activations for the kernel's
    # gradient, element by element.
    inner = math.prod(kernel.shape[:dims])
    return (x.reshape(-1, inner) @ kernel.reshape(inner, -1)).reshape(*x.shape[: x.ndim - dims], *kernel.shape[dims:])


class Linear(nn.Module):
    """Contracts the last len(`inputs`) dimensions of x with a kernel [*inputs, *outputs]; adds a bias [*outputs]."""

    context: Context
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*self.inputs, *self.outputs), jnp.float32)
        y = contract(x, kernel, dims=len(self.inputs), context=self.context)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32).astype(self.context.dtype)
        return y
