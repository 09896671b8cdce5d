"""Invariants of every family: no leak, padding and packing isolation, equal numbers however they are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ptm import parallel, state, tree
from ptm.fields import ConfigError
from ptm.models import MODELS
from ptm.nn import masks
from ptm.nn.context import Context
from ptm.nn.heads import COMMON_HEADS
from ptm.nn.norm import Norm

FAMILIES = list(zoo.CONFIGS)
# Variants of a family repeat what takes long in the full cross product only.
ONE_EACH = [pytest.param(family, marks=() if family == config.name else pytest.mark.slow) for family, config in zoo.CONFIGS.items()]
DECODERS = [family for family in FAMILIES if zoo.CONFIGS[family].kind != "encoder"]


def mask_of(family):
    return zoo.objective(zoo.HOME[family], family).mask


def hidden_function(family):
    """A fresh compiled function batch -> hidden_BLD."""
    made, params = zoo.model(family), zoo.params(family)
    return zoo.jit(lambda batch: made.hidden(params, batch, mask=mask_of(family)).hidden_BLD)


hidden = functools.cache(hidden_function)


def packed_row(family):
    """A row of two documents and some padding, as a batch of one."""
    made = zoo.objective(zoo.HOME[family], family)
    examples = zoo.examples(zoo.HOME[family], family, 2, length=6)
    return {key: value[None] for key, value in made.finish(zoo.row(examples, made.lengths, made.fields)).items()}


def influence(run, batch, field):
    """Which positions depend on which ids of `field`: booleans [L, ids], from one batch with another id changed in each row."""
    ids = batch[field].shape[1]
    rows = {key: np.repeat(value, ids + 1, axis=0) for key, value in batch.items()}
    rows[field][1:] = (rows[field][1:] + np.eye(ids, dtype=np.int32)) % zoo.VOCAB
    out = np.asarray(run(rows))
    return np.any(out[1:] != out[:1], axis=-1).T


def expected_influence(family, batch, field):
    seen = batch["segments_BL"][0][:, None] == batch["input_segments_BI" if field == "inputs_BI" else "segments_BL"][0][None, :]
    if mask_of(family) == "permutation":
        rank = batch["rank_BL"][0]
        seen &= (rank[None, :] < np.maximum(rank, 1)[:, None]) | np.eye(len(rank), dtype=bool)
    left_only = mask_of(family) == "causal" or hasattr(zoo.CONFIGS[family], "attn_type") and zoo.CONFIGS[family].attn_type == "uni"
    return np.tril(seen) if left_only and field == "tokens_BL" else seen


@pytest.mark.parametrize("family", FAMILIES)
def test_no_leak_and_no_lost_context(family):
    """A position depends on exactly the tokens that the mask lets it see: not one more, not one less."""
    batch = packed_row(family)
    for field in ("tokens_BL", "inputs_BI"):
        if field in batch:
            np.testing.assert_array_equal(influence(hidden(family), batch, field), expected_influence(family, batch, field))


def mutant_flipped(self, original=masks.Mask.dense):
    index = jnp.arange(self.query_segments_BL.shape[1])
    return original(self.replace(kind="full")) & (index[None, :] >= index[:, None])


def mutant_one_late(self, original=masks.Mask.dense):
    return original(self.replace(offset=self.offset + 1))


def mutant_packing_ignored(self, original=masks.Mask.dense):
    ones = jnp.ones_like(self.query_segments_BL)
    return original(self.replace(query_segments_BL=ones, key_segments_BT=ones))


@pytest.mark.parametrize("mutant", [mutant_flipped, mutant_one_late, mutant_packing_ignored])
def test_mutation_of_the_mask_is_seen(monkeypatch, mutant):
    """The leak test turns red when the causal comparison is flipped or off by one, and when segments are ignored."""
    monkeypatch.setattr(masks.Mask, "dense", mutant)
    batch = packed_row("gpt")
    assert not np.array_equal(influence(hidden_function("gpt"), batch, "tokens_BL"), expected_influence("gpt", batch, "tokens_BL"))


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_and_padding_isolation(family):
    """A document's hidden states are the same alone, packed with others, and in a longer row."""
    made = zoo.objective(zoo.HOME[family], family)
    examples = zoo.examples(zoo.HOME[family], family, 2, length=6)

    def run(contents, lengths):
        return hidden(family)(zoo.stack([made.finish(zoo.row(chosen, lengths, made.fields)) for chosen in contents]))

    sizes = [len(example["tokens_BL"]) for example in examples]
    together, first, second = run([examples, examples[:1], examples[1:]], made.lengths)
    longer = run([examples], {dim: size + 8 for dim, size in made.lengths.items()})[0]
    expected = jnp.concatenate([first[: sizes[0]], second[: sizes[1]]])
    np.testing.assert_allclose(together[: sum(sizes)], expected, atol=2e-5)
    np.testing.assert_allclose(longer[: sum(sizes)], expected, atol=2e-5)


