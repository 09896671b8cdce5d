"""Normalisation, computed in float32 at least and returned in the type of the input."""

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_jvp
def settled(x: jax.Array) -> jax.Array:
    """x, whose gradient is an array of its own before anything is made of it.

    XLA on TPUs would make the sums of a norm's backward pass within the matrix product that the gradient comes from, which takes longer than both apart.
    """
    return x


@settled.defjvp
def _settled_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], jax.lax.optimization_barrier(tangents[0])


class Norm(nn.Module):
    """Layer norm (Ba et al. 2016) or RMS norm (Zhang and Sennrich 2019) over the last dimension."""

    kind: str  # layer or rms
    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width, jnp.float32)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(y, axis=-1, keepdims=True) if self.kind == "layer" else 0.0
        if self.kind == "layer" and y.dtype != x.dtype:
            # Both moments in one pass. A mean so large that the difference loses digits of float32 has long taken more from an input of half of them.
            variance = jnp.maximum(jnp.mean(jnp.square(y), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
        else:
            variance = jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps) * scale
        if self.use_bias and self.kind == "layer":
            y = y + self.param("bias", nn.initializers.zeros, width, jnp.float32)
        return settled(y.astype(x.dtype))
