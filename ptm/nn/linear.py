"""Affine maps over one or several dimensions."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ptm.nn.context import Context

PRODUCT = "product"  # name of what `compute.remat=dots` keeps for the backward pass


def contract(x: jax.Array, kernel: jax.Array, *, dims: int, context: Context, dtype: Any = None, named: bool = True) -> jax.Array:
    """The last `dims` dimensions of x against the first `dims` of the kernel, in the context's type; the result is of `dtype` if that is wider.

    It has the name PRODUCT, unless the caller gives it (`named=False`) to what becomes of it.
    """
    x, kernel, dtype = x.astype(context.dtype), kernel.astype(context.dtype), jnp.promote_types(context.dtype, dtype or context.dtype)
    if context.layout.mesh.size > 1:
        # Split over devices, rows and positions must stay apart.
        y = jax.lax.dot_general(x, kernel, ((tuple(range(x.ndim - dims, x.ndim)), tuple(range(dims))), ((), ())), preferred_element_type=dtype)
    else:
        # As plain matrices: with several leading dimensions XLA's CPU backend copies a transpose of the activations for the kernel's
        # gradient, element by element.
        inner = math.prod(kernel.shape[:dims])
        y = jnp.matmul(x.reshape(-1, inner), kernel.reshape(inner, -1), preferred_element_type=dtype)
        y = y.reshape(*x.shape[: x.ndim - dims], *kernel.shape[dims:])
    return checkpoint_name(y, PRODUCT) if named else y


class Linear(nn.Module):
    """Contracts the last len(`inputs`) dimensions of x with a kernel [*inputs, *outputs]; adds a bias [*outputs]. `dtype` and `named` as in `contract`."""

    context: Context
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float
    use_bias: bool = True
    dtype: Any = None
    named: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*self.inputs, *self.outputs), jnp.float32)
        path = "/".join((*self.path, "kernel"))
        kernel = self.context.layout.gathered(path, kernel.astype(self.context.dtype))
        y = contract(self.context.scaled(x, path), kernel, dims=len(self.inputs), context=self.context, dtype=self.dtype, named=self.named)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32).astype(y.dtype)
        return y
