"""Where a token stands: T5's relative buckets. Learned absolute positions are an Embed table."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def relative_bucket(distance: jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int) -> jax.Array:
    """Bucket of a distance (key index - query index): exact up to a half, then logarithmic up to `max_distance` (Raffel et al. 2020, section 2.1)."""
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    # The epsilon keeps the logarithm of 0 away; those distances take the exact branch.
    ratio = jnp.log(distance.astype(jnp.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    log_bucket = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return bucket + jnp.where(distance < exact, distance, log_bucket)


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
    """Shape of a stack's relative positions and the standard deviation of their initial table."""

    num_buckets: int
    max_distance: int
    bidirectional: bool
    std: float


class RelativeBias(nn.Module):
    """A bias bias_1HLT added to attention logits by head and bucketed distance, shared by all layers of a stack."""

    config: RelativeConfig
    num_heads: int

    @nn.compact
    def __call__(self, length: int, keys: int, offset: jax.Array | int = 0) -> jax.Array:
        c = self.config
        table = self.param("embedding", nn.initializers.normal(c.std), (c.num_buckets, self.num_heads), jnp.float32)
        distance = jnp.arange(keys)[None, :] - (offset + jnp.arange(length))[:, None]
        bucket = relative_bucket(distance, bidirectional=c.bidirectional, num_buckets=c.num_buckets, max_distance=c.max_distance)
        return jnp.moveaxis(table[bucket], -1, 0)[None]
