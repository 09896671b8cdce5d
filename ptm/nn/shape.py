"""The shape of a layer, and what computing it costs."""

import dataclasses

from ptm.fields import ConfigError, divisors
from ptm.nn.position import RotaryConfig

BIASED = ("qkv", "out", "mlp", "norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Shape of a layer. `*_std` are standard deviations of the initialisation of kernels."""

    width: int
    num_heads: int
    head_dim: int
    mlp_width: int
    num_kv_heads: int | None = None  # None = num_heads; fewer: groups of queries share keys and values (Ainslie et al. 2023)
    prenorm: bool
    parallel: bool = False  # attention and feed-forward read the same norm and are added together (Wang and Komatsuzaki 2021)
    norm: str = "layer"
    norm_eps: float
    biases: tuple[str, ...] = BIASED  # parts that have biases
    activation: str
    gated: bool = False
    cross: bool = False
    scale: float
    scale_by_layer: bool = False  # attention logits of layer n are divided by n + 1 as well
    qk_norm: bool = False  # RMS norm of each head's queries and keys (Henry et al. 2020)
    rotary: RotaryConfig | None = None
    dropout: float = 0.0  # of each sublayer's output
    attention_dropout: float = 0.0  # of attention weights
    mlp_dropout: float = 0.0  # of the hidden layer of the feed-forward
    query_std: float
    key_std: float
    attention_out_std: float
    mlp_in_std: float
    mlp_out_std: float


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of a stack, all of it static."""

    window: tuple[int, int] | None = None  # (left, right): see Mask
    rotary: RotaryConfig | None = None  # instead of the block's
    attention_norm: bool = True  # False: the layer's input is normalised already


def check_heads(where: str, *, width: int, num_heads: int) -> None:
    """Raises ConfigError if the heads of the config at `where` do not share its width equally."""
    if width % num_heads:
        raise ConfigError(f"{where}.num_heads={num_heads} does not divide {where}.width={width}; head counts that fit: {divisors(width)}.")


def block_flops(config: BlockConfig, *, length: int, keys: int, memory: int = 0) -> float:
    """Multiply-adds x 2 of one layer's forward pass for one row: matrix products and attention over all keys (no discount for causal masks)."""
    heads, kv_heads = config.num_heads * config.head_dim, (config.num_kv_heads or config.num_heads) * config.head_dim
    projections = 2 * length * config.width * heads * 2 + 2 * keys * config.width * kv_heads * 2
    attention = 2 * 2 * length * keys * heads
    feed_forward = 2 * length * config.width * config.mlp_width * (3 if config.gated else 2)
    cross = 0.0
    if config.cross:
        cross = 2 * length * config.width * heads * 2 + 2 * memory * config.width * kv_heads * 2 + 2 * 2 * length * memory * heads
    return projections + attention + feed_forward + cross