WAYS = {
    "unrolled, remat dots, chunked loss": {"scan_layers": False, "remat": "dots", "loss_chunk": 16},
    "scanned, remat full, chunked attention": {"remat": "full", "attention": "chunked", "attention_chunk": 4},
}
SINGLE_WAYS = {
    "unrolled": {"scan_layers": False},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "unrolled, remat full": {"scan_layers": False, "remat": "full"},
    "chunked attention": {"attention": "chunked", "attention_chunk": 4},
    "chunked loss": {"loss_chunk": 16},
}


def check_way(family, name, context):
    step, params = zoo.gradients(family, name, **context)
    loss, grads = step(params, zoo.batch(name, family))
    expected_loss, expected_grads = zoo.reference(family, name)
    assert float(expected_loss) > 0.1
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected_grads)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("family", ONE_EACH)
def test_same_numbers_however_computed(family, way):
    """Scanned = unrolled = rematerialised = chunked, loss and gradients."""
    check_way(family, zoo.HOME[family], WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("way", list(SINGLE_WAYS))
@pytest.mark.parametrize(("family", "name"), zoo.CROSS)
def test_same_numbers_however_computed_one_way_at_a_time(family, name, way):
    check_way(family, name, SINGLE_WAYS[way])


@pytest.mark.parametrize("family", ONE_EACH)
def test_bfloat16_is_near_float32(family):
    name = zoo.HOME[family]
    objective, made = zoo.objective(name, family), zoo.model(family, dtype=jnp.bfloat16)
    batch = zoo.batch(name, family)
    totals = zoo.jit(lambda params: objective.loss(made, params, batch, rng=None, carry=None, train=False)[0])(zoo.params(family, heads=objective.heads))
    assert all(total.dtype == jnp.float32 for total in totals.values())
    np.testing.assert_allclose(state.weighted_sum(objective, totals, objective.weights(batch)), zoo.reference(family, name)[0], rtol=2e-2)


@pytest.mark.parametrize("family", DECODERS)
def test_cached_decoding_equals_the_full_pass(family):
    """A prompt and then one token at a time, from a cache, give the hidden states of the whole row."""
    made, params = zoo.model(family), zoo.params(family)
    rng = np.random.default_rng(0)
    batch = {"tokens_BL": rng.integers(8, 40, (3, zoo.LENGTH)), "segments_BL": np.ones((3, zoo.LENGTH), np.int32)}
    batch |= {"positions_BL": np.tile(np.arange(zoo.LENGTH), (3, 1)), "inputs_BI": rng.integers(8, 40, (3, 7)), "input_segments_BI": np.ones((3, 7), np.int32)}
    if made.config.kind == "encoder_decoder":
        encoded = zoo.jit(functools.partial(made.encode, params))(batch)
        step = zoo.jit(lambda part, cache: made.decode(params, part, encoded, cache=cache))
    else:
        step = zoo.jit(lambda part, cache: made.hidden(params, part, mask="causal", cache=cache))
    cache, outputs = made.empty_cache(rows=3, length=zoo.LENGTH), []
    for start, stop in [(0, 5), *((n, n + 1) for n in range(5, zoo.LENGTH))]:
        out = step({key: value[:, start:stop] if key.endswith("_BL") else value for key, value in batch.items()}, cache)
        cache = out.cache
        outputs.append(out.hidden_BLD)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), hidden(family)(batch), atol=3e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_parameter_has_a_place(name):
    """At every published size and with every head, each parameter matches exactly one row of AXES and the words fit its dimensions."""
    heads = tuple(f"{head}:3" if head in ("classify", "tag", *COMMON_HEADS) else head for head in (*MODELS[name].config.heads, *COMMON_HEADS))
    for size, changes in MODELS[name].sizes.items():
        shapes = zoo.shapes(name, heads=heads, vocab_size=512, **changes)
        assert set(COMMON_HEADS) <= shapes.keys()
        for preset in parallel.RULES:
            on = parallel.Layout(zoo.layout().mesh, preset)
            assert tree.paths(on.parameters(shapes)).keys() == tree.paths(shapes).keys(), (size, preset)


PUBLISHED = {
    ("gpt", "gpt1", 40478): 116_534_784, ("gpt", "small", 50257): 124_439_808, ("gpt", "xl", 50257): 1_557_611_200, ("bert", "base", 30522): 109_482_240,
    ("bert", "large", 30522): 335_141_888, ("roberta", "base", 50265): 124_645_632, ("llama", "7b", 32000): 6_738_415_616,
    ("llama", "3.2_1b", 128256): 1_235_814_400, ("llama", "3.1_8b", 128256): 8_030_261_248, ("llama", "mistral_7b", 32000): 7_241_732_096,
    ("llama", "qwen2.5_0.5b", 151936): 494_032_768, ("llama", "qwen3_0.6b", 151936): 596_049_920, ("t5", "small", 32128): 60_506_624,
    ("t5", "base", 32128): 222_903_552, ("t5", "v1_1_small", 32128): 76_961_152, ("t5", "v1_1_base", 32128): 247_577_856,
    # One norm more than released, that before the first layer's attention: it lies in the stack and is never used.
    ("modernbert", "base", 50368): 149_655_232 + 768,
    ("xlnet", "base", 32000): 116_750_336, ("xlnet", "large", 32000): 360_300_800,
}  # fmt: skip


