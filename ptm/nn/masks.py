"""Who may attend to whom, kept as small arrays until a backend needs more."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

KINDS = ("full", "causal", "prefix", "permutation")
HIDDEN = -1  # segment of keys that no query sees


@flax.struct.dataclass
class Mask:
    """Attention within a segment, by kind:

    full: to every position. causal: to the same and earlier indices of the row. prefix: as causal, and to every position of the prefix
    (Raffel et al. 2020, section 3.2.1), with which its segment begins. permutation: to positions of a smaller rank, rank 0 being visible to all, and with `own` to the
    position itself (Yang et al. 2019, section 2.3).

    Padding is segment 0 and attends to padding alone, so that no row of the softmax is empty. `window` = (left, right) hides indices
    further away than so many.
    """

    kind: str = flax.struct.field(pytree_node=False)
    query_segments_BL: jax.Array
    key_segments_BT: jax.Array
    offset: jax.Array | int = 0  # index of the first query among the keys, when decoding from a cache or reading a memory
    key_prefix_BT: jax.Array | None = None  # 1 at positions of the prefix
    query_rank_BL: jax.Array | None = None
    key_rank_BT: jax.Array | None = None
    query_index_BL: jax.Array | None = None  # index of each query among the keys, where they do not follow one another from `offset` on
    key_index_BT: jax.Array | None = None  # index of each key, where it is not its place in the row; queries then have theirs too
    visible_BLT: jax.Array | None = None  # what else decides, if given: which keys of a cache are of the same text as a query
    own: bool = flax.struct.field(pytree_node=False, default=True)
    window: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)

    def _queries(self, change: Callable[[jax.Array], jax.Array]) -> "Mask":
        """The mask with `change` made to what there is of each query, [B, L] or [B, L, T]."""
        names = ("query_segments_BL", "query_rank_BL", "query_index_BL", "visible_BLT")
        return self.replace(**{name: change(getattr(self, name)) for name in names if getattr(self, name) is not None})

    def _keys(self, change: Callable[[jax.Array], jax.Array]) -> "Mask":
        """The mask with `change` made to what there is of each key, the last dimension."""
        names = ("key_segments_BT", "key_prefix_BT", "key_rank_BT", "key_index_BT", "visible_BLT")
        return self.replace(**{name: change(getattr(self, name)) for name in names if getattr(self, name) is not None})

    def padded(self, length: int, keys: int) -> "Mask":
        """The mask with `length` queries and `keys` keys; the new queries are padding, the new keys hidden."""

        def lengthen(x_BL: jax.Array) -> jax.Array:
            return jnp.pad(x_BL, [(0, 0), (0, length - x_BL.shape[1]), (0, 0)][: x_BL.ndim])

        def widen(x_BT: jax.Array, value: int = 0) -> jax.Array:
            return jnp.pad(x_BT, [(0, 0)] * (x_BT.ndim - 1) + [(0, keys - x_BT.shape[-1])], constant_values=value)

        return self._queries(lengthen)._keys(widen).replace(key_segments_BT=widen(self.key_segments_BT, HIDDEN))

    def part(self, start: jax.Array, size: int) -> "Mask":
        """The mask of `size` of its queries, from `start` on."""
        return self._queries(lambda x_BL: jax.lax.dynamic_slice_in_dim(x_BL, start, size, axis=1)).replace(offset=self.offset + start)

    def part_of_keys(self, start: jax.Array, size: int) -> "Mask":
        """The mask towards `size` of its keys, from `start` on."""
        _, key_index_BT = self.indices()
        return self.replace(key_index_BT=key_index_BT)._keys(lambda x_BT: jax.lax.dynamic_slice_in_dim(x_BT, start, size, axis=-1))

    def reach(self, start: jax.Array, size: int) -> tuple[jax.Array | int, jax.Array | int]:
        """Keys (from, to) outside of which `size` queries from `start` on see nothing, as far as kind and window tell."""
        first, stop = 0, self.key_segments_BT.shape[1]
        if self.query_index_BL is not None or self.key_index_BT is not None:
            return first, stop
        query, keys = self.offset + start, stop
        if self.kind == "causal":
            stop = jnp.clip(query + size, 0, keys)
        if self.window is not None:
            left, right = self.window
            first, stop = jnp.clip(query - left, 0, keys), jnp.minimum(stop, jnp.clip(query + size + right, 0, keys))
        return first, stop

    @property
    def in_order(self) -> bool:
        """Whether query n of a row stands at key n and kind, segments and window say all: what fused kernels can be told."""
        return isinstance(self.offset, int) and self.offset == 0 and self.query_index_BL is None and self.key_index_BT is None and self.visible_BLT is None

    def last_visible(self) -> jax.Array:
        """Index of the last key that each query of a prefix mask in order sees, [B, L]: the end of the prefix for those in it, else its own."""
        length = self.key_segments_BT.shape[1]
        goes_on_BT = (self.key_prefix_BT[:, 1:] > 0) & (self.key_segments_BT[:, 1:] == self.key_segments_BT[:, :-1])
        goes_on_BT = jnp.pad(goes_on_BT, [(0, 0), (0, 1)]) & (self.key_prefix_BT > 0)
        return jax.lax.cummin(jnp.where(goes_on_BT, length, jnp.arange(length)), axis=1, reverse=True)

    def behind(self, valid_BM: jax.Array) -> "Mask":
        """The mask with M remembered positions before the keys; those that are valid are visible to the first segment, as context of rank 0."""

        def grown(x_BT: jax.Array | None, before_BM: jax.Array) -> jax.Array | None:
            return None if x_BT is None else jnp.concatenate([before_BM.astype(x_BT.dtype), x_BT], axis=1)

        nothing_BM = jnp.zeros_like(valid_BM, jnp.int32)
        return self.replace(
            key_segments_BT=grown(self.key_segments_BT, jnp.where(valid_BM > 0, 1, HIDDEN)), key_prefix_BT=grown(self.key_prefix_BT, nothing_BM),
            key_rank_BT=grown(self.key_rank_BT, nothing_BM), offset=self.offset + valid_BM.shape[1],
        )  # fmt: skip

    def at(self, index_BS: jax.Array) -> "Mask":
        """The mask of queries of their own that stand at some positions (L = nowhere: with the padding) and do not see what stands there."""

        def taken(x_BL: jax.Array | None) -> jax.Array | None:
            return None if x_BL is None else jnp.take_along_axis(x_BL, index_BS, axis=1, mode="fill", fill_value=0)

        return self.replace(
            query_segments_BL=taken(self.query_segments_BL), query_rank_BL=taken(self.query_rank_BL), query_index_BL=self.offset + index_BS, own=False
        )  # fmt: skip

    def indices(self) -> tuple[jax.Array, jax.Array]:
        """Index of each query [B, L] and of each key [B, T]; B is 1 where rows are alike."""
        queries = (self.offset + jnp.arange(self.query_segments_BL.shape[1]))[None] if self.query_index_BL is None else self.query_index_BL
        return queries, jnp.arange(self.key_segments_BT.shape[1])[None] if self.key_index_BT is None else self.key_index_BT

    def dense(self) -> jax.Array:
        """The mask as booleans mask_B1LT, true where attention is allowed."""
        allowed_BLT = self.query_segments_BL[:, :, None] == self.key_segments_BT[:, None, :]
        query_index_BL, key_index_BT = self.indices()
        query_index_BL1, key_index_B1T = query_index_BL[:, :, None], key_index_BT[:, None, :]
        if self.kind == "causal":
            allowed_BLT &= key_index_B1T <= query_index_BL1
        elif self.kind == "prefix":
            allowed_BLT &= (key_index_B1T <= query_index_BL1) | (self.key_prefix_BT[:, None, :] > 0)
        elif self.kind == "permutation":
            seen_BLT = self.key_rank_BT[:, None, :] < jnp.maximum(self.query_rank_BL, 1)[:, :, None]
            allowed_BLT &= seen_BLT | (key_index_B1T == query_index_BL1) if self.own else seen_BLT
        if self.window is not None:
            left, right = self.window
            allowed_BLT &= (key_index_B1T >= query_index_BL1 - left) & (key_index_B1T <= query_index_BL1 + right)
        if self.visible_BLT is not None:
            allowed_BLT &= self.visible_BLT
        return allowed_BLT[:, None]


def self_mask(kind: str, batch: dict[str, jax.Array]) -> Mask:
    """The mask of self-attention over rows of packed segments; `prefix` and `permutation` read prefix_BL and rank_BL."""
    assert kind in KINDS, kind
    segments_BL = batch["segments_BL"]
    rank_BL = batch["rank_BL"] if kind == "permutation" else None
    prefix_BL = batch["prefix_BL"] if kind == "prefix" else None
    return Mask(kind=kind, query_segments_BL=segments_BL, key_segments_BT=segments_BL, key_prefix_BT=prefix_BL, query_rank_BL=rank_BL, key_rank_BT=rank_BL)


def encoder_mask(batch: dict[str, jax.Array]) -> Mask:
    """The mask of an encoder-decoder's encoder."""
    segments_BI = batch["input_segments_BI"]
    return Mask(kind="full", query_segments_BL=segments_BI, key_segments_BT=segments_BI)


