"""Dot-product attention behind one dispatcher, which refuses what a backend cannot honour, and the module around it.

Backends: `xla` (plain, any mask, bias and dropout), `chunked` (the same over blocks of queries, memory linear in length), `cudnn`
(fused, NVIDIA GPUs). A dropped feature is worse than an error: packed segments silently ignored is a known fault of fused kernels.
"""

import dataclasses
import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.fields import ConfigError
from ptm.nn.context import Context
from ptm.nn.linear import Linear
from ptm.nn.masks import Mask
from ptm.nn.norm import Norm
from ptm.nn.position import RotaryConfig, rotate
from ptm.nn.shape import BlockConfig

MASKED = -1e30  # finite: a row that is wholly masked stays free of NaN
CHUNKED_FROM = 2048  # tokens; below it the whole matrix of logits is cheaper


@dataclasses.dataclass(frozen=True)
class Request:
    """What a call asks of a backend."""

    platform: str
    dtype: str
    length: int
    keys: int
    head_dim: int
    dropout: bool
    decoding: bool
    row_bias: bool = False  # a bias that differs from row to row


def _refuse_chunked(request: Request) -> str | None:
    if request.decoding:
        return "it does not decode from a cache"
    return None


def _refuse_cudnn(request: Request) -> str | None:
    if request.platform != "gpu":
        return f"it needs an NVIDIA GPU and this is {request.platform}"
    if request.dtype != "bfloat16":
        return f"it computes in bfloat16 and compute.dtype is {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it needs a head width that is a multiple of 8 up to 128 and this is {request.head_dim}"
    if request.dropout:
        return "it cannot drop attention weights; set attention dropout to 0"
    if request.length % 2 or request.keys % 2:
        return "its backward pass needs even lengths"
    if request.decoding:
        return "it does not decode from a cache"
    if request.row_bias:
        return "the gradient of a bias that differs from row to row has not been proved right there"
    return None


REFUSALS = {"xla": lambda request: None, "chunked": _refuse_chunked, "cudnn": _refuse_cudnn}


@functools.cache
def choose(backend: str, request: Request) -> str:
    """The backend that serves `request`; `auto` picks one and logs why. Raises ConfigError if the named one cannot honour it."""
    if backend != "auto":
        reason = REFUSALS[backend](request)
        if reason:
            raise ConfigError(f"compute.attention={backend} is refused here: {reason}. Allowed: auto, xla, or a setting that fits.")
        return backend
    if REFUSALS["cudnn"](request) is None:
        chosen, why = "cudnn", "the device, type and mask allow it"
    elif request.length >= CHUNKED_FROM and REFUSALS["chunked"](request) is None:
        chosen, why = "chunked", f"{request.length} queries are {CHUNKED_FROM} or more"
    else:
        chosen, why = "xla", "the logits are small" if request.length < CHUNKED_FROM else "no other backend fits"
    logging.getLogger(__name__).info("attention %s for %s: %s", chosen, request, why)
    return chosen


def _xla(q_BLHK, k_BTHK, v_BTHK, *, mask_B1LT, bias_BHLT, scale, dropout, rng):
    # Heads before positions: batched products of plain matrices.
    q_BHLK, k_BHTK, v_BHTK = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK * scale, k_BTHK, v_BTHK))
    logits_BHLT = jnp.einsum("bhlk,bhtk->bhlt", q_BHLK, k_BHTK, preferred_element_type=jnp.float32)
    if bias_BHLT is not None:
        logits_BHLT = logits_BHLT + bias_BHLT
    logits_BHLT = jnp.where(mask_B1LT, logits_BHLT, MASKED)
    largest_BHL1 = jax.lax.stop_gradient(jnp.max(logits_BHLT, axis=-1, keepdims=True))
    weights_BHLT = jnp.exp(logits_BHLT - largest_BHL1)
    total_BHL1 = jnp.sum(weights_BHLT, axis=-1, keepdims=True)
    if dropout:
        weights_BHLT = weights_BHLT * jax.random.bernoulli(rng, 1 - dropout, weights_BHLT.shape) / (1 - dropout)
    out_BHLK = jnp.einsum("bhlt,bhtk->bhlk", weights_BHLT.astype(v_BHTK.dtype), v_BHTK, preferred_element_type=jnp.float32) / total_BHL1
    return jnp.swapaxes(out_BHLK, 1, 2).astype(v_BTHK.dtype), jnp.max(largest_BHL1)


def _chunked(q_BLHK, k_BTHK, v_BTHK, *, mask: Mask, bias_BHLT, scale, dropout, rng, chunk):
    length = q_BLHK.shape[1]
    count = -(-length // chunk)
    chunk = -(-length // count)  # about equal parts; padding queries belong to segment 0 and are cut off again

    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, count * chunk - length if n == axis else 0) for n in range(x.ndim)])

    q_BLHK, mask = padded(q_BLHK, 1), mask.padded(count * chunk)
    bias_BHLT = None if bias_BHLT is None else padded(bias_BHLT, 2)

    @jax.checkpoint
    def block(largest, n):
        start = n * chunk
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk)
        out, top = _xla(
            part(q_BLHK, axis=1), k_BTHK, v_BTHK,
            mask_B1LT=mask.part(start, chunk).dense(),
            bias_BHLT=None if bias_BHLT is None else part(bias_BHLT, axis=2),
            scale=scale, dropout=dropout, rng=None if rng is None else jax.random.fold_in(rng, n),
        )  # fmt: skip
        return jnp.maximum(largest, top), out

    largest, out_nBCHK = jax.lax.scan(block, jnp.float32(MASKED), jnp.arange(count))
    out_BLHK = jnp.moveaxis(out_nBCHK, 0, 1).reshape(q_BLHK.shape[:2] + v_BTHK.shape[2:])
    return out_BLHK[:, :length], largest


