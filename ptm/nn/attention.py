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
    maps: bool = False  # the weights themselves are wanted


def _refuse_chunked(request: Request) -> str | None:
    if request.maps:
        return "it never holds a whole matrix of weights; maps need xla"
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
    if request.maps:
        return "it never shows its weights; maps need xla"
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


def heads_first(x_BTHK: jax.Array, *, joined: bool = False) -> jax.Array:
    """Keys or values [B, H, T, K]; with rows and heads `joined`, [B H, T, K]."""
    x_BHTK = jnp.swapaxes(x_BTHK, 1, 2)
    return x_BHTK.reshape(-1, *x_BHTK.shape[2:]) if joined else x_BHTK


def _xla(q_BLHK, k_BHTK, v_BHTK, *, mask_B1LT, bias_BHLT, scale, dropout, rng, maps=False):
    # Heads before positions: batched products of plain matrices. Queries of heads that share their keys lie below each other.
    q_BHLK = jnp.swapaxes(q_BLHK * scale, 1, 2)
    rows, heads, length, _ = q_BHLK.shape

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(*k_BHTK.shape[:-2], -1, x.shape[-1])

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(rows, heads, length, x.shape[-1])

    logits_BHLT = split(jnp.einsum("...lk,...tk->...lt", grouped(q_BHLK), k_BHTK, preferred_element_type=jnp.float32))
    if bias_BHLT is not None:
        logits_BHLT = logits_BHLT + bias_BHLT
    logits_BHLT = jnp.where(mask_B1LT, logits_BHLT, MASKED)
    largest_BHL1 = jax.lax.stop_gradient(jnp.max(logits_BHLT, axis=-1, keepdims=True))
    weights_BHLT = jnp.exp(logits_BHLT - largest_BHL1)
    total_BHL1 = jnp.sum(weights_BHLT, axis=-1, keepdims=True)
    maps_BHLT = weights_BHLT / total_BHL1 if maps else None
    if dropout:
        weights_BHLT = weights_BHLT * jax.random.bernoulli(rng, 1 - dropout, weights_BHLT.shape) / (1 - dropout)
    out_BHLK = jnp.einsum("...lt,...tk->...lk", grouped(weights_BHLT.astype(v_BHTK.dtype)), v_BHTK, preferred_element_type=jnp.float32)
    out_BHLK = split(out_BHLK) / total_BHL1
    return jnp.swapaxes(out_BHLK, 1, 2).astype(v_BHTK.dtype), jnp.max(largest_BHL1), maps_BHLT


def _chunked(q_BLHK, k_BHTK, v_BHTK, *, mask: Mask, bias_BHLT, scale, dropout, rng, chunk):
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
        out, top, _ = _xla(
            part(q_BLHK, axis=1), k_BHTK, v_BHTK,
            mask_B1LT=mask.part(start, chunk).dense(),
            bias_BHLT=None if bias_BHLT is None else part(bias_BHLT, axis=2),
            scale=scale, dropout=dropout, rng=None if rng is None else jax.random.fold_in(rng, n),
        )  # fmt: skip
        return jnp.maximum(largest, top), out

    largest, out_nBCHK = jax.lax.scan(block, jnp.float32(MASKED), jnp.arange(count))
    out_BLHK = jnp.moveaxis(out_nBCHK, 0, 1).reshape(*q_BLHK.shape[:3], -1)
    return out_BLHK[:, :length], largest, None


