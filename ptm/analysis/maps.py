"""The attention maps of a text, with what its tokens are, and their figures by head."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ptm.analysis import attention, inputs
from ptm.fields import ConfigError
from ptm.models import Model

LONGEST_FLOW = 32  # tokens; attention flow takes a maximum flow for each pair of them
# Figures of a head and what they are; those of SELF exist where queries and keys are the same tokens.
FIGURES = {
    "entropy": "entropy of a query's weights, nats; log T = uniform over T keys", "special": "share of weight on special tokens",
    "distance": "mean distance between query and keys, tokens", "itself": "mean weight on the token itself",
    "previous": "mean weight on the previous token", "next": "mean weight on the next token",
}  # fmt: skip
SELF = ("distance", "itself", "previous", "next")


class View(NamedTuple):
    """One kind of attention of a text: its name, its queries and keys in readable form, which keys are special tokens, and the weights.

    `name` is self, or the part of the model: encoder, decoder, cross, generator, discriminator. Maps hold no padding.
    """

    name: str
    queries: list[str]
    keys: list[str]
    special_T: np.ndarray
    maps_NHLT: np.ndarray

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.name != "cross"


class Looker:
    """Reads texts with a model and keeps where it looks. The backend of attention is always xla: others never show their weights."""

    def __init__(self, model: Model, params: Any, *, tokenizer: Any, trained_mask: str) -> None:
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._mask = inputs.mask_of(model, trained_mask)
        # One head of each part: those of a part read the same hidden states.
        self._heads = {self._part(head): head for head in reversed(model.module.heads)} or {"self": None}

    def _part(self, head: str) -> str:
        return "".join(self._model.module.part_for(head).values()) or "self"

    @functools.cached_property
    def _run(self) -> Any:
        model = self._model

        def run(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            if model.config.kind == "encoder_decoder":
                encoded = model.encode(params, batch, maps=True)
                decoded = model.decode(params, batch, encoded, maps=True)
                return {"encoder": encoded.maps_NBHLT, "decoder": decoded.maps_NBHLT, "cross": decoded.cross_maps_NBHLT}
            return {part: model.hidden(params, batch, mask=self._mask, head=head, maps=True).maps_NBHLT for part, head in self._heads.items()}

        return jax.jit(run, out_shardings=model.module.context.layout.replicated())

    def look(self, text: str, second: str | None = None) -> list[View]:
        """The maps of a text: one view of encoders and decoders (ELECTRA: one a part), three of encoder-decoders, whose decoder reads `second`.

        Raises ConfigError if the text has no token or does not fit into the model.
        """
        encode, config = self._tokenizer.encode, self._model.config
        ids = encode(text)
        if not len(ids):
            raise ConfigError(f"the text {text!r} has no token; give one with words.")
        row = inputs.framed(self._tokenizer, config, ids, None if second is None else encode(second))
        if not inputs.fits(row, config):
            raise ConfigError(f"the text {text[:40]!r}... has {inputs.length_of(row)} tokens, but the model reads {config.max_length} at most; shorten it.")
        batch = inputs.batch_of([row], config, count=inputs.rows_at_once(self._model, 1))
        found = {name: np.asarray(maps[:, 0], np.float32) for name, maps in self._run(self._params, batch).items()}
        own, theirs = row.tokens_L, row.inputs_I
        sides = {"encoder": (theirs, theirs), "decoder": (own, own), "cross": (own, theirs)}
        order = list(sides) if theirs is not None else list(self._heads)  # a compiled function sorts its names
        return [self._view(name, found[name], *(sides[name] if name in sides else (own, own))) for name in order]

    def _view(self, name: str, maps_NHLT: np.ndarray, queries_L: np.ndarray, keys_T: np.ndarray) -> View:
        special_T = np.isin(keys_T, list(self._tokenizer.special_ids))
        return View(name, self._pieces(queries_L), self._pieces(keys_T), special_T, maps_NHLT[:, :, : len(queries_L), : len(keys_T)])

    def _pieces(self, ids: np.ndarray) -> list[str]:
        """Pieces of the vocabulary: what cannot be printed spelt out, a space alone as an open box."""
        shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in piece) for piece in self._tokenizer.pieces(ids)]
        return [piece if piece.strip() else "\N{OPEN BOX}" for piece in shown]


def figures(view: View) -> dict[str, np.ndarray]:
    """Figures of each head, [N, H] each, means over queries: those of FIGURES that exist."""
    maps = view.maps_NHLT
    found = {"entropy": attention.entropy(maps).mean(axis=-1), "special": attention.share(maps, view.special_T).mean(axis=-1)}
    if not view.square:
        return found
    offsets = {name: attention.at_offset(maps, offset) for name, offset in (("itself", 0), ("previous", -1), ("next", 1))}
    return found | {"distance": attention.distance(maps).mean(axis=-1)} | offsets


def over_texts(found: Sequence[dict[str, np.ndarray]], queries: Sequence[int]) -> dict[str, np.ndarray]:
    """Means of `figures` over several texts with so many queries each, in which each query counts once, [N, H] each."""
    totals = {}
    for name in found[0]:
        lost = name in ("previous", "next")  # one query of each text has no such key
        weights = np.array([count - lost for count in queries], np.float64)
        values = np.stack([np.nan_to_num(part[name]) for part in found])
        totals[name] = np.einsum("x,x...->...", weights, values) / weights.sum() if weights.sum() else np.full_like(values[0], np.nan)
    return totals


def flow(view: View) -> np.ndarray | None:
    """Attention flow of a view, [L, L]; None where it is not defined, or where the text is too long for it."""
    return attention.flow(view.maps_NHLT) if view.square and len(view.queries) <= LONGEST_FLOW else None
