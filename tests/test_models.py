"""Invariants of every family: no leak, padding and packing isolation, equal numbers however they are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ptm import models, parallel, state, tree
from ptm.models import MODELS
from ptm.nn import masks
from ptm.nn.context import Context

FAMILIES = list(zoo.CONFIGS)
DECODERS = [family for family in FAMILIES if zoo.CONFIGS[family].kind != "encoder"]


def hidden(family, params, batch, **context):
    mask = zoo.objective(zoo.HOME[family], family).mask
    return zoo.model(family, **context).hidden(params, batch, mask=mask).hidden_BLD


def influence(family, params, batch, position):
    """Which tokens of a row the hidden state at `position` depends on: [L] booleans, from one batch with one token changed in each row."""
    length = batch["tokens_BL"].shape[1]
    rows = {key: jnp.repeat(value[:1], length + 1, axis=0) for key, value in batch.items()}
    tokens = rows["tokens_BL"] + jnp.pad(jnp.eye(length, dtype=jnp.int32), ((1, 0), (0, 0)))
    at = hidden(family, params, {**rows, "tokens_BL": tokens % zoo.VOCAB})[:, position]
    return np.asarray(jnp.any(at[1:] != at[0], axis=-1))


def expected_influence(family, batch, position):
    segments = np.asarray(batch["segments_BL"][0])
    seen = segments == segments[position]
    if zoo.objective(zoo.HOME[family], family).mask == "causal":
        seen &= np.arange(len(segments)) <= position
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_no_leak_and_no_lost_context(family):
    """A position depends on exactly the tokens that the mask lets it see: not one more, not one less."""
    batch = zoo.batch(zoo.HOME[family], family, rows=1, per_row=2, length=6)
    for position in (0, 3, 7):
        np.testing.assert_array_equal(influence(family, zoo.params(family), batch, position), expected_influence(family, batch, position))


def test_mutation_of_the_mask_is_seen(monkeypatch):
    """The leak test turns red when the causal comparison is flipped, and when segments are ignored."""
    batch = zoo.batch("causal", "gpt", rows=1, per_row=2, length=6)
    original = masks.Mask.rows

    def flipped(self, segments, offset):
        allowed = segments[:, None, :, None] == self.key_segments_BT[:, None, None, :]
        return allowed & (jnp.arange(self.key_segments_BT.shape[1])[None, :] >= jnp.arange(segments.shape[1])[:, None])

    def packed_ignored(self, segments, offset):
        return original(self.replace(key_segments_BT=jnp.ones_like(self.key_segments_BT)), jnp.ones_like(segments), offset)

    for mutant in (flipped, packed_ignored):
        monkeypatch.setattr(masks.Mask, "rows", mutant)
        with pytest.raises(AssertionError):
            np.testing.assert_array_equal(influence("gpt", zoo.params("gpt"), batch, 7), expected_influence("gpt", batch, 7))
        monkeypatch.setattr(masks.Mask, "rows", original)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_isolation(family):
    """A document's hidden states are the same alone, packed with others, and with more padding."""
    made = zoo.objective(zoo.HOME[family], family)
    docs = zoo.documents(2, length=6)
    examples = [next(iter(made.features(doc, rng=zoo.keyed_rng(0, doc.id, 0), draw=None))) for doc in docs]

    def run(chosen, lengths):
        packed = made.finish(zoo.row(chosen, lengths, made.fields))
        return hidden(family, zoo.params(family), {key: jnp.asarray(value)[None] for key, value in packed.items()})[0]

    together = run(examples, made.lengths)
    longer = run(examples, {name: size + 8 if name != "S" else size for name, size in made.lengths.items()})
    sizes = [len(example["tokens_BL"]) for example in examples]
    alone = [run([example], made.lengths)[:size] for example, size in zip(examples, sizes)]
    expected = jnp.concatenate(alone)
    np.testing.assert_allclose(together[: sum(sizes)], expected, atol=2e-5)
    np.testing.assert_allclose(longer[: sum(sizes)], expected, atol=2e-5)


