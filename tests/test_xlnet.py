"""XLNet: relative attention against its definition, memory against one long row, and reading in reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ptm import models
from ptm.fields import ConfigError, check
from ptm.models import xlnet
from ptm.nn import two_stream
from ptm.nn.masks import HIDDEN, self_mask

WIDTH, LENGTH = 32, zoo.LENGTH
# All that a batch of permutation language modelling may hold: two documents, types, a document in reverse, and two selected positions.
ROW = {
    "tokens_BL": np.random.default_rng(0).integers(8, 40, (2, LENGTH)).astype(np.int32),
    "segments_BL": np.array([[1] * 9 + [2] * 7, [1] * 12 + [0] * 4], np.int32),
    "rank_BL": np.array([[0, 0, 2, 1, 0, 0, 3, 0, 0, 0, 1, 0, 0, 2, 0, 0], [0, 1, 0, 0, 0, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]], np.int32),
    "types_BL": np.array([[0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], [0] * 5 + [1] * 11], np.int32),
    "reversed_BL": np.array([[0] * 9 + [1] * 7, [1] * 16], np.int32),
    "target_index_BS": np.array([[13, 2, 3, LENGTH], [5, 1, LENGTH, LENGTH]], np.int32),
}


def made(family="xlnet", **changes):
    return zoo.model(family, heads=("lm",), changes=tuple(changes.items()))


@functools.cache
def program(family, **changes):
    """(params, batch, cache) -> output under the mask `permutation`."""
    return zoo.jit(functools.partial(made(family, **changes).hidden, mask="permutation", states=True))


def params(family="xlnet"):
    return zoo.params(family, ("lm",))


# --- attention by its definition ---


def encoding(distance):
    angle = distance / 10000 ** (np.arange(0, WIDTH, 2) / WIDTH)
    return np.concatenate([np.sin(angle), np.cos(angle)])


def layer_by_hand(p, content, query, batch, row, *, config):
    """One layer of one row in float64, query by query: (content, query) after it."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    a = p["attention"]
    segments, ranks, types = (batch[name][row] for name in ("segments_BL", "rank_BL", "types_BL"))

    def norm(x, name):
        x = (x - x.mean()) / np.sqrt(x.var() + config.norm_eps)
        return x * p[name]["scale"] + p[name]["bias"]

    def run(x, at, own):
        sign = -1 if batch["reversed_BL"][row][at] else 1
        limit = config.clamp_len or 10**9
        weights, values = [], []
        for j, other in enumerate(content):
            if segments[j] != segments[at] or not (ranks[j] < max(ranks[at], 1) or own and j == at) or config.attn_type == "uni" and j > at:
                continue
            q, key = np.einsum("d,dhk->hk", x, a["query"]["kernel"]), np.einsum("d,dhk->hk", other, a["key"]["kernel"])
            distance = np.einsum("d,dhk->hk", encoding(np.clip(sign * (at - j), -limit, limit)), a["position"]["kernel"])
            segment = a["segment"]["embedding"][int(types[at] != types[j])]
            terms = (("content", key), ("position", distance), ("segment", segment))
            weights.append(np.exp(sum(((q + a[name]["bias"]) * table).sum(-1) for name, table in terms) / np.sqrt(q.shape[-1])))
            values.append(np.einsum("d,dhk->hk", other, a["value"]["kernel"]))
        mixed = sum(w[:, None] * v for w, v in zip(weights, values)) / sum(weights)[:, None]
        x = norm(x + np.einsum("hk,hkd->d", mixed, a["out"]["kernel"]), "attention_norm")
        inner = x @ p["mlp"]["wi"]["kernel"] + p["mlp"]["wi"]["bias"]
        gelu = 0.5 * inner * (1 + np.asarray(jax.scipy.special.erf(inner / np.sqrt(2)), np.float64))
        return norm(x + gelu @ p["mlp"]["wo"]["kernel"] + p["mlp"]["wo"]["bias"], "mlp_norm")

    places = batch["target_index_BS"][row]
    new_query = np.stack([run(x, place, False) if place < LENGTH else np.zeros(WIDTH) for x, place in zip(query, places)])
    return np.stack([run(x, place, True) for place, x in enumerate(content)]), new_query


@pytest.mark.parametrize("family", ["xlnet", "xlnet_uni"])
def test_both_streams_by_hand(family):
    """Content, position and segment terms with their biases; ranks, documents and directions; the query stream at its positions; clamped distances."""
    config, values = zoo.CONFIGS[family], params(family)
    out = program(family)(values, ROW, cache=None)
    for row in range(2):
        content = np.asarray(values["token_embed"]["embedding"], np.float64)[ROW["tokens_BL"][row]]
        query = np.tile(np.asarray(values["mask_embed"], np.float64), (4, 1))
        for layer in range(2):
            np.testing.assert_allclose(out.states_NBLD[layer, row], content, atol=2e-5)
            part = jax.tree.map(lambda leaf, layer=layer: leaf[layer], values["encoder"]["layers"])
            content, query = layer_by_hand(part, content, query, ROW, row, config=config)
        np.testing.assert_allclose(out.hidden_BLD[row], content, atol=2e-5)
        chosen = ROW["target_index_BS"][row] < LENGTH
        np.testing.assert_allclose(out.query_BSD[row][chosen], query[chosen], atol=2e-5)


