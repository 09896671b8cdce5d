"""Greedy decoding and sampling with a cache: one prefill of the prompt, then one token a step, all in one compiled function."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ptm.models import Model


def _pick(logits_BV: jax.Array, *, vocab_size: int, temperature: float, rng: jax.Array) -> jax.Array:
    """Next tokens [B]; ids past the tokenizer's are never picked. Temperature 0 is greedy."""
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV.astype(jnp.float32), -jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(rng, logits_BV / temperature, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "new_tokens", "vocab_size", "temperature"))
def generate(
    model: Model, params: Any, batch: dict[str, jax.Array], *, new_tokens: int, vocab_size: int, temperature: float, rng: jax.Array
) -> jax.Array:
    """`new_tokens` more tokens [B, new_tokens] for every row of a prompt batch.

    A decoder's batch holds tokens_BL, segments_BL (0 for padding on the left) and positions_BL, and prefix_BL if it was trained under the prefix mask;
    an encoder-decoder's holds the encoder's fields too, and its prompt is the start token. Rows go on after an end token: the caller cuts them.
    """
    rows, length = batch["tokens_BL"].shape
    encoder_decoder = model.config.kind == "encoder_decoder"
    encoded = model.encode(params, batch) if encoder_decoder else None
    mask = "prefix" if "prefix_BL" in batch else "causal"

    def forward(part: dict[str, jax.Array], cache: Any) -> tuple[jax.Array, Any]:
        out = model.decode(params, part, encoded, cache=cache) if encoder_decoder else model.hidden(params, part, mask=mask, cache=cache)
        return model.logits(params, out.hidden_BLD[:, -1], head="lm"), out.cache

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        logits_BV, cache, position_B = carry
        token_B = _pick(logits_BV, vocab_size=vocab_size, temperature=temperature, rng=key)
        ones = jnp.ones((rows, 1), jnp.int32)
        own = {"prefix_BL": jnp.zeros_like(ones)} if mask == "prefix" else {}
        shared = {name: batch[name] for name in ("input_segments_BI",) if name in batch}
        part = {"tokens_BL": token_B[:, None], "segments_BL": ones, "positions_BL": position_B[:, None], **own, **shared}
        logits_BV, cache = forward(part, cache)
        return (logits_BV, cache, position_B + 1), token_B

    logits_BV, cache = forward(batch, model.empty_cache(rows=rows, length=length + new_tokens))
    start = (logits_BV, cache, batch["positions_BL"][:, -1] + 1)
    _, tokens_NB = jax.lax.scan(step, start, jax.random.split(rng, new_tokens))
    return tokens_NB.T
