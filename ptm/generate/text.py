"""Text in, text out: prompts become tokens as the model was trained on them, rows of few fixed shapes, and continuations text again."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm import fields
from ptm.fields import ConfigError
from ptm.generate import search as search_lib
from ptm.generate.options import Options
from ptm.generate.search import Search, State
from ptm.models import Model
from ptm.text import Tokenizer

LOOK_AHEAD = 8  # batches of prompts that are sorted by length together
CHUNK = 16  # tokens between two looks at the text, where it may end before its end token
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a character shows whose last bytes are yet to come


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands around a prompt: tokens before and behind it, and the kind of mask under which a decoder was trained.

    `start` is the first token of an encoder-decoder's decoder, `end` the token that ends a text, None = the tokenizer's eos.
    """

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    mask: str = "causal"
    start: int | None = None
    end: int | None = None


def frame_of(model: Model, tokenizer: Tokenizer, *, mask: str = "causal", boundaries: bool = True) -> Frame:
    """The usual frame of a model: a decoder's texts begin with bos, or eos without one; an encoder-decoder's inputs end with eos, its outputs begin with pad.

    `boundaries` off: nothing stands around a text. Raises ConfigError where the tokenizer lacks what it takes.
    """
    if model.config.kind == "encoder_decoder":
        if tokenizer.pad_id is None:
            raise ConfigError(f"model {model.config.name} begins its output with the piece pad, and this tokenizer has none; give the frame's start.")
        return Frame(behind=_known(tokenizer.eos_id) if boundaries else (), start=tokenizer.pad_id)
    return Frame(before=(_known(tokenizer.bos_id) or _known(tokenizer.eos_id)) if boundaries else (), mask=mask)


