"""Cross entropy over the vocabulary that never holds all logits at once; sums, never means."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TokenSums:
    """Weighted sums over positions: negative log-likelihood (nats), squared log-normaliser, and hits of the most likely token."""

    nll: jax.Array
    log_z_squared: jax.Array
    correct: jax.Array


def cross_entropy(logits_of: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, *, chunk: int) -> TokenSums:
    """Sums over all positions of the cross entropy of `logits_of(hidden)` against `targets_BL`.

    Positions are taken in chunks of at most `chunk` tokens (one of each row at least), along the length so that rows stay where they
    are; each chunk's logits are computed again in the backward pass.
    """
    rows, length = targets_BL.shape

    def sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenSums:
        logits = logits_of(hidden).astype(jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum instead of a gather: its gradient is no scatter, and it needs no second buffer of logits.
        hit = targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
        target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        # Ties are misses: equal logits, all of them in an untrained head or some in bfloat16, are no prediction.
        correct = jnp.sum(logits >= target_logit[..., None], axis=-1) == 1
        return TokenSums(nll=jnp.sum((log_z - target_logit) * weights), log_z_squared=jnp.sum(jnp.square(log_z) * weights), correct=jnp.sum(correct * weights))

    if rows * length <= chunk or length == 1:
        return sums(hidden_BLD, targets_BL, weights_BL)
    size = -(-length // -(-length // max(1, chunk // rows)))  # as few chunks as `chunk` allows, all of about the same size
    count = -(-length // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))  # positions of weight 0
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(total: TokenSums, part: tuple) -> tuple[TokenSums, None]:
        return jax.tree.map(jnp.add, total, sums(*part)), None

    zero = TokenSums(nll=jnp.float32(0), log_z_squared=jnp.float32(0), correct=jnp.float32(0))
    return jax.lax.scan(step, zero, (split(hidden_BLD), split(targets_BL), split(weights_BL)))[0]