def cross_mask(batch: dict[str, jax.Array]) -> Mask:
    """The mask of a decoder that attends to its encoder: a segment sees the input segment of the same number."""
    return Mask(kind="full", query_segments_BL=batch["segments_BL"], key_segments_BT=batch["input_segments_BI"])


def empty_seen(rows: int, length: int) -> dict[str, jax.Array]:
    """What a cache remembers of the tokens that it holds: segments, positions, prefix, and how many there are."""
    return {**{name: jnp.zeros((rows, length), jnp.int32) for name in ("segments_BT", "positions_BT", "prefix_BT")}, "index": jnp.int32(0)}


def cached_mask(kind: str, batch: dict[str, jax.Array], seen: dict[str, jax.Array]) -> tuple[Mask, dict[str, jax.Array]]:
    """The mask of a batch that continues the rows of a cache, and what the cache has seen after it.

    Tokens are compared by their positions, so that they may stand in any order. Where a row of the cache holds several continuations of one text,
    the batch has visible_BLT, which says for each query what of the cache belongs to its own.
    """
    assert kind in ("causal", "prefix"), kind
    index, segments_BL = seen["index"], batch["segments_BL"]

    def write(x_BT: jax.Array, new_BL: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x_BT, new_BL, index, axis=1)

    prefix_BL = batch["prefix_BL"] if kind == "prefix" else jnp.zeros_like(segments_BL)
    new = {"segments_BT": segments_BL, "positions_BT": batch["positions_BL"], "prefix_BT": prefix_BL}
    after = {name: write(seen[name], values_BL) for name, values_BL in new.items()}
    mask = Mask(
        kind=kind, query_segments_BL=segments_BL, key_segments_BT=after["segments_BT"], offset=index,
        key_prefix_BT=after["prefix_BT"] if kind == "prefix" else None, query_index_BL=batch["positions_BL"], key_index_BT=after["positions_BT"],
        visible_BLT=batch["visible_BLT"] if "visible_BLT" in batch else None,
    )  # fmt: skip
    return mask, {**after, "index": index + segments_BL.shape[1]}