def test_frequencies_that_fade_out_nowhere_are_refused():
    """Bounds of Llama 3.1's stretching that are equal would divide 0 by 0."""
    made = zoo.CONFIGS["palm"]
    with pytest.raises(ConfigError, match="model.rotary_low=4.0 must be below model.rotary_high=4.0"):
        dataclasses.replace(made, rotary_low=4.0, rotary_high=4.0).check("model")
    dataclasses.replace(made, rotary_low=4.0, rotary_high=4.0, rotary_original_length=None).check("model")


@pytest.mark.parametrize(("name", "size", "vocab"), list(PUBLISHED))
def test_published_parameter_counts(name, size, vocab):
    """Counts of the released models (BERT and RoBERTa without the MLM head, with the pooler)."""
    heads = ("pooled",) if name in ("bert", "roberta") else MODELS[name].config.heads[:1]
    shapes = zoo.shapes(name, heads=heads, vocab_size=vocab, **MODELS[name].sizes[size])
    assert tree.size(shapes) == PUBLISHED[name, size, vocab]


@pytest.mark.parametrize("family", ["gpt", "bert", "t5"])
def test_dropout_acts_in_training_only(family):
    changes = {"dropout": 0.3} | ({"attention_dropout": 0.3} if hasattr(zoo.CONFIGS[family], "attention_dropout") else {})
    made, params = zoo.model(family, changes=tuple(changes.items())), zoo.params(family)
    batch = zoo.batch(zoo.HOME[family], family)
    run = zoo.jit(lambda rng: made.hidden(params, batch, mask=mask_of(family), train=True, rng=rng).hidden_BLD)
    first, again, other = (run(jax.random.key(key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-2) and not np.allclose(first, hidden(family)(batch), atol=1e-2)

    def program(model):
        return str(jax.make_jaxpr(lambda batch: model.hidden(params, batch, mask=mask_of(family), train=False).hidden_BLD)(batch))

    assert program(made) == program(zoo.model(family)), "without train the program is that of a model without dropout"


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_formula_counts_what_the_program_does(family):
    """The forward formula equals the matrix products that a row adds to the traced program, attention included."""
    made, objective = zoo.model(family), zoo.objective(zoo.HOME[family], family)
    batch = zoo.batch(zoo.HOME[family], family)

    def traced(rows):
        part = {key: value[:rows] for key, value in batch.items()}
        return dot_flops(jax.make_jaxpr(lambda params: objective.loss(made, params, part, rng=None, carry=None, train=False)[0])(zoo.params(family)).jaxpr)

    formula = made.forward_flops(objective.lengths, objective.target_positions, heads=objective.heads)
    np.testing.assert_allclose(formula, traced(2) - traced(1), rtol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
def test_layer_norm_in_one_pass_is_exact_to_the_rounding_of_its_output(mean):
    """In bfloat16 both moments are of one pass over x: the same as in float64, up to the last digit, however far the mean lies from 0."""
    x = jnp.asarray(np.random.default_rng(0).normal(mean, 1.0, (64, 768)), jnp.bfloat16)
    norm = Norm("layer", 1e-5)
    found = np.asarray(norm.apply(norm.init(jax.random.key(0), x), x), np.float64)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(axis=-1, keepdims=True)) / np.sqrt(exact.var(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, exact, rtol=2.0**-8, atol=2e-3)


@pytest.mark.parametrize("family", ["gpt", "llama", "t5", "xlnet"])
def test_remat_dots_computes_no_product_again(family):
    """Of layers' products without batch dimensions, a step under `dots` has as many as without recomputation, and under `full` more."""
    name = zoo.HOME[family]
    objective, params, batch = zoo.objective(name, family), zoo.params(family, heads=zoo.objective(name, family).heads), zoo.batch(name, family)

    def traced(policy):
        made = zoo.model(family, heads=objective.heads, remat=policy)
        step = jax.grad(lambda params: sum(objective.loss(made, params, batch, rng=jax.random.key(0), carry=None, train=True)[0].values()))
        return dot_flops(jax.make_jaxpr(step)(params).jaxpr, batched=False)

    assert traced("none") == traced("dots") < traced("full")


def dot_flops(jaxpr, *, batched: bool = True) -> float:
    """2 x multiply-adds of every dot_general of a program, loops included; without `batched` only of those without batch dimensions."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), (batch, _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (batched or not batch) * 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[d] for d in contract])
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += times * dot_flops(inner, batched=batched) if hasattr(inner, "eqns") else 0.0
    return total


def test_context_is_what_it_says():
    """Options of how to compute do not reach what is stored: the parameters of every way are the same tree."""
    base = jax.tree.structure(zoo.params("t5"))
    for context in WAYS.values():
        made = zoo.model("t5", **context)
        assert isinstance(made.module.context, Context)
        shapes = jax.eval_shape(functools.partial(made.init, lengths={"L": zoo.LENGTH, "I": zoo.INPUTS}), jax.random.key(0))
        assert jax.tree.structure(shapes) == base
