"""Attention by the Pallas kernels for TPUs that come with JAX: what our masks are to them, blocks, and the way over a mesh.

`splash` skips the blocks that a static mask hides and knows of groups of queries that share their keys. `flash` takes an additive bias. Both read
segments as they are and keep no weights. Lengths are padded to blocks with keys that no query sees.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes as FlashBlocks
from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds as FlashSegments
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as static_masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as visits

from ptm.nn.kernels import MASKED, SAVED
from ptm.nn.masks import HIDDEN, Mask
from ptm.nn.spread import axes_of, bias_words, copied, shares, spread
from ptm.parallel import Layout

LANES = 128  # blocks are multiples of it
BLOCK = 512  # at most so many queries or keys


def blocks_of(length: int, *, parts: int = 1) -> tuple[int, int]:
    """(block, padded length): about equal blocks that lie within each of the equal `parts` of a length."""
    own = -(-length // parts)
    count = -(-own // BLOCK)
    block = -(-own // (count * LANES)) * LANES
    return block, parts * count * block


def _padded(x: jax.Array, axis: int, length: int, value: int = 0) -> jax.Array:
    return jnp.pad(x, [(0, length - x.shape[n] if n == axis else 0) for n in range(x.ndim)], constant_values=value)


def _up_to(last: jax.Array, key: jax.Array) -> jax.Array:
    return key <= last


@functools.cache
def _visited(kind: str, window: tuple[int, int] | None, shape: tuple[int, int], blocks: tuple[int, int], parts: int):
    """Which blocks the kernels visit, forth and back, and the function that says what is visible within them: numpy, no array on a device."""
    if window is not None:
        mask = static_masks.LocalMask(shape, (window[0], 0 if kind == "causal" else window[1]), offset=0)
    else:
        mask = static_masks.CausalMask(shape) if kind == "causal" else static_masks.FullMask(shape)
    mask = static_masks.MultiHeadMask([mask])  # of all heads
    forth, visible = visits.process_mask(mask, blocks, q_seq_shards=parts)
    back, _ = visits.process_mask_dkv(mask, blocks, q_seq_shards=parts)
    return forth, back, _up_to if kind == "prefix" else visible


def splash(q_BHLK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array, *, mask: Mask, layout: Layout) -> jax.Array:
    """Attention out_BLHK by splash attention; `mask` is full, causal or prefix, in order, the former two with a window perhaps.

    A prefix visits all blocks: how far a query sees is data, which the kernel compares with the index of a key.
    """
    rows, heads, length, _ = q_BHLK.shape
    sizes = {"batch": rows, "length": length, "heads": heads}
    parts = shares(layout, axes_of(layout, "length", length))
    block_q, padded_q = blocks_of(length, parts=parts)
    block_k, padded_k = blocks_of(k_BHTK.shape[2])
    hides = mask.kind == "causal" or mask.window is not None  # else all parts of the queries visit the same: all blocks
    shape, apart = ((padded_q, padded_k), parts) if hides else ((padded_q // parts, padded_k), 1)
    forth, back, visible = _visited(mask.kind, mask.window, shape, (block_q, block_k), apart)
    block_sizes = splash_lib.BlockSizes(
        block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k, block_q_dq=block_q, block_kv_dq=block_k
    )  # the fused backward pass would leave the sum over blocks of keys to XLA

    def local(q_BHLK, k_BHTK, v_BHTK, query_segments_BL, key_segments_BT, last_BL, forth, back):
        def row(q_HLK, k_HTK, v_HTK, query_segments_L, key_segments_T, last_L):
            seen = (forth, back) if last_L is None else (info._replace(q_sequence=last_L) for info in (forth, back))
            ahead, behind = seen
            kernel = splash_lib.SplashAttentionKernel(
                ahead, ahead, behind, block_sizes=block_sizes, is_mqa=False, save_residuals=False, mask_value=splash_lib.DEFAULT_MASK_VALUE,
                attn_logits_soft_cap=None, residual_checkpoint_name=SAVED, mask_function=visible, interpret=False,
            )  # fmt: skip
            return kernel(q_HLK, k_HTK, v_HTK, splash_lib.SegmentIds(query_segments_L, key_segments_T))

        return jnp.swapaxes(jax.vmap(row)(q_BHLK, k_BHTK, v_BHTK, query_segments_BL, key_segments_BT, last_BL), 1, 2)

    operands = (
        _padded(q_BHLK, 2, padded_q), *(_padded(copied(x, heads=heads, layout=layout, axis=1), 2, padded_k) for x in (k_BHTK, v_BHTK)),
        _padded(mask.query_segments_BL, 1, padded_q), _padded(mask.key_segments_BT, 1, padded_k, HIDDEN),
        _padded(mask.last_visible(), 1, padded_q) if mask.kind == "prefix" else None, forth, back,
    )  # fmt: skip
    queries, keys, of_row = ("batch", "heads", "length", None), ("batch", "heads", None, None), ("batch", "length")
    blocks = jax.tree.map(lambda x: (None, "length" if hides else None, None) if x.ndim == 3 else ("length",), (forth, back))
    words = (queries, keys, keys, of_row, ("batch", None), None if operands[5] is None else of_row, *blocks)
    return spread(local, operands, words, ("batch", "length", "heads", None), layout=layout, sizes=sizes)[:, :length]


def flash(q_BHLK: jax.Array, k_BHTK: jax.Array, v_BHTK: jax.Array, *, mask: Mask, bias_BHLT: jax.Array | None, layout: Layout) -> jax.Array:
    """Attention out_BLHK by flash attention. Beside a bias any mask holds: what is neither full nor causal becomes part of the bias.

    Where rows share a bias they are computed one after the other: the kernel wants a bias for every row, and gives back a gradient as large.
    """
    rows, heads, length, width = q_BHLK.shape
    k_BHTK, v_BHTK = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (k_BHTK, v_BHTK))  # it knows of no groups
    sizes = {"batch": rows, "length": length, "heads": heads}
    parts = shares(layout, axes_of(layout, "length", length))
    block_q, padded_q = blocks_of(length, parts=parts)
    block_k, padded_k = blocks_of(k_BHTK.shape[2])
    plain = mask.in_order and mask.window is None and (mask.kind == "full" or mask.kind == "causal" and parts == 1)
    hidden_B1LT = None if plain else jnp.where(mask.dense(), 0, MASKED)
    padded_width = width if width < LANES else -(-width // LANES) * LANES
    blocks = FlashBlocks(
        block_b=1, block_q=block_q, block_k_major=block_k, block_k=block_k, block_q_major_dkv=block_q, block_k_major_dkv=block_k, block_k_dkv=block_k,
        block_q_dkv=block_q, block_k_major_dq=block_k, block_k_dq=block_k, block_q_dq=block_q,
    )  # fmt: skip

    def local(q_BHLK, k_BHTK, v_BHTK, query_segments_BL, key_segments_BT, bias_BHLT, hidden_B1LT):
        def attend(q_BHLK, k_BHTK, v_BHTK, segments, hidden_B1LT):
            both = bias_BHLT if hidden_B1LT is None else bias_BHLT + hidden_B1LT
            return flash_attention(q_BHLK, k_BHTK, v_BHTK, both, segments, causal=plain and mask.kind == "causal", block_sizes=blocks)

        arrays = (q_BHLK, k_BHTK, v_BHTK, FlashSegments(query_segments_BL, key_segments_BT), hidden_B1LT)
        if bias_BHLT is None or bias_BHLT.shape[0] == len(q_BHLK):
            return jnp.swapaxes(attend(*arrays), 1, 2)
        one_by_one = jax.tree.map(lambda x: x[:, None], arrays)
        return jnp.swapaxes(jax.lax.map(lambda row: attend(*row), one_by_one)[:, 0], 1, 2)

    def grid(x_BHLT):
        return None if x_BHLT is None else _padded(_padded(x_BHLT, 2, padded_q), 3, padded_k)

    operands = (
        _padded(_padded(q_BHLK, 2, padded_q), 3, padded_width), *(_padded(_padded(x, 2, padded_k), 3, padded_width) for x in (k_BHTK, v_BHTK)),
        _padded(mask.query_segments_BL, 1, padded_q), _padded(mask.key_segments_BT, 1, padded_k, HIDDEN), grid(bias_BHLT), grid(hidden_B1LT),
    )  # fmt: skip
    queries, keys = ("batch", "heads", "length", None), ("batch", "heads", None, None)
    words = (
        queries, keys, keys, ("batch", "length"), ("batch", None), bias_words(bias_BHLT), None if plain else ("batch", None, "length", None),
    )  # fmt: skip
    return spread(local, operands, words, ("batch", "length", "heads", None), layout=layout, sizes=sizes)[:, :length, :, :width]
