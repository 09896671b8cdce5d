"""Cross entropy over the vocabulary that never holds all logits at once; sums, never means."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ptm.parallel import Layout, length_parts


@flax.struct.dataclass
class TokenSums:
    """Weighted sums over positions: negative log-likelihood (nats), squared log-normaliser, and hits of the most likely token."""

    nll: jax.Array
    log_z_squared: jax.Array
    correct: jax.Array


def at_least_float32(logits: jax.Array) -> jax.Array:
    """Logits in the type in which losses are computed: float32, or float64 if they are so."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def token_nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats of targets [...] by logits [..., V]."""
    hit = targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def cross_entropy(
    logits_of: Callable[[Any], jax.Array], hidden_BLD: Any, targets_BL: jax.Array, weights_BL: jax.Array, *, chunk: int, layout: Layout | None = None
) -> TokenSums:
    """Sums over all positions of the cross entropy of `logits_of(hidden)` against `targets_BL`; `hidden_BLD` is an array or a tree of arrays [B, L, ...].

    Positions are taken in chunks of at most `chunk` tokens (one of each row at least), along the length so that rows stay where they
    are; where a layout splits the length, each chunk is made of an equal part of what every device has, for the same reason. Each chunk's logits are
    computed again in the backward pass.
    """
    return cross_entropy_and(logits_of, hidden_BLD, targets_BL, weights_BL, chunk=chunk, layout=layout, read=lambda logits, hidden: None)[0]


def cross_entropy_and(
    logits_of: Callable[[Any], jax.Array], hidden_BLD: Any, targets_BL: jax.Array, weights_BL: jax.Array, *, chunk: int, layout: Layout | None = None,
    read: Callable[[jax.Array, Any], Any],
) -> tuple[TokenSums, Any]:  # fmt: skip
    """`cross_entropy`, and what `read(logits, hidden)` makes of the same logits: a tree of arrays [B, L, ...]."""
    rows, length = targets_BL.shape

    def sums(hidden: Any, targets: jax.Array, weights: jax.Array) -> tuple[TokenSums, Any]:
        logits = at_least_float32(logits_of(hidden))
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum instead of a gather: its gradient is no scatter, and it needs no second buffer of logits.
        hit = targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
        target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        # Ties are misses: equal logits, all of them in an untrained head or some in bfloat16, are no prediction.
        correct = jnp.sum(logits >= target_logit[..., None], axis=-1) == 1
        nll, log_z_squared = jnp.sum((log_z - target_logit) * weights), jnp.sum(jnp.square(log_z) * weights)
        return TokenSums(nll=nll, log_z_squared=log_z_squared, correct=jnp.sum(correct * weights)), read(logits, hidden)

    if rows * length <= chunk or length == 1:
        return sums(hidden_BLD, targets_BL, weights_BL)
    parts = 1 if layout is None else length_parts(layout)
    share = -(-length // parts)  # of a device
    size = -(-share // -(-share // max(1, chunk // (rows * parts))))  # as few chunks as `chunk` allows, all of about the same size
    count = -(-share // size)

    def split(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]

        def pad(x: jax.Array, dim: int, by: int) -> jax.Array:  # with positions of weight 0
            return jnp.pad(x, [(0, by if n == dim else 0) for n in range(x.ndim)])

        x = pad(pad(x, 1, parts * share - length).reshape(rows, parts, share, *rest), 2, count * size - share)
        x = jnp.moveaxis(x.reshape(rows, parts, count, size, *rest), 2, 0).reshape(count, rows, parts * size, *rest)
        return x if parts == 1 else layout.constrain(x, None, "batch", "length", *(["residual"] * len(rest)))

    def join(x: jax.Array) -> jax.Array:
        rest = x.shape[3:]
        x = jnp.moveaxis(x.reshape(count, rows, parts, size, *rest), 0, 2).reshape(rows, parts, count * size, *rest)
        return x[:, :, :share].reshape(rows, parts * share, *rest)[:, :length]

    @jax.checkpoint
    def step(total: TokenSums, part: tuple) -> tuple[TokenSums, Any]:
        found, seen = sums(*part)
        return jax.tree.map(jnp.add, total, found), seen

    chunks = jax.tree.map(split, (hidden_BLD, targets_BL, weights_BL))
    found, _ = jax.eval_shape(sums, *jax.tree.map(lambda x: x[0], chunks))
    total, seen = jax.lax.scan(step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found), chunks)
    return total, jax.tree.map(join, seen)


def uniform_nats(logits: jax.Array, hidden: Any) -> jax.Array:
    """Cross entropy in nats of a choice of all pieces alike against logits [..., V]: what smoothed labels add (Szegedy et al. 2016, section 7)."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)


def divergence(
    logits_of: Callable[[Any], jax.Array], teacher_logits_of: Callable[[Any], jax.Array], hidden_BLD: jax.Array, teacher_BLD: jax.Array, weights_BL: jax.Array,
    *, temperature: float, chunk: int, layout: Layout | None = None,
) -> jax.Array:  # fmt: skip
    """Sum over all positions of KL(teacher || student) in nats, both softened by a temperature, times its square (Hinton et al. 2015, section 2).

    The gradient is that of the cross entropy against soft labels. Chunks are those of `cross_entropy`; pieces that only one of the two has, as padding
    of a vocabulary, are left out.
    """

    def read(logits: jax.Array, hidden: tuple[jax.Array, jax.Array]) -> jax.Array:
        theirs = at_least_float32(teacher_logits_of(hidden[1]))
        size = min(logits.shape[-1], theirs.shape[-1])
        ours, theirs = (jax.nn.log_softmax(x[..., :size] / temperature) for x in (logits, theirs))
        return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)

    unused = jnp.zeros(weights_BL.shape, jnp.int32)  # hard labels
    _, nats_BL = cross_entropy_and(lambda hidden: logits_of(hidden[0]), (hidden_BLD, teacher_BLD), unused, weights_BL, chunk=chunk, layout=layout, read=read)
    return jnp.sum(nats_BL * weights_BL) * temperature**2
