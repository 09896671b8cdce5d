"""ALBERT: what layers share. ELECTRA: what its two encoders share, and which of them there are. Both: released sizes, and ways to directories and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ptm import fields, hf, models, optim, tree
from ptm.fields import ConfigError
from ptm.hf import files
from ptm.models import albert, electra
from ptm.nn.context import Context

DEEP = {"num_layers": 4, "num_groups": 2, "inner_layers": 2}  # 8 blocks: both of the first group twice, then both of the second twice
PARTS = {"attention": ("attention", "attention_norm"), "mlp": ("mlp", "mlp_norm")}


# --- ALBERT ---


@functools.cache
def drawn(family, heads, **changes):
    """A model of a family's small config with some keys changed, and random parameters."""
    made = zoo.model(family, heads=heads, changes=tuple(changes.items()))
    shapes = tree.paths(jax.eval_shape(functools.partial(made.init, lengths={"L": zoo.LENGTH}), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return made, tree.unflatten({path: 0.2 * rng.standard_normal(leaf.shape, np.float32) + path.endswith("norm/scale") for path, leaf in shapes.items()})


def hidden(model, params, batch, **options):
    return zoo.jit(functools.partial(model.hidden, mask="full", **options))(params, batch).hidden_BLD


@pytest.mark.parametrize(("share", "scan"), [("all", True), ("attention", False), ("mlp", True)])
def test_sharing_is_the_same_parameters_again(share, scan):
    """The hidden states are those of layers of their own that hold copies, the gradient of what is shared is the sum of theirs."""
    made, params = drawn("albert", ("mlm",), **DEEP, share=share)
    made = models.make(made.config, context=Context(zoo.layout(), scan_layers=scan), heads=("mlm",))
    alone = models.make(dataclasses.replace(made.config, share="none", num_groups=1), context=Context(zoo.layout()), heads=("mlm",))
    owner = np.array([0, 1, 0, 1, 2, 3, 2, 3])
    shared = {name for part, names in PARTS.items() if share in ("all", part) for name in names}
    layers = params["encoder"]["layers"]
    assert {name: {len(leaf) for leaf in tree.paths(layers[name]).values()} for name in layers} == {name: {4 if name in shared else 8} for name in layers}
    copies = {name: jax.tree.map(lambda leaf: leaf[owner], part) if name in shared else part for name, part in layers.items()}
    batch = zoo.batch("mlm", "albert")

    def total(model, params):
        states = model.hidden(params, batch, mask="full", states=True).states_NBLD
        return jnp.sum(jnp.sin(states)), states

    (_, states), grads = zoo.jit(jax.value_and_grad(lambda params: total(made, params), has_aux=True))(params)
    (_, expected), apart = zoo.jit(jax.value_and_grad(lambda params: total(alone, params), has_aux=True))({**params, "encoder": {"layers": copies}})
    assert states.shape[0] == 9
    np.testing.assert_allclose(states, expected, atol=1e-5)
    for name, part in apart["encoder"]["layers"].items():
        if name in shared:
            part = jax.tree.map(lambda leaf: jnp.stack([jnp.sum(leaf[owner == group], axis=0) for group in range(4)]), part)
        zoo.assert_equal_gradients(grads["encoder"]["layers"][name], part, layers=8)
    assert alone.config.sharing() is None


def test_layers_are_grouped_as_published():
    assert albert.Config(num_layers=12, num_groups=4).sharing().groups == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert albert.Config(num_layers=5, num_groups=2, inner_layers=2).sharing().groups == (0, 1, 0, 1, 0, 1, 2, 3, 2, 3)
    for keys, message in (({"num_groups": 13}, "num_groups=13 exceeds.*1 to 12"), ({"num_groups": 2, "share": "none"}, "num_groups=2 has no meaning")):
        with pytest.raises(ConfigError, match=message):
            fields.check(albert.Config(**keys), "model")


def count(name, heads, **changes):
    return tree.size(zoo.shapes(name, heads=heads, **changes))


# Released models: bodies of ALBERT with their pooler, discriminators of ELECTRA with their head.
RELEASED = {
    ("albert", "base"): 11_683_584, ("albert", "large"): 17_683_968, ("albert", "xlarge"): 58_724_864, ("albert", "xxlarge"): 222_595_584,
    ("electra", "small"): 13_549_057, ("electra", "base"): 109_483_009, ("electra", "large"): 335_142_913,
}  # fmt: skip
TABLE_1 = {"base": 12, "large": 18, "xlarge": 60, "xxlarge": 235}  # Lan et al. 2020, millions


@pytest.mark.parametrize(("name", "size"), list(RELEASED))
def test_parameter_counts_of_released_models(name, size):
    heads, vocab = (("pooled",), 30000) if name == "albert" else (("rtd",), 30522)
    assert count(name, heads, vocab_size=vocab, **models.MODELS[name].sizes[size]) == RELEASED[name, size]
    assert name == "electra" or RELEASED[name, size] / 1e6 == pytest.approx(TABLE_1[size], rel=0.06)


@pytest.mark.parametrize(("share", "counts"), [("all", (31, 12)), ("attention", (83, 64)), ("mlp", (57, 38)), ("none", (108, 89))])
def test_parameter_counts_of_the_ablation(share, counts):
    """Lan et al. 2020, table 4: millions with embeddings of 768 (where theirs may have no map behind them) and of 128."""
    for embed_width, millions in zip((768, 128), counts):
        size = count("albert", ("pooled",), vocab_size=30000, embed_width=embed_width, share=share, **albert.SIZES["base"])
        assert abs(size / 1e6 - millions) < 2


def test_layerwise_rates_of_shared_layers_follow_the_highest():
    shapes = zoo.shapes("albert", heads=("mlm",), vocab_size=48, num_layers=6, width=32, num_heads=4, share="attention", num_groups=2)
    powers = {path: np.log2(factor).ravel().tolist() for path, factor in optim.layer_factors(shapes, decay=0.5).items()}
    assert powers["encoder/layers/attention/query/kernel"] == [-4, -1]
    assert powers["encoder/layers/mlp/wi/kernel"] == [-6, -5, -4, -3, -2, -1]
    assert powers["embed_projection/kernel"] == powers["token_embed/embedding"] == [-7]


# --- ELECTRA ---


def paths(heads, **changes):
    return set(tree.paths(zoo.shapes("electra", heads=heads, vocab_size=48, num_layers=2, width=32, num_heads=4, embed_width=16, **changes)))


TIES = {"none": 0.5, "tokens": 0.5, "embeddings": 0.5, "all": 1.0}


@pytest.mark.parametrize("tie", TIES)
def test_heads_build_the_encoders_that_they_need_at_places_of_their_own(tie):
    both, generator, discriminator, classify = (
        paths(heads, tie_embeddings=tie, generator_fraction=TIES[tie]) for heads in (("mlm", "rtd"), ("mlm",), ("rtd",), ("classify:3", "restore"))
    )
    assert generator | discriminator == both
    assert {path for path in generator if path.startswith("generator/")} == both - discriminator - {path for path in both if path.startswith("mlm_head/")}
    assert not [path for path in discriminator | classify if path.startswith(("generator/", "mlm_head/"))]
    assert {path.partition("/")[0] for path in classify - discriminator} == {"classify_head", "restore_head"}
    own = {path.split("/")[1] for path in generator if path.startswith("generator/")} & set(electra.EMBEDDINGS)
    expected = {"none": set(electra.EMBEDDINGS), "tokens": set(electra.EMBEDDINGS) - {"token_embed"}}.get(tie, set())
    assert own == expected
    assert any(path.startswith("generator/encoder/") for path in generator) == (tie != "all")


def test_the_generator_is_a_fraction():
    assert electra.Config(**electra.SIZES["base"]).generator_shape() == (256, 4, 1024)
    assert electra.Config(**electra.SIZES["large"]).generator_shape() == (256, 4, 1024)
    assert electra.Config(**electra.SIZES["small"]).generator_shape() == (64, 1, 256)
    assert electra.Config(width=96, num_heads=2, mlp_width=100, generator_fraction=0.125).generator_shape() == (12, 1, 12)
    with pytest.raises(ConfigError, match="generator_fraction=0.3 gives the generator a width of 230 and 4 heads.*fit: 1, 1/2, 1/3,"):
        fields.check(electra.Config(generator_fraction=0.3), "model")
    with pytest.raises(ConfigError, match="generator_fraction=0 gives"):
        fields.check(electra.Config(generator_fraction=0.0), "model")
    with pytest.raises(ConfigError, match="tie_embeddings=all.*generator_fraction=0.25; set it to 1"):
        fields.check(electra.Config(tie_embeddings="all"), "model")


def test_each_part_reads_with_its_own_encoder():
    """Widths tell the two apart; tied as a whole they are one; a head asks for its part; mlm alone is the generator's."""
    batch = zoo.batch("mlm", "electra")
    made, params = drawn("electra", ("mlm", "rtd"))

    def width(**options):
        return jax.eval_shape(functools.partial(made.hidden, mask="full", **options), params, batch).hidden_BLD.shape[-1]

    assert (width(part="generator"), width(part="discriminator"), width(), width(head="mlm"), width(head="rtd")) == (16, 32, 32, 16, 32)
    np.testing.assert_array_equal(hidden(zoo.model("electra", heads=("mlm",)), params, batch), hidden(made, params, batch, part="generator"))
    whole, values = drawn("electra", ("mlm", "rtd"), tie_embeddings="all", generator_fraction=1.0)
    np.testing.assert_array_equal(*(hidden(whole, values, batch, part=part) for part in ("generator", "discriminator")))
    assert jax.eval_shape(functools.partial(made.logits, head="rtd"), params, jnp.ones((2, 3, 32))).shape == (2, 3)


# --- directories of the reference library ---


@pytest.mark.parametrize("tie", TIES)
def test_electra_is_two_directories_and_one_model_again(tie, tmp_path):
    heads = ("mlm", "rtd")
    made, params = drawn("electra", heads, tie_embeddings=tie, generator_fraction=TIES[tie], activation="gelu")
    written = hf.write(made.config, heads, params)
    assert {name: exported.architecture.name for name, exported in written.items()} == {
        "generator": "ElectraForMaskedLM", "discriminator": "ElectraForPreTraining"
    }  # fmt: skip
    assert [written[name].config["hidden_size"] for name in written] == [made.config.generator_shape()[0], 32]
    for name, exported in written.items():
        files.write(tmp_path / name, exported.config, exported.tensors)
    imported = hf.read(tmp_path)
    assert imported.heads == heads
    assert imported.config == dataclasses.replace(made.config, mlp_width=128)
    before, after = tree.paths(params), tree.paths(imported.params)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)


def test_parts_of_electra_are_read_alone_and_wrong_pairs_are_refused(tmp_path):
    made, params = drawn("electra", ("mlm", "rtd"))
    for name, exported in hf.write(made.config, ("mlm", "rtd"), params).items():
        files.write(tmp_path / name, exported.config, exported.tensors)
    generator, discriminator = hf.read(tmp_path / "generator"), hf.read(tmp_path / "discriminator")
    assert (generator.heads, generator.config.width, generator.config.generator_fraction) == (("mlm",), 16, 1.0)
    batch = zoo.batch("mlm", "electra")
    for imported, part in ((generator, "generator"), (discriminator, "discriminator")):
        again = models.make(imported.config, context=Context(zoo.layout()), heads=imported.heads)
        np.testing.assert_allclose(hidden(again, imported.params, batch), hidden(made, params, batch, part=part), atol=1e-6)
    single = hf.write(made.config, ("mlm",), params)
    assert list(single) == [""] and single[""].config["hidden_size"] == 16
    files.write(tmp_path / "twice" / "generator", single[""].config, single[""].tensors)
    deep, values = drawn("electra", ("rtd",), num_layers=3)
    exported = hf.write(deep.config, ("rtd",), values)[""]
    files.write(tmp_path / "twice" / "discriminator", exported.config, exported.tensors)
    with pytest.raises(ConfigError, match="do not make one model: num_layers=2 beside 3"):
        hf.read(tmp_path / "twice")


def test_what_has_no_counterpart_is_refused():
    made, params = drawn("albert", ("mlm",), share="attention")
    with pytest.raises(ConfigError, match="model.share='attention' has no counterpart"):
        hf.write(made.config, ("mlm",), params)
    made, params = drawn("electra", ("mlm",), activation="relu")
    with pytest.raises(ConfigError, match="model.activation=relu has no counterpart in a generator"):
        hf.write(made.config, ("mlm",), params)
