"""Who may attend to whom, kept as small arrays until a backend needs more."""

import flax.struct
import jax
import jax.numpy as jnp

KINDS = ("full", "causal")


@flax.struct.dataclass
class Mask:
    """Attention within a segment: `full`, or `causal` (only to the same or an earlier index of the row).

    Padding is segment 0 and attends to padding alone, so that no row of the softmax is empty.
    """

    kind: str = flax.struct.field(pytree_node=False)
    query_segments_BL: jax.Array
    key_segments_BT: jax.Array
    offset: jax.Array | int = 0  # index of the first query among the keys, when decoding from a cache

    def dense(self) -> jax.Array:
        """The mask as booleans mask_B1LT, true where attention is allowed."""
        return self.rows(self.query_segments_BL, self.offset)

    def rows(self, query_segments_BL: jax.Array, offset: jax.Array | int) -> jax.Array:
        """mask_B1LT for a part of the queries, the first of which has index `offset`."""
        allowed = query_segments_BL[:, None, :, None] == self.key_segments_BT[:, None, None, :]
        if self.kind == "causal":
            query_index = offset + jnp.arange(query_segments_BL.shape[1])
            allowed &= jnp.arange(self.key_segments_BT.shape[1])[None, :] <= query_index[:, None]
        return allowed


def self_mask(kind: str, segments_BL: jax.Array) -> Mask:
    """The mask of self-attention over rows of packed segments."""
    assert kind in KINDS, kind
    return Mask(kind=kind, query_segments_BL=segments_BL, key_segments_BT=segments_BL)


def cross_mask(segments_BL: jax.Array, input_segments_BI: jax.Array) -> Mask:
    """The mask of a decoder that attends to its encoder: a segment sees the input segment of the same number."""
    return Mask(kind="full", query_segments_BL=segments_BL, key_segments_BT=input_segments_BI)
