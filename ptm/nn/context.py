"""What every block needs to know of how, not what, it computes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ptm.parallel import Layout


@dataclasses.dataclass(frozen=True)
class Context:
    """Layout on the devices, type of activations, attention backend, what is looped over or computed again, and the multipliers of ptm.mup."""

    layout: Layout
    dtype: Any = jnp.float32
    logits: Any = jnp.float32  # of the vocabulary, as they are stored
    attention: str = "auto"
    attention_chunk: int = 512
    scan_layers: bool = True
    remat: str = "none"
    loss_chunk: int = 4096
    multipliers: tuple[tuple[str, float], ...] = ()  # of what maps to outputs read, by the path of their kernel or table
    attention_multiplier: float = 1.0  # of attention logits

    def scaled(self, x: jax.Array, path: str) -> jax.Array:
        """What the map with the kernel or table at `path` reads, times the multiplier that it has."""
        factors = [factor for name, factor in self.multipliers if name == path]
        return x * factors[0] if factors else x
