"""What every block needs to know of how, not what, it computes."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ptm.parallel import Layout


@dataclasses.dataclass(frozen=True)
class Context:
    """Layout on the devices, type of activations, attention backend, and what is looped over or computed again."""

    layout: Layout
    dtype: Any = jnp.float32
    logits: Any = jnp.float32  # of the vocabulary, as they are stored
    attention: str = "auto"
    attention_chunk: int = 512
    scan_layers: bool = True
    remat: str = "none"
    loss_chunk: int = 4096
