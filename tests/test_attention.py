"""Attention's backends against each other, what they refuse and what they cost; relative buckets; the chunked cross entropy."""

import functools
import logging
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

from ptm.fields import ConfigError
from ptm.nn import attention
from ptm.nn.attention import Request
from ptm.nn.context import Context
from ptm.nn.losses import cross_entropy
from ptm.nn.masks import Mask, cross_mask, self_mask
from ptm.nn.position import relative_bucket

ROWS, LENGTH, HEADS, WIDTH = 2, 24, 3, 8


def context(**options) -> Context:
    return Context(zoo.layout(), **options)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32))


def inputs(keys=LENGTH):
    return random(ROWS, LENGTH, HEADS, WIDTH), random(ROWS, keys, HEADS, WIDTH, seed=1), random(ROWS, keys, HEADS, WIDTH, seed=2)


def by_hand(q, k, v, mask, bias, scale):
    """Attention in float64, one query at a time."""
    q, k, v, allowed = (np.asarray(x, np.float64) for x in (q, k, v, mask.dense()))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, query, head in np.ndindex(q.shape[:3]):
        logits = k[b, :, head] @ q[b, query, head] * scale + (0 if bias is None else np.broadcast_to(bias, (len(q), *bias.shape[1:]))[b, head, query])
        weights = np.exp(logits - logits.max()) * allowed[b, 0, query]
        out[b, query, head] = weights @ v[b, :, head] / weights.sum()
    return out


PACKED = np.array([[1] * 5 + [2] * 9 + [3] * 4 + [0] * 6, [1] * 24], np.int32)
PACKED_INPUTS = np.array([[1] * 3 + [2] * 3 + [3] * 3 + [0] * 3, [1] * 12], np.int32)
ONES = np.ones((ROWS, LENGTH), np.int32)
PREFIX = np.array([[1] * 3 + [0] * 2 + [1] * 9 + [0] * 10, [1] * 7 + [0] * 17], np.int32)
RANK = np.stack([np.random.default_rng(n).permutation(LENGTH) for n in range(ROWS)]).astype(np.int32)
CASES = {
    "full": (self_mask("full", {"segments_BL": ONES}), None),
    "causal": (self_mask("causal", {"segments_BL": ONES}), None),
    "full, packed": (self_mask("full", {"segments_BL": PACKED}), None),
    "causal, packed": (self_mask("causal", {"segments_BL": PACKED}), None),
    "full, packed, bias": (self_mask("full", {"segments_BL": PACKED}), random(1, HEADS, LENGTH, LENGTH, seed=3)),
    "causal, packed, bias": (self_mask("causal", {"segments_BL": PACKED}), random(1, HEADS, LENGTH, LENGTH, seed=3)),
    "full, packed, bias of each row": (self_mask("full", {"segments_BL": PACKED}), random(ROWS, HEADS, LENGTH, LENGTH, seed=3)),
    "causal, packed, bias of each row": (self_mask("causal", {"segments_BL": PACKED}), random(ROWS, HEADS, LENGTH, LENGTH, seed=3)),
    "prefix, packed": (self_mask("prefix", {"segments_BL": PACKED, "prefix_BL": PREFIX}), None),
    "causal, packed, window": (self_mask("causal", {"segments_BL": PACKED}).replace(window=(4, 4)), None),
    "full, packed, window": (self_mask("full", {"segments_BL": PACKED}).replace(window=(3, 6)), random(1, HEADS, LENGTH, LENGTH, seed=3)),
    "order of prediction": (self_mask("permutation", {"segments_BL": ONES, "rank_BL": RANK}), random(ROWS, HEADS, LENGTH, LENGTH, seed=3)),
    "cross, packed": (cross_mask({"segments_BL": PACKED, "input_segments_BI": PACKED_INPUTS}), None),
}


