"""Dot-product attention behind one dispatcher, which refuses what a backend cannot honour, and the module around it.

Backends: `xla` (plain, any mask, bias and dropout), `chunked` (the same in blocks, memory linear in length), `cudnn` (fused, NVIDIA GPUs), `splash` and
`flash` (fused, TPUs). A dropped feature is worse than an error: packed segments silently ignored is a known fault of fused kernels.
"""

import dataclasses
import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ptm.fields import ConfigError
from ptm.nn import kernels
from ptm.nn.context import Context
from ptm.nn.kernels import heads_first
from ptm.nn.linear import PRODUCT, Linear
from ptm.nn.masks import Mask
from ptm.nn.norm import Norm
from ptm.nn.position import RotaryConfig, rotate
from ptm.nn.shape import BlockConfig
from ptm.nn.spread import axes_of, copied


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
    mask: str = "full"  # its kind
    window: bool = False
    in_order: bool = True  # the mask is told by kind, segments and window (`Mask.in_order`)
    bias: bool = False
    row_bias: bool = False  # a bias that differs from row to row
    split: bool = False  # the queries of a row lie on several devices
    maps: bool = False  # the weights themselves are wanted


def _refuse_fused(request: Request) -> str | None:
    """What no fused kernel can honour."""
    if request.dropout:
        return "it cannot drop attention weights; set attention dropout to 0"
    if request.decoding:
        return "it does not decode from a cache"
    if request.maps:
        return "it never shows its weights; maps need xla"
    return None


def _refuse_chunked(request: Request) -> str | None:
    if request.maps:
        return "it never holds a whole matrix of weights; maps need xla"
    return None


def _refuse_cudnn(request: Request) -> str | None:
    if request.dtype != "bfloat16":
        return f"it computes in bfloat16 and compute.dtype is {request.dtype}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"it needs a head width that is a multiple of 8 up to 128 and this is {request.head_dim}"
    if request.length % 2 or request.keys % 2:
        return "its backward pass needs even lengths"
    if request.split:
        return "it cannot split the length of a row over devices; set mesh.sequence to 1"
    if request.row_bias:
        return "the gradient of a bias that differs from row to row has not been proved right there"
    return _refuse_fused(request)


def _refuse_splash(request: Request) -> str | None:
    if request.bias:
        return "it adds no bias to the logits; flash does"
    if request.mask == "permutation" or not request.in_order:
        return "its masks are full, causal or prefix, with queries and keys in the order of the row: no order of prediction, memory or choice of queries"
    if request.window and request.mask == "prefix":
        return "it knows no window together with a prefix"
    if (request.mask != "full" or request.window) and request.length != request.keys:
        return f"a {request.mask} mask or a window needs as many queries as keys and this has {request.length} and {request.keys}"
    return _refuse_fused(request)


def _refuse_flash(request: Request) -> str | None:
    if not request.bias and (request.mask not in ("full", "causal") or request.window or not request.in_order):
        return "without a bias that could take them up, its masks are full or causal, in the order of the row and without a window"
    if not request.bias and request.mask == "causal" and request.split:
        return "it cannot split the length of a causal row over devices; splash can"
    return _refuse_fused(request)


REFUSALS = {"xla": lambda request: None, "chunked": _refuse_chunked, "cudnn": _refuse_cudnn, "splash": _refuse_splash, "flash": _refuse_flash}
HOMES = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU"), "flash": ("tpu", "a TPU")}  # the others run anywhere
# What `auto` tries in turn, and from how many queries on: below it the whole matrix of logits is cheaper.
AUTO = {"cudnn": 0, "splash": 256, "flash": 1024, "chunked": 2048}


def refusal(backend: str, request: Request) -> str | None:
    """Why a backend cannot honour `request`; None if it can."""
    if backend in HOMES and request.platform != HOMES[backend][0]:
        return f"it needs {HOMES[backend][1]} and this is {request.platform}"
    return REFUSALS[backend](request)