def test_logits_by_distance_come_to_their_keys():
    """In order by cutting, at chosen places by gathering: both put the distance i - j under query i and key j."""
    length, keys = 5, 8
    table = jnp.broadcast_to(two_stream.distances(length, keys), (2, 3, length, keys + length))
    expected = (keys - length + np.arange(length))[:, None] - np.arange(keys)
    np.testing.assert_array_equal(two_stream.by_key(table, keys=keys, index_BL=None), np.broadcast_to(expected, (2, 3, length, keys)))
    places = np.array([[3, 7, 5], [4, 4, 6]])
    gathered = two_stream.by_key(table[:, :, :3], keys=keys, index_BL=jnp.asarray(places))
    np.testing.assert_array_equal(gathered[:, 0], places[:, :, None] - np.arange(keys))


# --- what the query stream knows ---


def test_a_target_never_sees_itself_and_later_ones_do():
    """The query stream: changing a target's own token leaves its prediction as it is, bit for bit, and changes those of higher rank in its document."""
    run = program("xlnet")
    rows = {name: np.repeat(value[:1], LENGTH + 1, axis=0) for name, value in ROW.items()}
    rows["tokens_BL"][1:] = (rows["tokens_BL"][1:] + np.eye(LENGTH, dtype=np.int32)) % zoo.VOCAB
    out = np.asarray(run(params(), rows, cache=None).query_BSD)
    changed = np.any(out[1:] != out[:1], axis=-1).T  # [S, tokens]
    rank, segments = ROW["rank_BL"][0], ROW["segments_BL"][0]
    for seen, place in zip(changed, ROW["target_index_BS"][0][:3]):
        np.testing.assert_array_equal(seen, (segments == segments[place]) & (rank < rank[place]))


def test_a_target_that_sees_nothing_learns_nothing_of_the_row():
    """The first token where only the left is seen, and one of a document without context."""
    batch = {name: value[:1].copy() for name, value in ROW.items()}
    batch["rank_BL"][0] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 4, 3, 5, 6, 7]
    batch["target_index_BS"][0] = [0, 10, LENGTH, LENGTH]
    other = batch | {"tokens_BL": batch["tokens_BL"][:, ::-1].copy()}
    for family, alone in (("xlnet_uni", [True, True]), ("xlnet", [False, True])):
        first, second = (np.asarray(program(family)(params(family), given, cache=None).query_BSD)[0, :2] for given in (batch, other))
        np.testing.assert_array_equal(np.all(first == second, axis=-1), alone)


def test_fine_tuning_runs_the_content_stream_alone():
    """Under the mask `full`, selected positions or not (masked language modelling has them), and without selected positions under any mask."""
    for mask in ("full", "permutation"):
        for batch in (ROW, {name: value for name, value in ROW.items() if name != "target_index_BS"}):
            out = made().hidden(params(), batch, mask=mask)
            assert (out.query_BSD is None) == (mask == "full" or batch is not ROW) and out.cache is None


# --- memory ---


def columns(batch, start, stop):
    return {name: value[:, start:stop] for name, value in batch.items()}


def long_batch(pieces, *, ranks=True):
    """Rows of `pieces` x LENGTH tokens of one document each; the last piece is predicted in a random order, from a context without it."""
    rng = np.random.default_rng(1)
    length = pieces * LENGTH
    rank = np.zeros((3, length), np.int32)
    if ranks:
        rank[:, -LENGTH:] = 1 + np.stack([rng.permutation(LENGTH) for _ in range(3)])
    tokens, backwards = rng.integers(8, 40, (3, length)).astype(np.int32), np.tile(np.int32([[0], [1], [1]]), (1, length))
    return {"tokens_BL": tokens, "segments_BL": np.ones((3, length), np.int32), "rank_BL": rank, "reversed_BL": backwards}


LONG = [("xlnet", "permutation", 2, LENGTH), ("xlnet_uni", "full", 2, LENGTH), ("xlnet_uni", "full", 3, 2 * LENGTH)]