@pytest.mark.parametrize("case", list(CASES))
def test_backends_agree(case):
    """xla and chunked (24 queries in parts of 5) give the numbers of the definition, and equal gradients, also of the bias."""
    mask, bias = CASES[case]
    arrays = (*inputs(mask.key_segments_BT.shape[1]), bias)

    def run(backend, *arrays):
        out, largest, _ = attention.attend(*arrays[:3], context=context(attention=backend, attention_chunk=5), mask=mask, bias_BHLT=arrays[3], scale=0.3)
        return jnp.sum(out * random(*out.shape, seed=4)), (out, largest)

    differentiated = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    results = {b: zoo.jit(jax.value_and_grad(functools.partial(run, b), argnums=differentiated, has_aux=True))(*arrays) for b in ("xla", "chunked")}
    ((_, (out, largest)), grads), ((_, (other_out, other_largest)), other_grads) = results["xla"], results["chunked"]
    np.testing.assert_allclose(out, by_hand(*arrays[:3], mask, bias, 0.3), atol=1e-5)
    np.testing.assert_allclose(other_out, out, atol=1e-6)
    assert float(largest) == pytest.approx(float(other_largest), rel=1e-6)
    for grad, other in zip(grads, other_grads):
        assert float(jnp.max(jnp.abs(grad))) > 1e-3
        np.testing.assert_allclose(other, grad, atol=1e-5 * float(jnp.max(jnp.abs(grad))))