def _cudnn(q_BLHK, k_BTHK, v_BTHK, *, mask_B1LT, bias_BHLT, scale):
    shape = (q_BLHK.shape[0], 1, q_BLHK.shape[1], k_BTHK.shape[1])
    bias = None if bias_BHLT is None else bias_BHLT.astype(q_BLHK.dtype)
    out = jax.nn.dot_product_attention(
        q_BLHK, k_BTHK, v_BTHK, bias=bias, mask=jnp.broadcast_to(mask_B1LT, shape), scale=scale, implementation="cudnn"
    )
    return out, None, None  # the kernel never shows its logits


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
    maps: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Attention out_BLHK, the largest logit (None where the backend does not show it), and with `maps` the weights [B, H, L, T], float32, before dropout.

    When `decoding`, keys and values are `heads_first`, as a cache holds them. `dropout` drops attention weights with `rng`; `bias_BHLT`, which rows may
    share (B = 1), is added to the scaled logits. Raises ConfigError if the configured backend cannot honour the call.
    """
    request = Request(
        platform=context.layout.mesh.devices.flat[0].platform, dtype=jnp.dtype(q_BLHK.dtype).name, length=q_BLHK.shape[1],
        keys=k_BTHK.shape[-2 if decoding else 1], head_dim=q_BLHK.shape[-1], dropout=dropout > 0, decoding=decoding,
        row_bias=bias_BHLT is not None and bias_BHLT.shape[0] > 1, maps=maps,
    )  # fmt: skip
    backend = choose(context.attention if not decoding else "auto", request)
    if backend == "cudnn":  # which knows of groups itself
        return _cudnn(q_BLHK, k_BTHK, v_BTHK, mask_B1LT=mask.dense(), bias_BHLT=bias_BHLT, scale=scale)
    if not decoding:
        if k_BTHK.shape[2] != q_BLHK.shape[2]:  # heads are split over devices as one
            k_BTHK, v_BTHK = (jnp.repeat(x, q_BLHK.shape[2] // x.shape[2], axis=2) for x in (k_BTHK, v_BTHK))
        k_BTHK, v_BTHK = heads_first(k_BTHK), heads_first(v_BTHK)
    if backend == "chunked":
        return _chunked(q_BLHK, k_BTHK, v_BTHK, mask=mask, bias_BHLT=bias_BHLT, scale=scale, dropout=dropout, rng=rng, chunk=context.attention_chunk)
    return _xla(q_BLHK, k_BTHK, v_BTHK, mask_B1LT=mask.dense(), bias_BHLT=bias_BHLT, scale=scale, dropout=dropout, rng=rng, maps=maps)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2): projections, rotation, `attend`, output projection.

    With a cache {"key", "value"}, both `heads_first`, the new keys and values are written to it at the mask's offset. `source_BTD` may be such a cache
    instead, of keys and values that are known already: what a call with None for x_BLD gives. On one device rows and heads are joined in it: for
    a single row XLA's CPU backend would join them itself, and copy the whole cache for every token to do so.
    """

    config: BlockConfig
    context: Context
    rotary: RotaryConfig | None
    maps: bool = False  # give the weights too

    @nn.compact
    def __call__(self, x_BLD, source_BTD, *, mask: Mask | None = None, bias_BHLT=None, positions_BL=None, cache=None, index=0, train: bool = False):
        c, constrain = self.config, self.context.layout.constrain
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads or c.num_heads, c.head_dim)

        def project(name: str, x: jax.Array, outputs: tuple[int, int], std: float) -> jax.Array:
            return constrain(Linear(self.context, (c.width,), outputs, std, "qkv" in c.biases, name=name)(x), "batch", "length", "heads", None)

        def placed(name: str, x: jax.Array) -> jax.Array:
            x = Norm("rms", c.norm_eps, name=f"{name}_rms")(x) if c.qk_norm else x
            return x if self.rotary is None else rotate(x, positions_BL, self.rotary)

        held = functools.partial(heads_first, joined=self.context.layout.mesh.size == 1)
        known = source_BTD if isinstance(source_BTD, dict) else None
        if known is None:
            k_BTHK = placed("key", project("key", source_BTD, kv_heads, c.key_std))
            v_BTHK = project("value", source_BTD, kv_heads, c.key_std)
        if x_BLD is None:
            return {"key": held(k_BTHK), "value": held(v_BTHK)}
        q_BLHK = placed("query", project("query", x_BLD, heads, c.query_std))
        if c.scale_by_layer:
            q_BLHK = q_BLHK / jnp.asarray(index + 1, q_BLHK.dtype)
        if cache is not None:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=mask.offset, axis=-2)
            known = {"key": write(cache["key"], held(k_BTHK)), "value": write(cache["value"], held(v_BTHK))}
            if self.context.layout.mesh.size > 1:
                known = {name: constrain(x_BHTK, "batch", "heads", None, None) for name, x_BHTK in known.items()}
        if known is not None:
            k_BTHK, v_BTHK = known["key"], known["value"]
        dropout = c.attention_dropout if train else 0.0
        out_BLHK, largest, maps_BHLT = attend(
            q_BLHK, k_BTHK, v_BTHK, context=self.context, mask=mask, bias_BHLT=bias_BHLT, scale=c.scale, dropout=dropout,
            rng=self.make_rng("dropout") if dropout else None, decoding=known is not None, maps=self.maps,
        )  # fmt: skip
        out_BLHK = constrain(out_BLHK, "batch", "length", "heads", None)
        out_BLD = Linear(self.context, heads, (c.width,), c.attention_out_std, "out" in c.biases, name="out")(out_BLHK)
        return out_BLD, known, largest, maps_BHLT