WAYS = {
    "unrolled": {"scan_layers": False},
    "remat full": {"remat": "full"},
    "remat dots, unrolled": {"remat": "dots", "scan_layers": False},
    "chunked attention": {"attention": "chunked", "attention_chunk": 4},
    "chunked loss": {"loss_chunk": 16},
}


def loss_and_gradient(family, name, batch, on=None, **context):
    made, objective = zoo.model(family, on=on, heads=zoo.objective(name, family).heads, **context), zoo.objective(name, family)
    params = zoo.params(family, heads=objective.heads)
    step = jax.jit(lambda p, b: state.gradients(made, objective, p, b, microbatches=1, rng=None, carry=None, train=False)[:2])
    return step(params, batch)


def assert_equal_gradients(actual, expected, *, layers=2, tolerance=1e-5):
    for path, reference in tree.paths(expected).items():
        limit = tolerance * layers**0.5 * max(float(jnp.max(jnp.abs(reference))), 1e-6)
        np.testing.assert_allclose(tree.paths(actual)[path], reference, atol=limit, rtol=0, err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers_however_computed(family):
    """Scanned = unrolled = rematerialised = chunked, loss and gradients."""
    batch = zoo.batch(zoo.HOME[family], family)
    loss, grads = loss_and_gradient(family, zoo.HOME[family], batch)
    assert float(loss) > 0.1
    for way, context in WAYS.items():
        other_loss, other_grads = loss_and_gradient(family, zoo.HOME[family], batch, **context)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6, err_msg=way)
        assert_equal_gradients(other_grads, grads)


MESHES = {
    "dp": {"preset": "dp", "data": 8},
    "fsdp": {"preset": "fsdp", "fsdp": 8},
    "tp": {"preset": "tp", "data": 2, "tensor": 4},
    "fsdp+tp": {"preset": "fsdp+tp", "data": 2, "fsdp": 2, "tensor": 2},
    "sp": {"preset": "sp", "data": 2, "tensor": 2, "sequence": 2},
}


def check_mesh(family, name, preset):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: JAX_NUM_CPU_DEVICES=8")
    batch = zoo.batch(name, family)
    loss, grads = loss_and_gradient(family, name, batch)
    on = zoo.layout(**MESHES[preset])
    made, objective = zoo.model(family, on=on, heads=zoo.objective(name, family).heads), zoo.objective(name, family)
    params = zoo.params(family, heads=objective.heads)
    shardings = on.parameters(params)
    step = jax.jit(
        lambda p, b: state.gradients(made, objective, p, b, microbatches=1, rng=None, carry=None, train=False)[:2],
        in_shardings=(shardings, on.batch()), out_shardings=(on.replicated(), shardings),
    )  # fmt: skip
    other_loss, other_grads = step(jax.device_put(params, shardings), jax.device_put(batch, on.batch()))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    assert_equal_gradients(other_grads, grads)


@pytest.mark.parametrize("preset", list(MESHES))
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5_1.1"])
def test_eight_devices_equal_one(family, preset):
    check_mesh(family, zoo.HOME[family], preset)


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(MESHES))
@pytest.mark.parametrize(("family", "name"), [pair for pair in zoo.CROSS if pair not in zoo.PAIRS or pair[0] == "t5_1.1"])
def test_eight_devices_equal_one_for_every_pair(family, name, preset):
    check_mesh(family, name, preset)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family):
    batch = zoo.batch(zoo.HOME[family], family)
    loss, _ = loss_and_gradient(family, zoo.HOME[family], batch)
    half, _ = loss_and_gradient(family, zoo.HOME[family], batch, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, loss, rtol=2e-2)


@pytest.mark.parametrize("family", DECODERS)
def test_cached_decoding_equals_the_full_pass(family):
    """One token at a time, from a cache, gives the hidden states of the whole row."""
    made, params = zoo.model(family), zoo.params(family)
    batch = zoo.batch(zoo.HOME[family], family, rows=3)
    batch |= {"segments_BL": jnp.ones_like(batch["segments_BL"]), "positions_BL": jnp.tile(jnp.arange(zoo.LENGTH), (3, 1))}
    full = made.hidden(params, batch, mask="causal").hidden_BLD
    encoded = made.encode(params, batch) if made.config.kind == "encoder_decoder" else None
    step = jax.jit(lambda part, cache: made.hidden(params, part, mask="causal", cache=cache) if encoded is None else made.decode(params, part, encoded, cache=cache))
    cache, outputs = made.empty_cache(rows=3, length=zoo.LENGTH), []
    for start, stop in [(0, 5), *((n, n + 1) for n in range(5, zoo.LENGTH))]:
        part = {key: value[:, start:stop] if key.endswith("_BL") else value for key, value in batch.items()}
        out = step(part, cache)
        cache = out.cache
        outputs.append(out.hidden_BLD)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=3e-5)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("preset", list(parallel.RULES))