def test_largest_logit_is_the_largest_allowed_one():
    q, k, v = inputs()
    mask = self_mask("causal", {"segments_BL": ONES})
    logits = np.where(mask.dense(), np.einsum("blhk,bthk->bhlt", q, k) * 0.3, -np.inf)
    assert float(attention.attend(q, k, v, context=context(attention="xla"), mask=mask, scale=0.3)[1]) == pytest.approx(logits.max(), rel=1e-6)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_wholly_masked_queries_give_no_nan(backend):
    """A decoder's padding whose encoder row has no padding sees nothing at all; the rest of the row does not feel it."""
    q, k, v = inputs()
    mask = cross_mask({"segments_BL": PACKED, "input_segments_BI": ONES})

    def run(q):
        out = attention.attend(q, k, v, context=context(attention=backend, attention_chunk=8), mask=mask, scale=1.0)[0]
        return jnp.sum(jnp.where(PACKED[..., None, None] == 1, out, 0.0)), out

    grad, out = zoo.jit(jax.grad(run, has_aux=True))(q)
    assert np.isfinite(out).all() and np.isfinite(grad).all()
    assert not np.asarray(grad)[PACKED != 1].any()
    plain = attention.attend(q, k, v, context=context(attention="xla"), mask=self_mask("full", {"segments_BL": ONES}), scale=1.0)[0]
    np.testing.assert_allclose(np.asarray(out)[PACKED == 1], np.asarray(plain)[PACKED == 1], atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_dropout_drops_weights_and_keeps_the_mean(backend):
    """With one-hot values the output shows the weights: a share `rate` is 0, the others are scaled by 1 / (1 - rate)."""
    rate, length = 0.3, 128
    zeros = jnp.zeros((1, length, 2, 4))
    v = jnp.tile(jnp.eye(length)[None, :, None], (1, 1, 2, 1))
    mask = self_mask("full", {"segments_BL": np.ones((1, length), np.int32)})

    def weights(key):
        options = {"context": context(attention=backend, attention_chunk=32), "mask": mask, "scale": 1.0, "dropout": rate}
        return attention.attend(zeros, zeros, v, **options, rng=jax.random.key(key))[0] * length

    first, again, other = (np.asarray(weights(key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    kept = first > 0
    np.testing.assert_allclose(first[kept], 1 / (1 - rate), rtol=1e-6)
    deviation = (rate * (1 - rate) / first.size) ** 0.5
    assert abs(1 - kept.mean() - rate) < 5 * deviation
    both = (kept & (other > 0)).mean()  # independent of another key's, and of the next block of queries'
    assert abs(both - (1 - rate) ** 2) < 6 * deviation
    assert abs((kept[0, :32] & kept[0, 32:64]).mean() - (1 - rate) ** 2) < 10 * deviation


def request(**changes) -> Request:
    plain = {"platform": "gpu", "dtype": "bfloat16", "length": 256, "keys": 256, "head_dim": 64, "dropout": False, "decoding": False}
    return Request(**(plain | changes))


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("cudnn", {"platform": "cpu"}, "GPU"),
        ("cudnn", {"dtype": "float32"}, "bfloat16"),
        ("cudnn", {"dropout": True}, "drop"),
        ("cudnn", {"head_dim": 20}, "multiple of 8"),
        ("cudnn", {"head_dim": 256}, "up to 128"),
        ("cudnn", {"length": 255}, "even"),
        ("cudnn", {"decoding": True}, "cache"),
        ("cudnn", {"row_bias": True}, "row to row"),
        ("cudnn", {"split": True}, "mesh.sequence"),
        ("cudnn", {"maps": True}, "maps need xla"),
        ("chunked", {"maps": True}, "maps need xla"),
        ("splash", {"platform": "gpu"}, "a TPU and this is gpu"),
        ("splash", {"bias": True}, "flash does"),
        ("splash", {"mask": "permutation"}, "no order of prediction"),
        ("splash", {"in_order": False}, "in the order of the row"),
        ("splash", {"mask": "prefix", "window": True}, "window together with a prefix"),
        ("splash", {"mask": "causal", "keys": 300}, "as many queries as keys"),
        ("splash", {"window": True, "keys": 300}, "as many queries as keys"),
        ("splash", {"dropout": True}, "drop"),
        ("splash", {"decoding": True}, "cache"),
        ("splash", {"maps": True}, "maps need xla"),
        ("flash", {"platform": "cpu"}, "a TPU and this is cpu"),
        ("flash", {"mask": "prefix"}, "without a bias"),
        ("flash", {"mask": "permutation"}, "without a bias"),
        ("flash", {"window": True}, "without a bias"),
        ("flash", {"in_order": False}, "without a bias"),
        ("flash", {"mask": "causal", "split": True}, "splash can"),
        ("flash", {"dropout": True}, "drop"),
        ("flash", {"decoding": True}, "cache"),
        ("flash", {"maps": True}, "maps need xla"),
    ],
)
def test_what_a_backend_cannot_honour_is_refused(backend, changes, reason):
    home = {"platform": attention.HOMES[backend][0]} if backend in attention.HOMES else {}
    assert attention.choose(backend, request(**home)) == backend
    changes = home | changes
    with pytest.raises(ConfigError, match=f"compute.attention={backend} is refused.*{reason}.*Allowed"):
        attention.choose(backend, request(**changes))


def test_refusal_comes_out_of_attend():
    with pytest.raises(ConfigError, match="cudnn is refused here: it needs an NVIDIA GPU"):
        attention.attend(*inputs(), context=context(attention="cudnn"), mask=self_mask("full", {"segments_BL": ONES}), scale=1.0)


@pytest.mark.parametrize(
    ("changes", "chosen", "why"),
    [
        ({}, "cudnn", "allow it"),
        ({"dropout": True}, "xla", "small"),
        ({"platform": "cpu", "dtype": "float32"}, "xla", "small"),
        ({"platform": "cpu", "length": 2048, "keys": 2048}, "chunked", "2048 queries"),
        ({"platform": "gpu", "dtype": "float32", "length": 4096}, "chunked", "4096 queries"),
        ({"platform": "cpu", "length": 2048, "decoding": True}, "chunked", "2048 queries"),
        ({"platform": "tpu"}, "splash", "256 queries"),
        ({"platform": "tpu", "length": 128}, "xla", "small"),
        ({"platform": "tpu", "length": 1024, "bias": True}, "flash", "not splash: it adds no bias"),
        ({"platform": "tpu", "length": 4096, "dropout": True}, "chunked", "not splash: it cannot drop"),
        ({"platform": "cpu", "length": 4096, "maps": True}, "xla", "no other backend fits"),
    ],
)
def test_auto_picks_and_says_why(caplog, changes, chosen, why):
    attention.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="ptm.nn.attention"):
        assert attention.choose("auto", request(**changes)) == chosen
        attention.choose("auto", request(**changes))
    (message,) = [record.getMessage() for record in caplog.records]  # once for equal requests
    assert f"attention {chosen} " in message and why in message


def temporary_bytes(backend, length):
    q, k, v = (jnp.zeros((1, length, 2, 16)),) * 3

    def loss(q, k, v):
        mask = self_mask("causal", {"segments_BL": jnp.ones((1, length), jnp.int32)})
        return jnp.sum(attention.attend(q, k, v, context=context(attention=backend, attention_chunk=128), mask=mask, scale=1.0)[0])

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_chunked_attention_is_linear():
    """Twice the length: xla's temporaries grow nearly 4-fold, chunked's 2-fold at most."""
    xla, chunked = ([temporary_bytes(backend, length) for length in (2048, 4096)] for backend in ("xla", "chunked"))
    assert xla[1] > 3.5 * xla[0]
    assert 1.5 * chunked[0] < chunked[1] < 2.1 * chunked[0]
    assert xla[1] > 20 * chunked[1]


@pytest.mark.parametrize(("mask", "expected"), [
    (self_mask("full", {"segments_BL": ONES}), (0, 24)), (self_mask("causal", {"segments_BL": ONES}), (0, 12)),
    (self_mask("causal", {"segments_BL": ONES}).replace(window=(4, 4)), (4, 12)), (self_mask("full", {"segments_BL": ONES}).replace(window=(4, 6)), (4, 18)),
    (self_mask("prefix", {"segments_BL": ONES, "prefix_BL": PREFIX}), (0, 24)), (self_mask("causal", {"segments_BL": ONES}).at(jnp.zeros((ROWS, 12), int)), (0, 24)),
])  # fmt: skip
def test_what_a_block_of_queries_may_see(mask, expected):
    """Keys outside are hidden from all of them: blocks there are skipped."""
    first, stop = mask.reach(8, 4)
    assert (int(first), int(stop)) == expected
    seen = np.flatnonzero(np.asarray(mask.dense())[:, 0, 8:12].any((0, 1)))
    assert len(seen) == 0 or first <= seen[0] and seen[-1] < stop


def test_dropout_has_the_gradient_of_what_was_dropped():
    """The chunked backward pass draws the same weights again: equal to finite differences in float64."""
    with jax.enable_x64(True):
        arrays = tuple(x.astype(jnp.float64) for x in inputs())
        mask = self_mask("causal", {"segments_BL": PACKED})

        def loss(*arrays):
            options = {"context": context(attention="chunked", attention_chunk=5), "mask": mask, "scale": 0.3, "dropout": 0.4, "rng": jax.random.key(0)}
            return jnp.sum(attention.attend(*arrays, **options)[0] * random(ROWS, LENGTH, HEADS, WIDTH, seed=4))

        steps = tuple(random(*x.shape, seed=9).astype(jnp.float64) for x in arrays)
        slope = sum(float(jnp.vdot(grad, step)) for grad, step in zip(zoo.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays), steps))
        value = zoo.jit(loss)
        ahead, behind = (float(value(*(x + sign * 1e-5 * step for x, step in zip(arrays, steps)))) for sign in (1, -1))
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-7)


