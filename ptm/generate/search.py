"""The search for a continuation on the devices: greedy, by drawing, or with beams (Graves 2012, section 3.2; Wu et al. 2016, section 7).

A row of the batch holds one prompt and K texts that continue it, the beams or the draws. Their new tokens stand in the row of the cache side by
side: place P + t * K + k, after the prompt's P places, holds the t-th token of slot k. A beam that goes on from another one only notes whose
tokens are its own, so no keys or values are ever moved, and the prompt's (as the encoder's) are there once for all K.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ptm.fields import ConfigError
from ptm.generate import processors
from ptm.generate.options import Options
from ptm.models import Model

NONE = -1e9  # score of a text that is not there; finite, so that sums and comparisons stay numbers


@flax.struct.dataclass
class Beams:
    """What beam search has besides its running texts: the best texts that ended, best first, and whether a running one may still be better."""

    tokens_BKN: jax.Array
    score_BK: jax.Array
    ended_BK: jax.Array
    open_B: jax.Array


@flax.struct.dataclass
class State:
    """A search after `made` tokens of each text.

    tokens_BKN: the texts, filled up with `fill`; score_BK: sums of log-probabilities; length_BK: tokens, the end token among them; done_BK: the
    texts that ended (of beams only once the whole search of a row has); slot_BKN: the slots of the cache that hold a text's tokens.
    """

    made: jax.Array
    tokens_BKN: jax.Array
    score_BK: jax.Array
    length_BK: jax.Array
    done_BK: jax.Array
    slot_BKN: jax.Array
    beams: Beams | None
    key_B: jax.Array
    prompt: dict[str, jax.Array]
    memory: Any
    cache: Any


@dataclasses.dataclass(frozen=True)
class Search:
    """What is static of a search: a compiled function depends on it and on shapes alone."""

    model: Model
    options: Options
    new_tokens: int
    eos_id: int | None
    fill: int
    vocab_size: int

    @property
    def width(self) -> int:
        """Texts that are followed at once."""
        return max(self.options.beams, self.options.n_best)

    @property
    def paired(self) -> bool:
        return self.model.config.kind == "encoder_decoder"

    def start(self, params: Any, batch: dict[str, jax.Array], rng: jax.Array) -> State:
        """The prompts read, the first token of each text chosen."""
        (rows, length), width, steps = batch["tokens_BL"].shape, self.width, self.new_tokens
        memory = self.model.memory(params, self.model.encode(params, batch)) if self.paired else None
        cache = self.model.empty_cache(rows=rows, length=length + (steps - 1) * width)
        logits_BLV, cache = self._forward(params, batch, memory, cache, last=1)
        zeros_BK, texts_BKN = jnp.zeros((rows, width), jnp.int32), jnp.full((rows, width, steps), self.fill, jnp.int32)
        kept = ("tokens_BL", "segments_BL", "positions_BL", "prefix_BL", "input_segments_BI")
        beams, score_BK = None, zeros_BK.astype(jnp.float32)
        absent_B = ~jnp.any(batch["segments_BL"] > 0, axis=1)  # rows that fill up the batch
        if self.options.beams > 1:
            # Only the first beam counts: all are the same yet.
            score_BK = score_BK.at[:, 1:].set(NONE)
            beams = Beams(tokens_BKN=texts_BKN, score_BK=jnp.full_like(score_BK, NONE), ended_BK=zeros_BK > 0, open_B=~absent_B)
        state = State(
            made=jnp.int32(0), tokens_BKN=texts_BKN, score_BK=score_BK, length_BK=zeros_BK, done_BK=jnp.broadcast_to(absent_B[:, None], zeros_BK.shape),
            slot_BKN=jnp.full_like(texts_BKN, -1), beams=beams, key_B=rng if rng.ndim else jax.random.split(rng, rows),
            prompt={name: batch[name] for name in kept if name in batch}, memory=memory, cache=cache,
        )  # fmt: skip
        return self._choose(jnp.broadcast_to(logits_BLV, (rows, width, logits_BLV.shape[-1])), state)

    def go_on(self, params: Any, state: State, *, until: jax.Array | int) -> State:
        """The search after `until` tokens, or where all texts ended."""

        def unfinished(state: State) -> jax.Array:
            return (state.made < until) & ~jnp.all(state.done_BK)

        def step(state: State) -> State:
            logits_BKV, cache = self._forward(params, self._newest(state), state.memory, state.cache, last=self.width)
            return self._choose(logits_BKV, state.replace(cache=cache))

        # What the loop does not change stays out of what it carries.
        fixed = {"prompt": state.prompt, "memory": state.memory}

        def carried(state: State) -> State:
            return state.replace(prompt=None, memory=None)

        return jax.lax.while_loop(unfinished, lambda carry: carried(step(carry.replace(**fixed))), carried(state)).replace(**fixed)

    def result(self, state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The `n_best` texts of each row, best first, their lengths with the end token, and their scores."""
        n, beams = self.options.n_best, state.beams
        if beams is not None:
            ends_BNT = self._ends(beams.tokens_BKN[:, :n])
            length_BN = jnp.where(jnp.any(ends_BNT, axis=2), jnp.argmax(ends_BNT, axis=2) + 1, self.new_tokens)
            return beams.tokens_BKN[:, :n], length_BN, beams.score_BK[:, :n]
        score_BN, order_BN = jax.lax.top_k(self._scaled(state.score_BK, jnp.maximum(state.length_BK, 1)), n)
        return _taken(state.tokens_BKN, order_BN), jnp.take_along_axis(state.length_BK, order_BN, axis=1), score_BN

    def _forward(self, params: Any, batch: dict[str, jax.Array], memory: Any, cache: Any, *, last: int) -> tuple[jax.Array, Any]:
        """Logits of the last tokens of a batch that continues the cache, float32, and the cache."""
        if self.paired:
            out = self.model.decode(params, batch, memory, cache=cache)
        else:
            out = self.model.hidden(params, batch, mask="prefix" if "prefix_BL" in batch else "causal", cache=cache)
        logits_BLV = self.model.logits(params, out.hidden_BLD[:, -last:], head="lm").astype(jnp.float32)
        return processors.only(logits_BLV, vocab_size=self.vocab_size), out.cache

    def _newest(self, state: State) -> dict[str, jax.Array]:
        """The batch of the tokens that were chosen last: those of a row stand side by side, each sees the prompt and what its own text holds."""
        (rows, width, steps), prompt = state.tokens_BKN.shape, state.prompt
        now = state.made - 1
        tokens_BK = jax.lax.dynamic_index_in_dim(state.tokens_BKN, now, axis=2, keepdims=False)
        ones_BK = jnp.ones((rows, width), jnp.int32)
        batch = {"tokens_BL": tokens_BK, "segments_BL": ones_BK, "positions_BL": prompt["positions_BL"][:, -1:] + 1 + now * ones_BK}
        if "prefix_BL" in prompt:
            batch["prefix_BL"] = 0 * ones_BK
        if self.paired:
            batch["input_segments_BI"] = prompt["input_segments_BI"]
        if width > 1:
            own_BKNS = state.slot_BKN[:, :, : steps - 1, None] == jnp.arange(width)
            prompt_BKT = jnp.ones((rows, width, prompt["tokens_BL"].shape[1]), bool)
            batch["visible_BLT"] = jnp.concatenate([prompt_BKT, own_BKNS.reshape(rows, width, -1)], axis=2)
        return batch

    def _choose(self, logits_BKV: jax.Array, state: State) -> State:
        return self._draw(logits_BKV, state) if state.beams is None else self._extend(logits_BKV, state)

    def _processed(self, logits_BKV: jax.Array, state: State) -> jax.Array:
        rows, width, _ = logits_BKV.shape
        history_GT = valid_GT = None
        length = state.prompt["tokens_BL"].shape[1]
        if processors.reads_history(self.options):
            steps = self.new_tokens
            prompts = (jnp.broadcast_to(x_BL[:, None], (rows, width, length)) for x_BL in (state.prompt["tokens_BL"], state.prompt["segments_BL"] > 0))
            texts = (state.tokens_BKN, jnp.broadcast_to(jnp.arange(steps) < state.made, (rows, width, steps)))
            history_GT, valid_GT = (jnp.concatenate(pair, axis=2).reshape(rows * width, -1) for pair in zip(prompts, texts))
        processed_GV = processors.process(
            logits_BKV.reshape(rows * width, -1), self.options, history_BT=history_GT, valid_BT=valid_GT, count=length + state.made, made=state.made,
            eos_id=self.eos_id,
        )  # fmt: skip
        return processed_GV.reshape(logits_BKV.shape)

    def _scaled(self, score_BK: jax.Array, length: jax.Array) -> jax.Array:
        return score_BK / length.astype(jnp.float32) ** self.options.length_penalty

    def _draw(self, logits_BKV: jax.Array, state: State) -> State:
        """Each text goes on by itself, with the likeliest token or one that is drawn."""
        processed_BKV = self._processed(logits_BKV, state)
        if self.options.temperature:
            draw = jax.vmap(lambda key, logits_KV: jax.random.categorical(jax.random.fold_in(key, state.made), logits_KV))
            tokens_BK = draw(state.key_B, processed_BKV).astype(jnp.int32)
        else:
            tokens_BK = jnp.argmax(processed_BKV, axis=-1).astype(jnp.int32)
        chosen_BK, theirs_BK = (jnp.take_along_axis(x_BKV, tokens_BK[..., None], axis=2)[..., 0] for x_BKV in (processed_BKV, logits_BKV))
        # Where everything is ruled out, the text ends.
        running_BK = ~state.done_BK & (chosen_BK > -jnp.inf)
        tokens_BK = jnp.where(running_BK, tokens_BK, self.fill)
        log_probability_BK = theirs_BK - jax.nn.logsumexp(logits_BKV, axis=-1)
        width = self.width
        slots_BK = jnp.broadcast_to(jnp.arange(width), tokens_BK.shape)
        return state.replace(
            made=state.made + 1, tokens_BKN=_put(state.tokens_BKN, tokens_BK, state.made), slot_BKN=_put(state.slot_BKN, slots_BK, state.made),
            score_BK=state.score_BK + jnp.where(running_BK, log_probability_BK, 0), length_BK=state.length_BK + running_BK,
            done_BK=~running_BK | self._ends(tokens_BK),
        )  # fmt: skip

    def _ends(self, tokens: jax.Array) -> jax.Array:
        return jnp.zeros(tokens.shape, bool) if self.eos_id is None else tokens == self.eos_id

    def _extend(self, logits_BKV: jax.Array, state: State) -> State:
        """One step of beam search.

        Of all continuations of a row the 2 K likeliest are looked at, so that K go on even if K of them end. Those that end among the first K join the
        texts that ended, of which the best K stay.
        """
        (rows, width, vocab), o, beams, made = logits_BKV.shape, self.options, state.beams, state.made + 1
        log_probability_BKV = self._processed(logits_BKV - jax.nn.logsumexp(logits_BKV, axis=-1, keepdims=True), state)
        sums_BG = (state.score_BK[..., None] + log_probability_BKV).reshape(rows, width * vocab)
        score_BC, place_BC = jax.lax.top_k(sums_BG, 2 * width)
        parent_BC, token_BC = place_BC // vocab, (place_BC % vocab).astype(jnp.int32)
        tokens_BCN = _put(_taken(state.tokens_BKN, parent_BC), token_BC, state.made)
        ends_BC = self._ends(token_BC) | (made >= self.new_tokens)

        ended_BC = ends_BC & (jnp.arange(2 * width) < width)
        full_B1 = jnp.all(beams.ended_BK, axis=1, keepdims=True) & o.early_stopping
        counted_BC = ended_BC & ~full_B1 & beams.open_B[:, None]
        candidate_BC = jnp.where(counted_BC, self._scaled(score_BC, made), NONE)
        best_BK, order_BK = jax.lax.top_k(jnp.concatenate([beams.score_BK, candidate_BC], axis=1), width)
        kept = Beams(
            tokens_BKN=_taken(jnp.concatenate([beams.tokens_BKN, tokens_BCN], axis=1), order_BK), score_BK=best_BK,
            ended_BK=jnp.take_along_axis(jnp.concatenate([beams.ended_BK, counted_BC], axis=1), order_BK, axis=1), open_B=beams.open_B,
        )  # fmt: skip

        score_BK, order_BK = jax.lax.top_k(jnp.where(ends_BC, score_BC + NONE, score_BC), width)
        parent_BK = jnp.take_along_axis(parent_BC, order_BK, axis=1)
        # Whether the likeliest running text, if it ended now, would be better than the worst that ended.
        worst_BK = jnp.where(kept.ended_BK, jnp.min(kept.score_BK, axis=1, keepdims=True), NONE)
        open_B = kept.open_B & jnp.any(self._scaled(score_BK[:, :1], made) > worst_BK, axis=1)
        going_on_B = open_B & ~(jnp.all(kept.ended_BK, axis=1) & o.early_stopping)
        slots_BK = jnp.broadcast_to(jnp.arange(width), parent_BK.shape)
        return state.replace(
            made=made, tokens_BKN=_taken(tokens_BCN, order_BK), score_BK=score_BK, length_BK=jnp.full_like(state.length_BK, made),
            slot_BKN=_put(_taken(state.slot_BKN, parent_BK), slots_BK, state.made), beams=kept.replace(open_B=open_B),
            done_BK=jnp.broadcast_to(~going_on_B[:, None], state.done_BK.shape),
        )  # fmt: skip