@pytest.mark.parametrize(("family", "mask", "pieces", "memory"), LONG)
def test_segments_with_memory_equal_one_long_segment(family, mask, pieces, memory):
    """States of every layer; with a memory of two rows, of what came two rows before, too."""
    model, batch = made(family), long_batch(pieces, ranks=mask == "permutation")
    run = zoo.jit(functools.partial(model.hidden, mask=mask, states=True))
    whole = run(params(family), batch).states_NBLD
    cache = model.empty_cache(rows=3, length=memory)
    for piece in range(pieces):
        out = run(params(family), columns(batch, piece * LENGTH, (piece + 1) * LENGTH), cache=cache)
        np.testing.assert_allclose(out.states_NBLD, whole[:, :, piece * LENGTH : (piece + 1) * LENGTH], atol=3e-5)
        cache = out.cache
    alone = run(params(family), columns(batch, (pieces - 1) * LENGTH, pieces * LENGTH)).states_NBLD
    assert float(jnp.max(jnp.abs(alone[-1] - whole[-1, :, -LENGTH:]))) > 0.1, "the memory must matter"


def test_short_memory_holds_the_last_positions():
    model = made()
    batch = columns(ROW, 0, LENGTH) | {"target_index_BS": ROW["target_index_BS"]}
    empty = model.empty_cache(rows=2, length=3)
    out = program("xlnet")(params(), batch, cache=empty)
    np.testing.assert_array_equal(out.cache["states_BNMD"], np.moveaxis(np.asarray(out.states_NBLD)[:-1, :, -3:], 0, 1))
    np.testing.assert_array_equal(out.cache["valid_BM"], [[1, 1, 1], [0, 0, 0]])
    none = program("xlnet")(params(), batch, cache=None)
    np.testing.assert_allclose(out.hidden_BLD, none.hidden_BLD, atol=2e-5)  # an empty memory is as none


def test_which_positions_stay_valid():
    """A memory of 5 after rows of 3: what the last document of a row began with, and what came before it if it is the first one, too."""
    valid = jnp.array([[0, 1, 1, 1, 1]] * 4)
    segments = jnp.array([[1, 1, 1], [1, 1, 2], [1, 2, 2], [1, 1, 0]])
    expected = [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(two_stream.still_valid(valid, segments), expected)


def test_memory_is_seen_by_the_first_segment_alone():
    """And by no padding; an invalid position by none; memory has rank 0, and is context of all targets."""
    mask = self_mask("permutation", ROW).behind(jnp.array([[0, 1, 1]] * 2))
    np.testing.assert_array_equal(mask.key_segments_BT[:, :3], [[HIDDEN, 1, 1]] * 2)
    seen = np.asarray(mask.dense())[:, 0, :, :3]
    np.testing.assert_array_equal(seen, (ROW["segments_BL"] == 1)[:, :, None] & np.array([False, True, True]))
    at = np.asarray(mask.at(jnp.asarray(ROW["target_index_BS"])).dense())[:, 0]
    inside = np.minimum(ROW["target_index_BS"], LENGTH - 1)
    full = np.take_along_axis(np.asarray(mask.replace(own=False).dense())[:, 0], inside[:, :, None], axis=1)
    chosen = ROW["target_index_BS"] < LENGTH
    np.testing.assert_array_equal(at[chosen], full[chosen])


def test_no_gradient_reaches_into_memory():
    model, batch = made(), columns(long_batch(1), 0, LENGTH)

    def loss(values):
        first = model.hidden(values, batch, mask="permutation", cache=model.empty_cache(rows=3, length=4))
        return jnp.sum(jnp.square(first.cache["states_BNMD"]))

    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(zoo.jit(jax.grad(loss))(params())))


# --- direction ---


def test_reading_in_reverse_changes_nothing_but_the_order():
    """With distances of the opposite sign, the states of a text that stands in reverse are those of the text; without, they are not."""
    batch = columns(long_batch(1, ranks=False), 0, LENGTH) | {"reversed_BL": np.zeros((3, LENGTH), np.int32)}
    backwards = {name: value[:, ::-1] for name, value in batch.items()}
    run = zoo.jit(functools.partial(made().hidden, mask="full"))
    forwards = run(params(), batch).hidden_BLD
    turned = run(params(), backwards | {"reversed_BL": np.ones((3, LENGTH), np.int32)}).hidden_BLD[:, ::-1]
    np.testing.assert_allclose(turned, forwards, atol=3e-5)
    assert float(jnp.max(jnp.abs(run(params(), backwards).hidden_BLD[:, ::-1] - forwards))) > 0.1


# --- configs ---


def test_configs_that_cannot_be():
    for changes, message in (({"width": 33}, "width=33 is odd"), ({"num_heads": 5}, "num_heads=5 does not divide model.width=32.*fit: \\[1, 2, 4")):
        with pytest.raises(ConfigError, match=message):
            check(xlnet.Config(**{**zoo.SMALL, **changes}), "model")
    with pytest.raises(ConfigError, match="model xlnet has no head pooled"):
        models.make(zoo.CONFIGS["xlnet"], context=made().module.context, heads=("pooled",))
