"""Attention on any device, in plain XLA: all logits at once, or in blocks; NVIDIA's fused kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ptm.nn.dropout import bernoulli
from ptm.nn.masks import Mask
from ptm.nn.spread import axes_of, bias_words, mask_words, shares, spread
from ptm.parallel import Layout

MASKED = -1e30  # finite: a row that is wholly masked stays free of NaN
SAVED = "attention"  # name of what kernels that never hold all weights keep for the backward pass, for policies of recomputation


def heads_first(x_BTHK: jax.Array, *, joined: bool = False) -> jax.Array:
    """Keys or values [B, H, T, K]; with rows and heads `joined`, [B H, T, K]."""
    x_BHTK = jnp.swapaxes(x_BTHK, 1, 2)
    return x_BHTK.reshape(-1, *x_BHTK.shape[2:]) if joined else x_BHTK


def _wide(x: jax.Array) -> Any:
    """The type that sums of products of `x` are kept in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _grouped(x_BHLK: jax.Array, k_BHTK: jax.Array) -> jax.Array:
    """Queries (or what there is of each) as the keys have their rows and heads: those of heads that share their keys lie below each other."""
    return x_BHLK.reshape(*k_BHTK.shape[:-2], -1, x_BHLK.shape[-1])


def _logits(q_BHLK, k_BHTK, *, mask_B1LT, bias_BHLT):
    # Heads before positions: batched products of plain matrices.
    logits = jnp.einsum("...lk,...tk->...lt", _grouped(q_BHLK, k_BHTK), k_BHTK, preferred_element_type=_wide(q_BHLK))
    logits_BHLT = logits.reshape(*q_BHLK.shape[:3], -1)
    return jnp.where(mask_B1LT, logits_BHLT if bias_BHLT is None else logits_BHLT + bias_BHLT, MASKED)


def _weighted(weights_BHLT, v_BHTK):
    out = jnp.einsum("...lt,...tk->...lk", _grouped(weights_BHLT.astype(v_BHTK.dtype), v_BHTK), v_BHTK, preferred_element_type=_wide(v_BHTK))
    return out.reshape(*weights_BHLT.shape[:3], -1)


def _kept(rng, rate, shape):
    """What dropout multiplies weights by."""
    return bernoulli(rng, 1 - rate, shape) / (1 - rate)


def xla(q_BLHK, k_BHTK, v_BHTK, *, mask: Mask, bias_BHLT, scale, dropout, rng, maps=False):
    """Attention out_BLHK, the largest logit, and with `maps` the weights [B, H, L, T]: any mask, bias and dropout, memory quadratic in length."""
    logits_BHLT = _logits(jnp.swapaxes(q_BLHK * scale, 1, 2), k_BHTK, mask_B1LT=mask.dense(), bias_BHLT=bias_BHLT)
    largest_BHL1 = jax.lax.stop_gradient(jnp.max(logits_BHLT, axis=-1, keepdims=True))
    weights_BHLT = jnp.exp(logits_BHLT - largest_BHL1)
    total_BHL1 = jnp.sum(weights_BHLT, axis=-1, keepdims=True)
    maps_BHLT = weights_BHLT / total_BHL1 if maps else None
    if dropout:
        weights_BHLT = weights_BHLT * _kept(rng, dropout, weights_BHLT.shape)
    out_BHLK = _weighted(weights_BHLT, v_BHTK) / total_BHL1
    return jnp.swapaxes(out_BHLK, 1, 2).astype(v_BHTK.dtype), jnp.max(largest_BHL1), maps_BHLT