def _put(x_BKN: jax.Array, values_BK: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BKN, values_BK[..., None].astype(x_BKN.dtype), place, axis=2)


def _taken(x_BKN: jax.Array, order_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BKN, order_BK[..., None], axis=1)


# Compiled for each search and each shape of its state; `until` is an argument.
start = jax.jit(Search.start, static_argnames="self")
go_on = jax.jit(Search.go_on, static_argnames="self")
result = jax.jit(Search.result, static_argnames="self")


def make(
    model: Model, params: Any, *, options: Options, new_tokens: int, eos_id: int | None, pad_id: int | None, vocab_size: int
) -> tuple[Search, Any]:
    """A search with a model, and the parameters as it wants them. Raises ConfigError for a model that does not generate."""
    if model.config.kind == "encoder" or "lm" not in model.module.heads:
        what = "is an encoder, which has no order to write in" if model.config.kind == "encoder" else "has no language-model head"
        raise ConfigError(f"model {model.config.name} {what}; generation needs a decoder or an encoder-decoder with the head lm.")
    model, params = model.for_decoding(params)
    fill = next((token for token in (pad_id, eos_id) if token is not None), 0)
    return Search(model, options.on_device(), new_tokens, eos_id, fill, vocab_size), params


@functools.partial(jax.jit, static_argnames=("model", "options", "new_tokens", "eos_id", "pad_id", "vocab_size"))
def _generate(model: Model, params: Any, batch: dict[str, jax.Array], rng: jax.Array, **static: Any) -> tuple[jax.Array, jax.Array]:
    search, params = make(model, params, **static)
    state = search.start(params, batch, rng)
    tokens_BNT, _, score_BN = search.result(search.go_on(params, state, until=search.new_tokens))
    return tokens_BNT, score_BN


def generate(
    model: Model, params: Any, batch: dict[str, jax.Array], *, options: Options, new_tokens: int, eos_id: int | None, pad_id: int | None, vocab_size: int,
    rng: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(tokens_BNT, scores_BN): the `n_best` continuations of every row of a prompt batch, best first, each of at most `new_tokens` tokens.

    A decoder's batch holds tokens_BL, segments_BL (0 for padding, on the left) and positions_BL, and prefix_BL if it was trained under the prefix
    mask; an encoder-decoder's holds the encoder's fields too, and its prompt is the start token. A text ends with `eos_id`; behind that stands `pad_id`
    (without one the end token). Ids from `vocab_size` on are never chosen. Scores are sums of log-probabilities divided by length **
    length_penalty, those of beams after the processors, those of greedy and drawn texts the model's own. `rng` is a key, or a key for each row.
    One compiled function for each shape, model, `new_tokens` and set of options that the search depends on.
    """
    return _generate(
        model, params, batch, rng, options=options.on_device(), new_tokens=new_tokens, eos_id=eos_id, pad_id=pad_id, vocab_size=vocab_size
    )  # fmt: skip