def test_every_parameter_has_a_place(name, preset):
    """At every published size, each parameter matches exactly one row of AXES and the words fit its dimensions."""
    on = parallel.Layout(zoo.layout().mesh, preset)
    family = MODELS[name]
    heads = {"encoder": ("mlm", "pooled")}.get(family.config.kind, ("lm",))
    for size, changes in family.sizes.items():
        made = models.make(family.config(**changes, vocab_size=512), context=Context(on), heads=heads)
        shapes = jax.eval_shape(functools.partial(made.init, lengths={"L": 8, "I": 8} if family.config.kind == "encoder_decoder" else {"L": 8}), jax.random.key(0))
        assert len(tree.paths(on.parameters(shapes))) == len(tree.paths(shapes)), size


PUBLISHED = {("gpt", "small", 50257): 124_439_808, ("bert", "base", 30522): 109_482_240, ("t5", "small", 32128): 60_506_624, ("t5", "v1_1_small", 32128): 76_961_152}


@pytest.mark.parametrize(("name", "size", "vocab"), list(PUBLISHED))
def test_published_parameter_counts(name, size, vocab):
    """Counts of the released models (BERT without its MLM head, with its pooler)."""
    family = MODELS[name]
    heads = {"encoder": ("pooled",)}.get(family.config.kind, ("lm",))
    made = models.make(family.config(**family.sizes[size], vocab_size=vocab), context=Context(zoo.layout()), heads=heads)
    shapes = jax.eval_shape(functools.partial(made.init, lengths={"L": 8, "I": 8} if family.config.kind == "encoder_decoder" else {"L": 8}), jax.random.key(0))
    assert tree.size(shapes) == PUBLISHED[name, size, vocab]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_acts_in_training_only(family):
    changes = {"dropout": 0.3} | ({"attention_dropout": 0.3} if hasattr(zoo.CONFIGS[family], "attention_dropout") else {})
    made, params = zoo.model(family, changes=tuple(changes.items())), zoo.params(family)
    batch = zoo.batch(zoo.HOME[family], family)
    run = jax.jit(functools.partial(made.hidden, mask="causal"), static_argnames="train")
    plain = run(params, batch, train=False).hidden_BLD
    first, again, other = (run(params, batch, train=True, rng=jax.random.key(key)).hidden_BLD for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, plain)
    np.testing.assert_allclose(plain, zoo.model(family).hidden(params, batch, mask="causal").hidden_BLD, atol=1e-6)


def test_flops_formula_counts_what_the_program_does():
    """The forward formula equals the matrix products in the traced program, attention included."""
    for family in FAMILIES:
        made, objective = zoo.model(family, scan_layers=False), zoo.objective(zoo.HOME[family], family)
        batch = zoo.batch(zoo.HOME[family], family, rows=1)
        traced = jax.make_jaxpr(lambda p, b, made=made, objective=objective: objective.loss(made, p, b, rng=None, carry=None, train=False)[0])(zoo.params(family), batch)
        config = dataclasses.replace(made.config)
        np.testing.assert_allclose(config.forward_flops(objective.lengths, objective.target_positions), count_dot_flops(traced.jaxpr), rtol=1e-6, err_msg=family)


def count_dot_flops(jaxpr) -> float:
    """2 x multiply-adds of every dot_general of a program, loops included."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[d] for d in contract])
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.core.jaxprs_in_params(equation.params) if hasattr(jax.core, "jaxprs_in_params") else _inner(equation.params):
            total += times * count_dot_flops(getattr(inner, "jaxpr", inner))
    return total


def _inner(params):
    return [value for value in params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