@functools.cache
def choose(backend: str, request: Request) -> str:
    """The backend that serves `request`; `auto` picks one and logs why. Raises ConfigError if the named one cannot honour it."""
    if backend != "auto":
        reason = refusal(backend, request)
        if reason:
            raise ConfigError(f"compute.attention={backend} is refused here: {reason}. Allowed: auto, xla, or a setting that fits.")
        return backend
    reasons = {name: refusal(name, request) for name in AUTO if name not in HOMES or HOMES[name][0] == request.platform}
    fitting = [name for name, reason in reasons.items() if reason is None]
    chosen = next((name for name in fitting if request.length >= AUTO[name]), "xla")
    if chosen != "xla":
        why = f"{request.length} queries are {AUTO[chosen]} or more" if AUTO[chosen] else "the device, type and mask allow it"
    else:
        why = "the logits are small" if fitting else "no other backend fits"
    refused = "".join(f"; not {name}: {reason}" for name, reason in reasons.items() if reason)
    logging.getLogger(__name__).info("attention %s for %s: %s%s", chosen, request, why, refused)
    return chosen


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
    named: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Attention out_BLHK, the largest logit (None where the backend does not show it), and with `maps` the weights [B, H, L, T], float32, before dropout.

    When `decoding`, keys and values are `heads_first`, as a cache holds them. `dropout` drops attention weights with `rng`; `bias_BHLT`, which rows may
    share (B = 1), is added to the scaled logits. With `named`, queries, keys and values get the name PRODUCT as the kernel wants them laid out. Raises ConfigError if the configured backend cannot honour the call.
    """
    layout = context.layout
    if not decoding:  # queries that lie apart need the keys of all positions
        k_BTHK, v_BTHK = (layout.constrain(x, "batch", "keys", "kv_heads", None) for x in (k_BTHK, v_BTHK))
    request = Request(
        platform=platform(context), dtype=jnp.dtype(q_BLHK.dtype).name, length=q_BLHK.shape[1], keys=k_BTHK.shape[-2 if decoding else 1],
        head_dim=q_BLHK.shape[-1], dropout=dropout > 0, decoding=decoding, mask=mask.kind, window=mask.window is not None, in_order=mask.in_order,
        bias=bias_BHLT is not None, row_bias=bias_BHLT is not None and bias_BHLT.shape[0] > 1, split=bool(axes_of(layout, "length", q_BLHK.shape[1])),
        maps=maps,
    )  # fmt: skip
    backend = choose(context.attention if not decoding else "auto", request)
    name = functools.partial(checkpoint_name, name=PRODUCT) if named else lambda x: x
    if backend in ("splash", "flash"):
        from ptm.nn import pallas  # only TPUs need it, and it takes a while to load

        arrays = tuple(name(heads_first(x)) for x in (q_BLHK * scale, k_BTHK, v_BTHK))
        if backend == "splash":
            return pallas.splash(*arrays, mask=mask, layout=layout), None, None
        return pallas.flash(*arrays, mask=mask, bias_BHLT=bias_BHLT, layout=layout), None, None
    q_BLHK, k_BTHK, v_BTHK = name(q_BLHK), name(k_BTHK), name(v_BTHK)
    if backend == "cudnn":  # which knows of groups itself
        return kernels.cudnn(q_BLHK, k_BTHK, v_BTHK, mask=mask, bias_BHLT=bias_BHLT, scale=scale), None, None
    if not decoding:
        heads = q_BLHK.shape[2]
        if layout.mesh.size == 1 or backend == "chunked" and request.split and not dropout:
            k_BTHK, v_BTHK = (copied(x, heads=heads, layout=layout, axis=2) for x in (k_BTHK, v_BTHK))
        else:  # XLA splits the heads of queries and keys over devices as one
            k_BTHK, v_BTHK = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BTHK, v_BTHK))
        k_BTHK, v_BTHK = heads_first(k_BTHK), heads_first(v_BTHK)
    options = {"mask": mask, "bias_BHLT": bias_BHLT, "scale": scale, "dropout": dropout, "rng": rng}
    if backend == "chunked":
        return *kernels.chunked(q_BLHK, k_BTHK, v_BTHK, **options, chunk=context.attention_chunk, layout=layout), None
    return kernels.xla(q_BLHK, k_BTHK, v_BTHK, **options, maps=maps)


def platform(context: Context) -> str:
    """What the devices of the mesh are, which need not be those of this process."""
    return context.layout.mesh.devices.flat[0].platform


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
            y = Linear(self.context, (c.width,), outputs, std, "qkv" in c.biases, named=c.qk_norm, name=name)(x)
            return constrain(y, "batch", "length", "heads", None)

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
            q_BLHK, k_BTHK, v_BTHK, context=self.context, mask=mask, bias_BHLT=bias_BHLT, scale=c.scale * self.context.attention_multiplier, dropout=dropout,
            rng=self.make_rng("dropout") if dropout else None, decoding=known is not None, maps=self.maps, named=not c.qk_norm,
        )  # fmt: skip
        out_BLHK = constrain(out_BLHK, "batch", "length", "heads", None)
        out_BLD = Linear(self.context, heads, (c.width,), c.attention_out_std, "out" in c.biases, name="out")(out_BLHK)
        return out_BLD, known, largest, maps_BHLT