def published_bucket(distance, *, bidirectional, num_buckets, max_distance):
    """T5's bucket in exact arithmetic: the k-th logarithmic bucket begins where (n / exact)^buckets >= (max_distance / exact)^k."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        n = abs(distance)
    else:
        n = max(-distance, 0)
    exact = num_buckets // 2
    if n < exact:
        return first + n
    k, steps = 0, num_buckets - exact
    while k + 1 < steps and Fraction(n, exact) ** steps >= Fraction(max_distance, exact) ** (k + 1):
        k += 1
    return first + exact + k


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 256), (32, 1000)])
def test_relative_buckets_are_the_published_ones(bidirectional, num_buckets, max_distance):
    distances = np.arange(-1100, 1101)
    options = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    expected = [published_bucket(int(d), **options) for d in distances]
    function = functools.partial(relative_bucket, **options)
    for run in (function, jax.jit(function)):
        np.testing.assert_array_equal(run(jnp.asarray(distances)), expected)


def test_relative_buckets_of_the_released_model():
    """The first distance of each bucket, as T5's released code gives them."""

    def buckets(distances, bidirectional):
        return np.asarray(jax.jit(functools.partial(relative_bucket, bidirectional=bidirectional, num_buckets=32, max_distance=128))(distances))

    past, future, decoder = buckets(-np.arange(201), True), buckets(np.arange(201), True), buckets(-np.arange(201), False)
    assert [int(np.argmax(past == bucket)) for bucket in range(16)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(future[1:], past[1:] + 16)
    np.testing.assert_array_equal(decoder[:17], np.arange(17))
    assert [int(np.argmax(decoder == bucket)) for bucket in range(16, 32)] == [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert not buckets(np.arange(201), False).any()


def test_mask_of_a_part_of_the_queries():
    mask = self_mask("causal", {"segments_BL": PACKED})
    np.testing.assert_array_equal(mask.part(8, 8).dense(), mask.dense()[:, :, 8:16])
    decoding = Mask(kind="causal", query_segments_BL=PACKED[:, 8:9], key_segments_BT=PACKED, offset=jnp.int32(8))
    np.testing.assert_array_equal(decoding.dense(), mask.dense()[:, :, 8:9])


VOCAB = 50


def crossing(weights, *, chunk, z=0.0):
    """Compiled (hidden, table) -> ((loss, sums), gradients) on random targets."""
    targets = jnp.asarray(np.random.default_rng(5).integers(0, VOCAB, weights.shape))

    def loss(hidden, table):
        sums = cross_entropy(lambda h: h @ table, hidden, targets, weights, chunk=chunk)
        return sums.nll + z * sums.log_z_squared, sums

    return targets, zoo.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def test_cross_entropy_is_that_of_optax():
    hidden, table, weights = random(3, 12, 8), random(8, VOCAB), jnp.abs(random(3, 12))
    targets, run = crossing(weights, chunk=10_000, z=0.01)
    (loss, sums), grads = run(hidden, table)

    def reference(hidden, table):
        logits = hidden @ table
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(weights * (nll + 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2)), (nll, logits)

    (expected, (nll, logits)), expected_grads = zoo.jit(jax.value_and_grad(reference, argnums=(0, 1), has_aux=True))(hidden, table)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.nll, jnp.sum(nll * weights), rtol=1e-5)
    np.testing.assert_allclose(sums.correct, jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights), rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-5 * float(jnp.max(jnp.abs(expected_grad))))


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("chunk", [1, 6, 17, 39])
def test_chunked_cross_entropy_is_the_same(chunk, length):
    """Also where the length is prime or a chunk is less than a position of every row."""
    hidden, table, weights = random(3, length, 8), random(8, VOCAB), jnp.abs(random(3, length))
    (loss, sums), grads = crossing(weights, chunk=10_000, z=0.01)[1](hidden, table)
    (other_loss, other_sums), other_grads = crossing(weights, chunk=chunk, z=0.01)[1](hidden, table)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), other_sums, sums)
    for grad, other in zip(grads, other_grads):
        np.testing.assert_allclose(other, grad, atol=1e-6 * float(jnp.max(jnp.abs(grad))))


def test_equal_logits_are_no_hit():
    """An untrained model whose logits are all equal predicts nothing."""
    sums = cross_entropy(lambda h: h @ jnp.zeros((8, VOCAB)), random(1, 4, 8), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4)), chunk=100)
    assert float(sums.correct) == 0.0
    np.testing.assert_allclose(sums.nll, 4 * np.log(VOCAB), rtol=1e-6)


def test_memory_of_chunked_cross_entropy():
    """The gradient never holds the logits of all positions: a few chunks of them, and what is as large as the inputs."""
    rows, length, width, vocab, chunk = 2, 509, 8, 4096, 64
    hidden, table = jnp.zeros((rows, length, width)), jnp.zeros((width, vocab))
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def bytes_at(chunk):
        loss = jax.grad(lambda h, t: cross_entropy(lambda x: x @ t, h, targets, weights, chunk=chunk).nll, argnums=(0, 1))
        return jax.jit(loss).lower(hidden, table).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * rows * length * vocab
    assert bytes_at(rows * length) >= all_logits
    assert bytes_at(chunk) < 4 * (4 * chunk * vocab) + 4 * table.nbytes
