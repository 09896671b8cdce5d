"""Normalisation, computed in float32 at least and returned in the type of the input."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps) * scale
        if self.use_bias and self.kind == "layer":
            y = y + self.param("bias", nn.initializers.zeros, width, jnp.float32)
        return y.astype(x.dtype)
