"""What changes a model's logits before a token is chosen: pure functions of logits [B, V], in the order in which `process` applies them.

A piece that is ruled out has the logit -inf. `history_BT` are the tokens before the one to be chosen and `valid_BT` those of its places that count:
neither padding nor what is yet to come, which begins at place `count`.
"""

import jax
import jax.numpy as jnp

from ptm.generate.options import Options


def only(logits_BV: jax.Array, *, vocab_size: int) -> jax.Array:
    """Rules out the ids from `vocab_size` on, rows of a table that stand for no piece."""
    return logits_BV if logits_BV.shape[-1] == vocab_size else jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)


def penalise_repetition(logits_BV: jax.Array, history_BT: jax.Array, valid_BT: jax.Array, *, penalty: float) -> jax.Array:
    """Positive logits of tokens of the history divided by `penalty`, negative ones multiplied (Keskar et al. 2019, section 4.1, for both signs)."""
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(_marked(logits_BV, history_BT, valid_BT), penalised_BV, logits_BV)


def ban_ngrams(logits_BV: jax.Array, history_BT: jax.Array, valid_BT: jax.Array, *, count: jax.Array | int, size: int) -> jax.Array:
    """Rules out every token that would end a sequence of `size` tokens which the history holds already (Paulus et al. 2018, section 2.5)."""
    places = history_BT.shape[1] - size + 1  # of such a sequence
    if places < 1:
        return logits_BV
    last = count - (size - 1) + jnp.arange(size - 1)
    last_BN, known_BN = (jnp.take(x_BT, jnp.maximum(last, 0), axis=1) for x_BT in (history_BT, valid_BT))
    same_BT = jnp.broadcast_to(jnp.all(known_BN, axis=1, keepdims=True), (len(history_BT), places)) & (jnp.arange(places) + size <= count)
    for n in range(size):
        same_BT &= valid_BT[:, n : n + places]
        if n < size - 1:
            same_BT &= history_BT[:, n : n + places] == last_BN[:, n, None]
    return jnp.where(_marked(logits_BV, history_BT[:, size - 1 :], same_BT), -jnp.inf, logits_BV)


def _marked(logits_BV: jax.Array, tokens_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Which pieces are among the valid tokens of a row, [B, V]."""
    size = logits_BV.shape[-1]
    rows = jnp.arange(len(tokens_BT))[:, None]
    return jnp.zeros((len(tokens_BT), size), bool).at[rows, jnp.where(valid_BT, tokens_BT, size)].set(True, mode="drop")


def forbid(logits_BV: jax.Array, *, token: int, when: jax.Array) -> jax.Array:
    """Rules out a token (the end of the text) where `when` holds."""
    return jnp.where((jnp.arange(logits_BV.shape[-1]) == token) & when, -jnp.inf, logits_BV)


def keep_top_k(logits_BV: jax.Array, *, k: int) -> jax.Array:
    """Keeps the `k` largest logits, and those that equal the k-th (Fan et al. 2018, section 5.4)."""
    kth_B1 = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][..., -1:]
    return jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, *, p: float) -> jax.Array:
    """Keeps the fewest likeliest pieces that together have a probability of `p` or more (Holtzman et al. 2020, section 3.1), and those that equal the last.

    The smallest logit that stays is found by bisection: a logit stays if all above it have less than `p`. Sorting takes ten times as long on CPUs.
    """
    probability_BV, order_BV = jax.nn.softmax(logits_BV, axis=-1), _ordered(logits_BV)
    nothing_B = jnp.zeros(logits_BV.shape[:-1], jnp.uint32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        above_B = jnp.sum(jnp.where(order_BV > middle_B[..., None], probability_BV, 0), axis=-1)
        return jnp.where(above_B < p, low_B, middle_B + 1), jnp.where(above_B < p, middle_B, high_B)

    smallest_B, _ = jax.lax.fori_loop(0, 32, halve, (nothing_B, ~nothing_B))
    return jnp.where(order_BV < smallest_B[..., None], -jnp.inf, logits_BV)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 numbers that have their bits: those of negative ones turned round, the sign for a leading bit."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def keep_min_p(logits_BV: jax.Array, *, p: float) -> jax.Array:
    """Keeps the pieces with at least `p` times the probability of the likeliest one (Nguyen et al. 2024, section 3)."""
    probability_BV = jax.nn.softmax(logits_BV, axis=-1)
    return jnp.where(probability_BV < p * jnp.max(probability_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV)


def process(
    logits_BV: jax.Array, options: Options, *, history_BT: jax.Array | None, valid_BT: jax.Array | None, count: jax.Array | int, made: jax.Array | int,
    eos_id: int | None,
) -> jax.Array:  # fmt: skip
    """The logits (or log-probabilities) from which the next token is chosen; `made` tokens of the text were. Needs a history where `reads_history`."""
    if options.repetition_penalty != 1:
        logits_BV = penalise_repetition(logits_BV, history_BT, valid_BT, penalty=options.repetition_penalty)
    if options.no_repeat_ngram is not None:
        logits_BV = ban_ngrams(logits_BV, history_BT, valid_BT, count=count, size=options.no_repeat_ngram)
    if options.min_new_tokens and eos_id is not None:
        logits_BV = forbid(logits_BV, token=eos_id, when=jnp.asarray(made < options.min_new_tokens))
    if options.temperature:
        logits_BV = logits_BV / options.temperature
        if options.top_k is not None:
            logits_BV = keep_top_k(logits_BV, k=options.top_k)
        if options.top_p < 1:
            logits_BV = keep_top_p(logits_BV, p=options.top_p)
        if options.min_p:
            logits_BV = keep_min_p(logits_BV, p=options.min_p)
    return logits_BV


def reads_history(options: Options) -> bool:
    """Whether logits depend on the tokens before."""
    return options.repetition_penalty != 1 or options.no_repeat_ngram is not None
