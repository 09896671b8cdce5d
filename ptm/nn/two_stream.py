"""Two-stream attention (Yang et al. 2019, section 2.3) with the relative positions and the memory of Transformer-XL (Dai et al. 2019).

The content stream is that of every Transformer. The query stream has the same parameters and states of its own at the selected positions:
it knows where they stand but not what stands there, and reads the keys and values of the content stream.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ptm.nn.attention import attend
from ptm.nn.context import Context
from ptm.nn.dropout import Dropout
from ptm.nn.layers import run_layers, stacked_params
from ptm.nn.linear import Linear, contract
from ptm.nn.masks import Mask
from ptm.nn.mlp import MLP
from ptm.nn.norm import Norm
from ptm.nn.shape import BlockConfig, block_flops
from ptm.nn.stack import Output

Streams = tuple[jax.Array, ...]  # (content_BLD,) or (content_BLD, query_BSD)


@flax.struct.dataclass
class View:
    """How the queries of a stream look at the keys: whom they see, and of which the segment type differs (None: of none).

    `sign_BL` is -1 where text stands in reverse order, so that its distances keep their meaning (None: nowhere).
    """

    mask: Mask
    differs_BLT: jax.Array | None = None
    sign_BL: jax.Array | None = None


def sinusoids(distance_R: jax.Array, width: int, dtype: Any = jnp.float32) -> jax.Array:
    """Encodings [R, width] of distances (Vaswani et al. 2017, section 3.5): sines of all frequencies, then cosines; the latter alone are even."""
    frequency_F = 10000.0 ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angle_RF = distance_R[:, None].astype(dtype) * frequency_F
    return jnp.concatenate([jnp.sin(angle_RF), jnp.cos(angle_RF)], axis=-1)


def distances(length: int, keys: int) -> jax.Array:
    """Every distance (query index - key index) between `length` queries and the `keys` keys that end with them, from `keys` down: [keys + length]."""
    return keys - jnp.arange(keys + length)


def by_key(logits_BHLR: jax.Array, *, keys: int, index_BL: jax.Array | None) -> jax.Array:
    """Logits by distance, in the order of `distances`, brought to the keys: [B, H, L, keys].

    Queries stand at `index_BL` among the keys; None = in order, at the end. Nothing of the size of queries x keys x width is ever made.
    """
    if index_BL is not None:
        place_BLT = (keys - index_BL)[:, :, None] + jnp.arange(keys)
        return jnp.take_along_axis(logits_BHLR, place_BLT[:, None], axis=3)
    # Each query's distances begin one place before those of the query above it: cut at a row length of one less, they stand below each other
    # (Dai et al. 2019, appendix B).
    rows, heads, length, _ = logits_BHLR.shape
    return logits_BHLR.reshape(rows, heads, -1)[..., length:].reshape(rows, heads, length, -1)[..., :keys]


class Term(nn.Module):
    """A term of the attention logits: the bias that it adds to the queries, and its keys, a table `leaf` of [size, H, K], where it has any."""

    heads: tuple[int, int]
    std: float
    leaf: str = ""
    size: int = 0

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        draw = nn.initializers.normal(self.std)
        bias_HK = self.param("bias", draw, self.heads, jnp.float32)
        return bias_HK, self.param(self.leaf, draw, (self.size, *self.heads), jnp.float32) if self.leaf else None


class RelativeAttention(nn.Module):
    """Multi-head attention whose logits are sums of three terms, by content, position and segment type (Dai et al. 2019, section 3.3; Yang et al. 2019,
    section 2.5).

    q = query(x): (q + content bias) . key(source) + (q + position bias) . position(encoding of the distance) + (q + segment bias) . segment[same or not].
    """

    config: BlockConfig
    context: Context
    train: bool
    maps: bool = False  # give the content stream's weights too

    @nn.compact
    def __call__(self, streams: Streams, source_BTD: jax.Array, encoding_RD: jax.Array, views: Sequence[View]) -> tuple[Streams, tuple]:
        c, constrain = self.config, self.context.layout.constrain
        heads, keys = (c.num_heads, c.head_dim), source_BTD.shape[1]
        scale = c.scale * self.context.attention_multiplier
        query = Linear(self.context, (c.width,), heads, c.query_std, False, name="query")
        out = Linear(self.context, heads, (c.width,), c.attention_out_std, False, name="out")
        content_bias, _ = Term(heads, c.query_std, name="content")()
        position_bias, position_DHK = Term(heads, c.key_std, "kernel", c.width, name="position")()
        segment_bias, segment_2HK = Term(heads, c.key_std, "embedding", 2, name="segment")()

        def split(x_BLHK: jax.Array) -> jax.Array:
            return constrain(x_BLHK, "batch", "length", "heads", None)

        k_BTHK = split(Linear(self.context, (c.width,), heads, c.key_std, False, name="key")(source_BTD))
        v_BTHK = split(Linear(self.context, (c.width,), heads, c.key_std, False, name="value")(source_BTD))

        def against(q_BLHK: jax.Array, keys_RHK: jax.Array) -> jax.Array:
            return jnp.einsum("blhk,rhk->bhlr", q_BLHK * scale, keys_RHK, preferred_element_type=jnp.promote_types(q_BLHK.dtype, jnp.float32))

        def position_logits(q_BLHK: jax.Array, view: View) -> jax.Array:
            if view.sign_BL is None:
                return against(q_BLHK, contract(encoding_RD, position_DHK, dims=1, context=self.context))
            # The encoding of minus a distance has the opposite sines and the same cosines.
            halves = zip(jnp.split(encoding_RD, 2, axis=-1), jnp.split(position_DHK, 2))
            odd_RHK, even_RHK = (contract(encoding, kernel, dims=1, context=self.context) for encoding, kernel in halves)
            signed_BLHK = q_BLHK * view.sign_BL[:, :, None, None].astype(q_BLHK.dtype)
            return against(jnp.concatenate([signed_BLHK, q_BLHK], axis=-1), jnp.concatenate([odd_RHK, even_RHK], axis=-1))

        outputs, tops, maps = [], [], []
        for x, view in zip(streams, views, strict=True):
            q_BLHK = split(query(x))
            bias_BHLT = by_key(position_logits(q_BLHK + position_bias.astype(q_BLHK.dtype), view), keys=keys, index_BL=view.mask.query_index_BL)
            if view.differs_BLT is not None:
                by_type_BHL2 = against(q_BLHK + segment_bias.astype(q_BLHK.dtype), segment_2HK.astype(q_BLHK.dtype))
                bias_BHLT += jnp.where(view.differs_BLT[:, None], by_type_BHL2[..., 1:], by_type_BHL2[..., :1])
            dropout = c.attention_dropout if self.train else 0.0
            y_BLHK, top, maps_BHLT = attend(
                q_BLHK + content_bias.astype(q_BLHK.dtype), k_BTHK, v_BTHK, context=self.context, mask=view.mask, bias_BHLT=bias_BHLT, scale=scale,
                dropout=dropout, rng=self.make_rng("dropout") if dropout else None, maps=self.maps and not maps,
            )  # fmt: skip
            if not view.mask.own:
                # Where a query sees nothing, the softmax is uniform over all keys, that of its own token among them.
                y_BLHK = jnp.where(jnp.any(view.mask.dense(), axis=-1)[:, 0, :, None, None], y_BLHK, 0)
            outputs.append(out(split(y_BLHK)))
            tops.append(top)
            maps.append(maps_BHLT)
        return tuple(outputs), (None if None in tops else jnp.max(jnp.stack(tops)), maps[0])


class TwoStreamLayer(nn.Module):
    """(content, query) -> (content, query), post-norm; `memory_BMD` are remembered inputs of this layer, which the new ones push on."""

    config: BlockConfig
    context: Context
    train: bool
    maps: bool = False

    @nn.compact
    def __call__(self, streams: Streams, memory_BMD: jax.Array | None, encoding_RD: jax.Array, views: Sequence[View]) -> tuple[Streams, tuple]:
        c = self.config
        content_BLD = streams[0]
        source_BTD = content_BLD if memory_BMD is None else jnp.concatenate([memory_BMD, content_BLD], axis=1)
        norms = {name: Norm(c.norm, c.norm_eps, name=name) for name in ("attention_norm", "mlp_norm")}
        mlp = MLP(self.context, c.width, c.mlp_width, c.activation, c.gated, "mlp" in c.biases, c.mlp_dropout, c.mlp_in_std, c.mlp_out_std, name="mlp")

        def add(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            y = Dropout(c.dropout, deterministic=not self.train)(y)
            return norms[name](x + self.context.layout.constrain(y, "batch", "residual_length", "residual"))

        attended, seen = RelativeAttention(c, self.context, self.train, self.maps, name="attention")(streams, source_BTD, encoding_RD, views)
        streams = tuple(add("attention_norm", x, y) for x, y in zip(streams, attended))
        streams = tuple(add("mlp_norm", x, mlp(x, train=self.train)) for x in streams)
        kept_BMD = None if memory_BMD is None else jax.lax.stop_gradient(source_BTD[:, -memory_BMD.shape[1] :])
        return streams, (kept_BMD, *seen)


class TwoStreamStack(nn.Module):
    """`num_layers` layers over both streams, with memory.

    A memory is {"states_BNMD", "valid_BM"}: the inputs of every layer at the last M positions, and which of them belong to the document that a
    row's first segment continues. Gradients do not reach into it. `clamp` is the largest distance that is told from others (None: all are).
    """

    config: BlockConfig
    context: Context
    num_layers: int
    clamp: int | None = None

    @nn.compact
    def __call__(
        self, streams: Streams, views: Sequence[View], *, segments_BL: jax.Array, cache: Any = None, states: bool = False, maps: bool = False, train: bool
    ) -> Output:
        c, context = self.config, self.context
        length = segments_BL.shape[1]
        memory_NBMD = None
        if cache is not None:
            memory_NBMD = jnp.swapaxes(cache["states_BNMD"], 0, 1).astype(context.dtype)
        distance_R = distances(length, length + (0 if cache is None else cache["valid_BM"].shape[1]))
        if self.clamp is not None:
            distance_R = jnp.clip(distance_R, -self.clamp, self.clamp)
        encoding_RD = Dropout(c.dropout, deterministic=not train)(sinusoids(distance_R, c.width, jnp.promote_types(context.dtype, jnp.float32)).astype(context.dtype))
        layer = TwoStreamLayer(c, context, train, maps, parent=None)

        def make(rng: jax.Array) -> Any:
            first = jax.tree.map(lambda leaf: leaf[0], memory_NBMD)
            return layer.init({"params": rng, "dropout": rng}, streams, first, encoding_RD, views)["params"]

        def apply(kind: None, params: Any, streams: Streams, memory_BMD: jax.Array | None, index: Any, rng: jax.Array | None) -> tuple[Streams, tuple]:
            rngs = None if rng is None else {"dropout": rng}
            streams, out = layer.apply({"params": params}, streams, memory_BMD, encoding_RD, views, rngs=rngs)
            return streams, (*out, streams[0] if states else None)

        params = stacked_params(self, make, num_layers=self.num_layers, sharing=None)
        rng = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        start_BLD = streams[0]
        streams, outputs = run_layers(apply, params, streams, memory_NBMD, kinds=(None,) * self.num_layers, context=context, rng=rng)
        kept_NBMD, tops_N, maps_NBHLT, states_NBLD = outputs
        if states:
            states_NBLD = jnp.concatenate([start_BLD[None], states_NBLD])
        if cache is not None:
            cache = {"states_BNMD": jnp.swapaxes(kept_NBMD, 0, 1).astype(jnp.float32), "valid_BM": still_valid(cache["valid_BM"], segments_BL)}
        streams = tuple(Dropout(c.dropout, deterministic=not train)(x) for x in streams)
        top = None if tops_N is None else jnp.max(tops_N)
        return Output(
            hidden_BLD=streams[0], cache=cache, attention_max=top, states_NBLD=states_NBLD, query_BSD=streams[1] if len(streams) > 1 else None,
            maps_NBHLT=maps_NBHLT,
        )  # fmt: skip


def still_valid(valid_BM: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """Which positions of the next memory belong to the document that ends the rows: those of its segment, and what this one continued."""
    last_B1 = segments_BL[:, -1:]
    own_BL = (segments_BL == last_B1) & (last_B1 > 0)
    return jnp.concatenate([valid_BM * (last_B1 == 1), own_BL.astype(valid_BM.dtype)], axis=1)[:, -valid_BM.shape[1] :]


def empty_memory(config: BlockConfig, *, num_layers: int, rows: int, length: int) -> dict[str, jax.Array]:
    """A memory of `length` positions, none of them valid."""
    return {"states_BNMD": jnp.zeros((rows, num_layers, length, config.width), jnp.float32), "valid_BM": jnp.zeros((rows, length), jnp.int32)}


def two_stream_flops(config: BlockConfig, *, length: int, queries: int, memory: int) -> float:
    """Multiply-adds x 2 of one layer's forward pass for one row, as `block_flops`, with `queries` positions in the query stream.

    Of distances only the products with queries count: their encodings are projected once for all rows.
    """
    keys, heads = length + memory, config.num_heads * config.head_dim
    content = block_flops(config, length=length, keys=keys)
    own = 2 * queries * config.width * (2 * heads + 2 * config.mlp_width) + 2 * 2 * queries * keys * heads
    return content + own + 2 * (length + queries) * (length + keys) * heads
