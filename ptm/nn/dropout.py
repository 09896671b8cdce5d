"""Dropout (Srivastava et al. 2014), with random bits that a CPU makes as fast as an accelerator does.

jax's Threefry-2x32 is a loop over arrays on CPU: at 0.1 it takes a fifth of a T5's training step. Written out, the rounds become one pass together with what
uses the bits. The numbers are those of `jax.random.bernoulli`, whatever makes them.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), table 2 and section 4: rotations of four rounds in turn, and the parity of the key.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ROUNDS = 20


def threefry(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds of a key and counters, all uint32."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(_ROUNDS // 4):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << jnp.uint32(turn) | y >> jnp.uint32(32 - turn))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def _written_out(rng: jax.Array, share: float, shape: tuple[int, ...]) -> jax.Array:
    """What `jax.random.bernoulli` gives for a Threefry key: element n is decided by the upper 23 bits of block n, its halves combined."""
    first, second = jax.random.key_data(rng)
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(range(len(shape))):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
        stride *= shape[dim]
    x, y = threefry((first, second), (jnp.uint32(0), place))
    # A uniform number of 23 bits is below the share, a float32, where the bits are below this.
    return (x ^ y) >> jnp.uint32(9) < jnp.uint32(math.ceil(float(np.float32(share)) * 2**23))


def bernoulli(rng: jax.Array, share: float, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bernoulli(rng, share, shape)`: booleans, true with a probability of `share`."""

    def library(rng: jax.Array) -> jax.Array:
        return jax.random.bernoulli(rng, share, shape)

    usual = jax.random.key_impl(rng) == "threefry2x32" and jax.config.jax_threefry_partitionable and not jax.config.jax_enable_x64
    if not usual or math.prod(shape) >= 2**32:
        return library(rng)
    return jax.lax.platform_dependent(rng, cpu=lambda rng: _written_out(rng, share, shape), default=library)


class Dropout(nn.Module):
    """Zeros with a probability of `rate`, what stays divided by 1 - rate."""

    rate: float
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        if not self.rate or deterministic:
            return x
        if self.rate == 1.0:
            return jnp.zeros_like(x)  # without the NaN of a gradient of x / 0
        kept = bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))