def _known(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


class Completion(NamedTuple):
    """A continuation: its text, cut at a stop text; its tokens, the end token not among them; its score; and what ended it: end, stop or length."""

    text: str
    tokens: list[int]
    score: float
    ended: str


def complete(
    model: Model, params: Any, tokenizer: Tokenizer, prompts: Iterable[str], *, options: Options, batch_size: int = 8, frame: Frame | None = None
) -> Iterator[list[Completion]]:
    """The `n_best` continuations of each prompt, in the order of the prompts, which are read as continuations are taken.

    Prompts of about the same length share a batch, among some batches that are read ahead; what a prompt gets does not depend on the others.
    `frame` None is `frame_of` the model. Raises ConfigError for a model that does not generate, options that contradict each other, and a prompt that
    is too long or has no token to begin with, by its number from 1.
    """
    writer = Writer.of(model, params, tokenizer, options, frame)
    return writer.complete((writer.row(number, prompt) for number, prompt in enumerate(prompts)), batch_size=batch_size)


def stream(
    model: Model, params: Any, tokenizer: Tokenizer, prompt: str, *, options: Options, frame: Frame | None = None, every: int = 4
) -> Iterator[str]:
    """The continuation of one prompt piece by piece, as it is made: `every` so many tokens what is sure to stay. Not for beam search, whose texts change.

    The pieces together are the text that `complete` gives for it. Raises ConfigError as `complete` does.
    """
    if options.beams > 1 or options.n_best > 1:
        raise ConfigError(f"beams={options.beams}, n_best={options.n_best}: one text can be shown while it is made; set both to 1.")
    writer = Writer.of(model, params, tokenizer, options, frame)
    row, shown = writer.row(0, prompt), ""
    for completion, over in writer.watch(row, every=every):
        text = completion.text if over else _settled(completion.text, options.stop)
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a text that more tokens cannot change: no unfinished character, no beginning of a stop text at its end."""
    text = text.rstrip(UNFINISHED)
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]


class Row(NamedTuple):
    """A prompt: its number, its framed tokens, and the text that decoding them gives."""

    number: int
    tokens: np.ndarray
    text: str


@dataclasses.dataclass(frozen=True)
class Writer:
    """A search together with the text around it: prompts become rows, rows continuations."""

    search: Search
    params: Any
    tokenizer: Tokenizer
    options: Options
    frame: Frame

    @classmethod
    def of(cls, model: Model, params: Any, tokenizer: Tokenizer, options: Options, frame: Frame | None) -> "Writer":
        fields.check(options, "")
        if model.module.context.layout.mesh.is_multi_process:
            raise ConfigError("text is generated freely on the devices of one process: load the model with devices=jax.local_devices(), or use an eval of the run.")
        frame = frame_of(model, tokenizer) if frame is None else frame
        search, params = search_lib.make(
            model, jax.tree.map(jnp.asarray, params), options=options, new_tokens=options.max_new_tokens,
            eos_id=tokenizer.eos_id if frame.end is None else frame.end, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        limit, least = model.config.max_length, 0 if search.paired else 1
        if limit is not None and options.max_new_tokens + least > limit:
            given = f"max_new_tokens={options.max_new_tokens} does not fit the {limit} positions of model {model.config.name}"
            raise ConfigError(f"{given}; allowed: up to {limit - least}.")
        return cls(search, params, tokenizer, options, frame)

    def row(self, number: int, prompt: str) -> Row:
        """The row of a prompt. Raises ConfigError if it is empty or too long and must not be cut."""
        config, frame = self.search.model.config, self.frame
        tokens = self.tokenizer.encode(prompt)
        most = None if config.max_length is None else config.max_length - (0 if self.search.paired else self.options.max_new_tokens)
        room = None if most is None else most - len(frame.before) - len(frame.behind)
        if room is not None and len(tokens) > room:
            beside = f"max_new_tokens={self.options.max_new_tokens} in {config.max_length} positions"
            text = f"prompt {number + 1} has {len(tokens)} tokens; {room} fit beside {beside}"
            if self.options.too_long == "refuse" or room < 1:
                raise ConfigError(f"{text}. Make it shorter, or max_new_tokens smaller, or set too_long=cut.")
            logging.getLogger(__name__).warning("%s: cut at its %s", text, "end" if self.search.paired else "beginning")
            tokens = tokens[:room] if self.search.paired else tokens[-room:]
        framed = np.concatenate([frame.before, tokens, frame.behind]).astype(np.int32)
        if not len(framed):
            raise ConfigError(f"prompt {number + 1} is empty and this tokenizer has no piece to begin a text with; give it at least one character.")
        return Row(number, framed, "" if self.search.paired else self.tokenizer.decode(framed))

    def batch(self, rows: Sequence[Row], *, most: int) -> dict[str, np.ndarray]:
        """The batch of some rows of one bucket, and rows of padding up to a power of two or `most`, and to what the devices share."""
        shape = self.search.model.module.context.layout.mesh.shape
        parts, size = shape["data"] * shape["fsdp"], min(most, 1 << (len(rows) - 1).bit_length())
        count, length = -(-size // parts) * parts, _bucket(max(len(row.tokens) for row in rows))
        tokens, segments, positions = (np.zeros((count, length), np.int32) for _ in range(3))
        for n, row in enumerate(rows):
            size = len(row.tokens)
            place = slice(0, size) if self.search.paired else slice(length - size, length)
            tokens[n, place], segments[n, place], positions[n, place] = row.tokens, 1, np.arange(size)
        if not self.search.paired:
            prefix = {"prefix_BL": segments} if self.frame.mask == "prefix" else {}
            return {"tokens_BL": tokens, "segments_BL": segments, "positions_BL": positions, **prefix}
        start = np.full((count, 1), self.frame.start, np.int32)
        decoder = {"tokens_BL": start, "segments_BL": segments[:, :1], "positions_BL": np.zeros_like(start)}
        return {**decoder, "inputs_BI": tokens, "input_segments_BI": segments, "input_positions_BI": positions}

    def complete(self, rows: Iterable[Row], *, batch_size: int) -> Iterator[list[Completion]]:
        """The continuations of each row in order, of rows that are read ahead some batches at a time."""
        rows = iter(rows)
        while window := list(itertools.islice(rows, batch_size * LOOK_AHEAD)):
            order = sorted(range(len(window)), key=lambda n: (_bucket(len(window[n].tokens)), n))
            found: dict[int, list[Completion]] = {}
            for _, group in itertools.groupby(order, key=lambda n: _bucket(len(window[n].tokens))):
                members = list(group)
                for first in range(0, len(members), batch_size):
                    chosen = members[first : first + batch_size]
                    found |= zip(chosen, self.write([window[n] for n in chosen], most=batch_size))
            yield from (found[n] for n in range(len(window)))

    def start(self, rows: Sequence[Row], *, most: int) -> State:
        batch = jax.device_put(self.batch(rows, most=most), self.search.model.module.context.layout.batch())
        numbers = jnp.asarray([row.number for row in rows] + [0] * (len(batch["tokens_BL"]) - len(rows)))
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(self.options.seed)))(numbers)
        return search_lib.start(self.search, self.params, batch, keys)

    def write(self, rows: Sequence[Row], *, most: int) -> list[list[Completion]]:
        """The continuations of some rows of one bucket."""
        state, last = self.start(rows, most=most), self.search.new_tokens
        if self.options.stop and state.beams is None:
            for until in range(CHUNK, last, CHUNK):
                state = search_lib.go_on(self.search, self.params, state, until=until)
                done_BK = np.array(state.done_BK)
                for n, row in enumerate(rows):
                    done_BK[n] |= [made.ended == "stop" for made in self._so_far(row, state, n)]
                state = state.replace(done_BK=jax.device_put(done_BK, state.done_BK.sharding))
                if done_BK.all():
                    break
        state = search_lib.go_on(self.search, self.params, state, until=last)
        tokens_BNT, length_BN, score_BN = map(np.asarray, search_lib.result(self.search, state))
        return [
            [self._completion(row, tokens_BNT[n, k, : length_BN[n, k]], score_BN[n, k]) for k in range(self.options.n_best)] for n, row in enumerate(rows)
        ]

    def watch(self, row: Row, *, every: int) -> Iterator[tuple[Completion, bool]]:
        """What a row has become after `every` so many tokens, and whether that is all."""
        state, last = self.start([row], most=1), self.search.new_tokens
        for until in [*range(every, last, every), last]:
            state = search_lib.go_on(self.search, self.params, state, until=until)
            (made,) = self._so_far(row, state, 0)
            over = until == last or made.ended == "stop" or bool(state.done_BK[0, 0])
            yield made, over
            if over:
                return

    def _so_far(self, row: Row, state: State, n: int) -> list[Completion]:
        """The texts of row `n`, by slot, without their scores."""
        tokens_KN, length_K = np.asarray(state.tokens_BKN[n]), np.asarray(state.length_BK[n])
        return [self._completion(row, tokens[:length], 0.0) for tokens, length in zip(tokens_KN, length_K)]

    def _completion(self, row: Row, tokens: np.ndarray, score: float) -> Completion:
        full = len(tokens) == self.search.new_tokens and tokens[-1] != self.search.eos_id
        kept = tokens[:-1] if len(tokens) and tokens[-1] == self.search.eos_id else tokens
        # Some vocabularies drop a text's first space: what the prompt's text grows by is the continuation.
        whole = self.tokenizer.decode(kept if self.search.paired else [*row.tokens, *kept])
        text = whole[len(row.text) :] if whole.startswith(row.text) else self.tokenizer.decode(kept)
        places = [place for stop in self.options.stop if (place := text.find(stop)) >= 0]
        return Completion(text[: min(places, default=len(text))], kept.tolist(), float(score), "stop" if places else "length" if full else "end")


def _bucket(length: int) -> int:
    """The length of the rows that hold a prompt: few different ones, none more than a quarter too long (or 7 tokens)."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step