class _Blocks:
    """The blocks of queries and keys of one call, and what a block of each makes of the other."""

    def __init__(self, dropout: float, size: int, queries: int, keys: int, mask: Mask, bias_BHLT: jax.Array | None, rng: jax.Array | None):
        self.count, self.queries = self.divided(queries, size)
        self.key_count, self.keys = self.divided(keys, size)
        self.mask = mask.padded(self.count * self.queries, self.key_count * self.keys)
        self.bias_BHLT = None if bias_BHLT is None else self.along(self.along(bias_BHLT, 2), 3, keys=True)
        self.dropout, self.rng = dropout, rng

    @staticmethod
    def divided(length: int, size: int) -> tuple[int, int]:
        """Number and size of about equal blocks of at most `size`."""
        count = -(-length // size)
        return count, -(-length // count)

    def along(self, x: jax.Array, axis: int, *, keys: bool = False) -> jax.Array:
        """`x` with as many queries (or keys) as the blocks have."""
        length = self.key_count * self.keys if keys else self.count * self.queries
        return jnp.pad(x, [(0, length - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])

    def of_queries(self, x: jax.Array, i: jax.Array, axis: int = 2) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.queries, self.queries, axis)

    def of_keys(self, x: jax.Array, j: jax.Array, axis: int = -2) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.keys, self.keys, axis)

    def seen(self, i: jax.Array) -> tuple[jax.Array | int, jax.Array | int]:
        """Blocks of keys (from, to) that block i of the queries may see."""
        first, stop = self.mask.reach(i * self.queries, self.queries)
        return first // self.keys, -(-stop // self.keys)

    def logits(self, q_BHLK: jax.Array, k_BHTK: jax.Array, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits between block i of the queries and block j of the keys, and where they count."""
        mask_B1LT = self.mask.part(i * self.queries, self.queries).part_of_keys(j * self.keys, self.keys).dense()
        bias_BHLT = None if self.bias_BHLT is None else self.of_keys(self.of_queries(self.bias_BHLT, i), j, axis=3)
        return _logits(q_BHLK, k_BHTK, mask_B1LT=mask_B1LT, bias_BHLT=bias_BHLT), mask_B1LT

    def drop(self, weights_BHLT: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        if not self.dropout:
            return weights_BHLT
        return weights_BHLT * _kept(jax.random.fold_in(self.rng, i * self.key_count + j), self.dropout, weights_BHLT.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(dropout, size, q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT, rng):
    return _forward(dropout, size, q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT, rng)[0]


def _forward(dropout, size, q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT, rng):
    """Softmax over blocks of keys, with a running maximum and total (Milakov and Gimelshein 2018, section 3)."""
    length = q_BHLK.shape[2]
    blocks = _Blocks(dropout, size, length, k_BHTK.shape[-2], mask, bias_BHLT, rng)
    q_padded, k_padded, v_padded = blocks.along(q_BHLK, 2), blocks.along(k_BHTK, -2 % k_BHTK.ndim, keys=True), blocks.along(v_BHTK, -2 % v_BHTK.ndim, keys=True)
    wide = _wide(q_BHLK)

    def rows(top, i):
        q_block = blocks.of_queries(q_padded, i)

        def step(j, state):
            out_BHLK, largest_BHL1, total_BHL1 = state
            logits_BHLT, mask_B1LT = blocks.logits(q_block, blocks.of_keys(k_padded, j), i, j)
            larger_BHL1 = jnp.maximum(largest_BHL1, jnp.max(logits_BHLT, axis=-1, keepdims=True))
            weights_BHLT = jnp.where(mask_B1LT, jnp.exp(logits_BHLT - larger_BHL1), 0)
            before_BHL1 = jnp.exp(largest_BHL1 - larger_BHL1)
            out_BHLK = out_BHLK * before_BHL1 + _weighted(blocks.drop(weights_BHLT, i, j), blocks.of_keys(v_padded, j))
            return out_BHLK, larger_BHL1, total_BHL1 * before_BHL1 + jnp.sum(weights_BHLT, axis=-1, keepdims=True)

        zeros_BHLK, one_BHL1 = jnp.zeros((*q_block.shape[:3], v_BHTK.shape[-1]), wide), (*q_block.shape[:3], 1)
        start = (zeros_BHLK, jnp.full(one_BHL1, MASKED, wide), jnp.zeros(one_BHL1, wide))
        out_BHLK, largest_BHL1, total_BHL1 = jax.lax.fori_loop(*blocks.seen(i), step, start)
        total_BHL1 = jnp.where(total_BHL1 > 0, total_BHL1, 1)  # a query that sees nothing gets nothing
        done = ((out_BHLK / total_BHL1).astype(v_BHTK.dtype), (largest_BHL1 + jnp.log(total_BHL1))[..., 0])
        return jnp.maximum(top, jnp.max(largest_BHL1)), done

    top, (out_nBHLK, normalizer_nBHL) = jax.lax.scan(rows, jnp.asarray(MASKED, wide), jnp.arange(blocks.count))
    out_BHLK, normalizer_BHL = (jnp.moveaxis(x, 0, 2).reshape(*q_BHLK.shape[:2], -1, *x.shape[4:])[:, :, :length] for x in (out_nBHLK, normalizer_nBHL))
    out_BHLK, normalizer_BHL = checkpoint_name(out_BHLK, SAVED), checkpoint_name(normalizer_BHL, SAVED)
    return (out_BHLK, top), (q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT, rng, out_BHLK, normalizer_BHL)


def _backward(dropout, size, saved, cotangents):
    """Gradients from logits that are computed again, block by block (Dao et al. 2022, appendix B.2)."""
    q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT, rng, out_BHLK, normalizer_BHL = saved
    length, keys, wide = q_BHLK.shape[2], k_BHTK.shape[-2], _wide(q_BHLK)
    blocks = _Blocks(dropout, size, length, keys, mask, bias_BHLT, rng)
    pull_BHLK = cotangents[0]
    own_BHL1 = jnp.sum(pull_BHLK.astype(wide) * out_BHLK.astype(wide), axis=-1, keepdims=True)
    of_queries = tuple(blocks.along(x, 2) for x in (q_BHLK, pull_BHLK, own_BHL1, normalizer_BHL[..., None]))
    k_padded, v_padded = (blocks.along(x, -2 % x.ndim, keys=True) for x in (k_BHTK, v_BHTK))

    def added(total, x, j):
        part = blocks.of_keys(total, j) + x
        return jax.lax.dynamic_update_slice_in_dim(total, part, j * blocks.keys, axis=-2)

    def back(weights_BHLT, x_BHLK, like):
        weights, x = _grouped(weights_BHLT.astype(x_BHLK.dtype), like), _grouped(x_BHLK, like)
        return jnp.einsum("...lt,...lk->...tk", weights, x, preferred_element_type=wide)

    def rows(state, i):
        q_block, pull_block, own_block, normalizer_block = (blocks.of_queries(x, i) for x in of_queries)

        def step(j, state):
            dq_BHLK, dk_BHTK, dv_BHTK, dbias_BHLT = state
            k_block, v_block = blocks.of_keys(k_padded, j), blocks.of_keys(v_padded, j)
            logits_BHLT, mask_B1LT = blocks.logits(q_block, k_block, i, j)
            weights_BHLT = jnp.where(mask_B1LT, jnp.exp(logits_BHLT - normalizer_block), 0)
            dweights = jnp.einsum("...lk,...tk->...lt", _grouped(pull_block, v_block), v_block, preferred_element_type=wide)
            dlogits_BHLT = weights_BHLT * (blocks.drop(dweights.reshape(weights_BHLT.shape), i, j) - own_block)
            dv_BHTK = added(dv_BHTK, back(blocks.drop(weights_BHLT, i, j), pull_block, v_block), j)
            dk_BHTK = added(dk_BHTK, back(dlogits_BHLT, q_block, k_block), j)
            if dbias_BHLT is not None:
                part = jnp.sum(dlogits_BHLT, axis=0, keepdims=True) if dbias_BHLT.shape[0] == 1 else dlogits_BHLT
                dbias_BHLT = jax.lax.dynamic_update_slice(dbias_BHLT, part.astype(dbias_BHLT.dtype), (0, 0, i * blocks.queries, j * blocks.keys))
            return dq_BHLK + _weighted(dlogits_BHLT, k_block), dk_BHTK, dv_BHTK, dbias_BHLT

        dq_BHLK, *state = jax.lax.fori_loop(*blocks.seen(i), step, (jnp.zeros(q_block.shape, wide), *state))
        return tuple(state), dq_BHLK.astype(q_BHLK.dtype)

    start = (jnp.zeros(k_padded.shape, wide), jnp.zeros(v_padded.shape, wide), None if bias_BHLT is None else jnp.zeros_like(blocks.bias_BHLT))
    (dk_BHTK, dv_BHTK, dbias_BHLT), dq_nBHLK = jax.lax.scan(rows, start, jnp.arange(blocks.count))
    dq_BHLK = jnp.moveaxis(dq_nBHLK, 0, 2).reshape(*q_BHLK.shape[:2], -1, q_BHLK.shape[3])[:, :, :length]
    dbias_BHLT = None if bias_BHLT is None else dbias_BHLT[:, :, :length, :keys]
    return dq_BHLK, dk_BHTK[..., :keys, :].astype(k_BHTK.dtype), dv_BHTK[..., :keys, :].astype(v_BHTK.dtype), None, dbias_BHLT, None


_in_blocks.defvjp(_forward, _backward)


def chunked(q_BLHK, k_BHTK, v_BHTK, *, mask: Mask, bias_BHLT, scale, dropout, rng, chunk: int, layout: Layout):
    """Attention out_BLHK and the largest logit, `chunk` queries by `chunk` keys at a time: memory linear in length, forth and back.

    Blocks that the mask's kind or window hides are skipped. Where the queries lie on several devices, each computes its own.
    """
    q_BHLK = jnp.swapaxes(q_BLHK * scale, 1, 2)
    rows, heads, length, _ = q_BHLK.shape
    axes = axes_of(layout, "length", length)
    if not axes or dropout or k_BHTK.shape[1] % shares(layout, axes_of(layout, "heads", heads)):  # the numbers of dropout do not depend on the layout
        out_BHLK, largest = _in_blocks(dropout, chunk, q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT, rng)
        return jnp.swapaxes(out_BHLK, 1, 2), largest

    def local(q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT):
        mask = mask.replace(offset=mask.offset + jax.lax.axis_index(axes) * q_BHLK.shape[2])
        out_BHLK, largest = _in_blocks(0.0, chunk, q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT, None)
        return out_BHLK, jax.lax.pmax(jax.lax.stop_gradient(largest), layout.mesh.axis_names)

    by_head = ("batch", "heads", None, None)
    words = (("batch", "heads", "length", None), by_head, by_head, mask_words(mask), bias_words(bias_BHLT))
    sizes = {"batch": rows, "heads": heads, "length": length}
    out_BHLK, largest = spread(local, (q_BHLK, k_BHTK, v_BHTK, mask, bias_BHLT), words, (words[0], ()), layout=layout, sizes=sizes)
    return jnp.swapaxes(out_BHLK, 1, 2), largest


def cudnn(q_BLHK, k_BTHK, v_BTHK, *, mask: Mask, bias_BHLT, scale):
    """Attention out_BLHK by NVIDIA's fused kernel. Mask and bias are given to it whole, [B, 1 or H, L, T] in its own type."""
    shape = (q_BLHK.shape[0], 1, q_BLHK.shape[1], k_BTHK.shape[1])
    bias = None if bias_BHLT is None else bias_BHLT.astype(q_BLHK.dtype)
    return jax.nn.dot_product_attention(q_BLHK, k_BTHK, v_BTHK, bias=bias, mask=jnp.broadcast_to(mask.dense(), shape), scale=scale, implementation="cudnn")