def _cudnn(q_BLHK, k_BTHK, v_BTHK, *, mask_B1LT, bias_BHLT, scale):
    shape = (q_BLHK.shape[0], 1, q_BLHK.shape[1], k_BTHK.shape[1])
    bias = None if bias_BHLT is None else bias_BHLT.astype(q_BLHK.dtype)
    out = jax.nn.dot_product_attention(
        q_BLHK, k_BTHK, v_BTHK, bias=bias, mask=jnp.broadcast_to(mask_B1LT, shape), scale=scale, implementation="cudnn"
    )
    return out, None  # the kernel never shows its logits


def attend(
    q_BLHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    *,
    context: Context,
    mask: Mask,
    bias_BHLT: jax.Array | None = None,
    scale: float,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
    decoding: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention out_BLHK and the largest logit (None where the backend does not show it).

    `dropout` drops attention weights with `rng`; `bias_BHLT`, which rows may share (B = 1), is added to the scaled logits. Raises ConfigError
    if the configured backend cannot honour the call.
    """
    request = Request(
        platform=context.layout.mesh.devices.flat[0].platform, dtype=jnp.dtype(q_BLHK.dtype).name, length=q_BLHK.shape[1],
        keys=k_BTHK.shape[1], head_dim=q_BLHK.shape[-1], dropout=dropout > 0, decoding=decoding,
        row_bias=bias_BHLT is not None and bias_BHLT.shape[0] > 1,
    )  # fmt: skip
    backend = choose(context.attention if not decoding else "xla", request)
    if backend != "cudnn" and k_BTHK.shape[2] != q_BLHK.shape[2]:
        k_BTHK, v_BTHK = (jnp.repeat(x, q_BLHK.shape[2] // x.shape[2], axis=2) for x in (k_BTHK, v_BTHK))  # cudnn knows of groups itself
    if backend == "chunked":
        return _chunked(q_BLHK, k_BTHK, v_BTHK, mask=mask, bias_BHLT=bias_BHLT, scale=scale, dropout=dropout, rng=rng, chunk=context.attention_chunk)
    if backend == "cudnn":
        return _cudnn(q_BLHK, k_BTHK, v_BTHK, mask_B1LT=mask.dense(), bias_BHLT=bias_BHLT, scale=scale)
    return _xla(q_BLHK, k_BTHK, v_BTHK, mask_B1LT=mask.dense(), bias_BHLT=bias_BHLT, scale=scale, dropout=dropout, rng=rng)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2): projections, rotation, `attend`, output projection.

    With a cache {"key", "value"} of [B, T, H, K] and the mask's offset, the new keys and values are written at that index.
    """

    config: BlockConfig
    context: Context
    rotary: RotaryConfig | None

    @nn.compact
    def __call__(self, x_BLD, source_BTD, *, mask: Mask, bias_1HLT=None, positions_BL=None, cache=None, index=0, train: bool):
        c, constrain = self.config, self.context.layout.constrain
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads or c.num_heads, c.head_dim)

        def project(name: str, x: jax.Array, outputs: tuple[int, int], std: float) -> jax.Array:
            return constrain(Linear(self.context, (c.width,), outputs, std, "qkv" in c.biases, name=name)(x), "batch", "length", "heads", None)

        q_BLHK = project("query", x_BLD, heads, c.query_std)
        k_BTHK = project("key", source_BTD, kv_heads, c.key_std)
        v_BTHK = project("value", source_BTD, kv_heads, c.key_std)
        if c.qk_norm:
            q_BLHK, k_BTHK = Norm("rms", c.norm_eps, name="query_rms")(q_BLHK), Norm("rms", c.norm_eps, name="key_rms")(k_BTHK)
        if self.rotary is not None:
            q_BLHK, k_BTHK = rotate(q_BLHK, positions_BL, self.rotary), rotate(k_BTHK, positions_BL, self.rotary)
        if c.scale_by_layer:
            q_BLHK = q_BLHK / jnp.asarray(index + 1, q_BLHK.dtype)
        if cache is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=mask.offset, axis=1)
            cache = {"key": write(cache["key"], k_BTHK), "value": write(cache["value"], v_BTHK)}
            k_BTHK, v_BTHK = cache["key"], cache["value"]
        dropout = c.attention_dropout if train else 0.0
        out_BLHK, largest = attend(
            q_BLHK, k_BTHK, v_BTHK, context=self.context, mask=mask, bias_BHLT=bias_1HLT, scale=c.scale, dropout=dropout,
            rng=self.make_rng("dropout") if dropout else None, decoding=cache is not None,
        )  # fmt: skip
        out_BLHK = constrain(out_BLHK, "batch", "length", "heads", None)
        out_BLD = Linear(self.context, heads, (c.width,), c.attention_out_std, "out" in c.biases, name="out")(out_BLHK)
        return out_BLD, cache, largest
