"""Where a token stands: T5's relative buckets and rotary positions. Learned absolute positions are an Embed table."""

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
    """A bias bias_BHLT added to attention logits by head and bucketed distance, shared by all layers of a stack."""

    config: RelativeConfig
    num_heads: int

    @nn.compact
    def __call__(self, query_index_BL: jax.Array, key_index_BT: jax.Array) -> jax.Array:
        c = self.config
        table = self.param("embedding", nn.initializers.normal(c.std), (c.num_buckets, self.num_heads), jnp.float32)
        distance_BLT = key_index_BT[:, None, :] - query_index_BL[:, :, None]
        bucket_BLT = relative_bucket(distance_BLT, bidirectional=c.bidirectional, num_buckets=c.num_buckets, max_distance=c.max_distance)
        return jnp.moveaxis(table[bucket_BLT], -1, 1)


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions (Su et al. 2021): base of the wavelengths, how many dimensions of a head turn, and how long contexts are reached.

    `factor` stretches all wavelengths (Chen et al. 2023). With `original_length` only the long ones are stretched: those longer than
    original_length / low_frequency whole, those shorter than original_length / high_frequency not at all (Dubey et al. 2024, Llama 3.1).
    """

    theta: float
    dim: int
    factor: float = 1.0
    original_length: int | None = None
    low_frequency: float = 1.0
    high_frequency: float = 4.0

    def frequencies(self) -> np.ndarray:
        """Angle per position of each pair of dimensions, [dim / 2]."""
        frequency = self.theta ** -(np.arange(0, self.dim, 2, dtype=np.float32) / self.dim)
        if self.original_length is None:
            return (frequency / self.factor).astype(np.float32)
        turns = self.original_length * frequency / (2 * np.pi)  # of a pair over the original context
        kept = np.clip((turns - self.low_frequency) / (self.high_frequency - self.low_frequency), 0, 1)
        return ((1 - kept) * frequency / self.factor + kept * frequency).astype(np.float32)


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array, config: RotaryConfig) -> jax.Array:
    """Heads turned by their positions: dimension n together with n + dim / 2; dimensions from `config.dim` on stay."""
    dtype = jnp.promote_types(x_BLHK.dtype, jnp.float32)
    angle_BL1F = positions_BL[:, :, None, None].astype(dtype) * config.frequencies()
    cos, sin = jnp.cos(angle_BL1F), jnp.sin(angle_BL1F)
    half = config.dim // 2
    first, second, rest = x_BLHK[..., :half].astype(dtype), x_BLHK[..., half : config.dim].astype(dtype), x_BLHK[..., config.dim :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
