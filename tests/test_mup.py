"""The maximal update parametrisation: what it scales and what not, that it is the standard one at its base width, and what it is refused with."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import zoo

from ptm import adopt, config, convert, mup, optim, registry, tree, weights
from ptm import run as run_lib
from ptm.config import Mup
from ptm.fields import ConfigError
from ptm.nn.context import Context
from ptm.parallel import axes_words

FITTING = [family for family, made in zoo.CONFIGS.items() if hasattr(made, "init_std")]
UNTIED = ("roberta", "xlnet_uni", "llama")
CHANGES = {"electra": {"embed_width": 12}}  # else its generator is as wide as its embeddings, at this width alone
LENGTHS = {"L": zoo.LENGTH}


def scaling(family: str, options: Mup, *, heads=None, lora=None) -> mup.Scaling:
    heads = heads or zoo.objective(zoo.HOME[family], family).heads
    made = dataclasses.replace(zoo.CONFIGS[family], **CHANGES[family] if family in CHANGES else {})
    return mup.make(options, made, context=Context(zoo.layout()), heads=heads, lengths=LENGTHS, lora=lora)


def shapes(family: str, heads=None) -> dict[str, tuple[int, ...]]:
    made = zoo.model(family, heads=heads, changes=CHANGES[family] if family in CHANGES else ())
    return {path: leaf.shape for path, leaf in tree.paths(jax.eval_shape(lambda rng: made.init(rng, LENGTHS), jax.random.key(0))).items()}


@pytest.mark.parametrize("family", FITTING)
def test_at_the_base_width_it_is_the_standard_parametrisation(family):
    """No factor is left, so that the programs of the two are the same to the last operation."""
    assert scaling(family, Mup(base_width=32)) == mup.Scaling() == scaling(family, Mup())
    assert scaling(family, Mup(base_width=32, base_heads=zoo.CONFIGS[family].num_heads)) == mup.Scaling()


def test_factors_of_a_decoder_by_hand():
    """Twice as wide as the base, with as many heads: all but positions, pieces and layers doubles."""
    found = scaling("gpt", Mup(base_width=16, base_heads=4))
    layers = {f"decoder/layers/{name}/kernel" for name in ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/wi", "mlp/wo")}
    assert found.rates == dict.fromkeys(layers, 0.5)
    assert found.initial == dict.fromkeys(layers, pytest.approx(0.5**0.5))
    assert found.multipliers == (("token_embed/embedding", 0.5),)
    assert found.attention == pytest.approx(0.5**0.5), "1/8 instead of 1/sqrt(8), where it is 1/sqrt(4) at the base"
    assert scaling("gpt", Mup(base_width=16)).attention == 1.0, "heads are added, of the same size"
    wider = scaling("gpt", Mup(base_width=64))
    assert set(wider.rates.values()) == {2.0} and wider.multipliers == (("token_embed/embedding", 2.0),), "a base may be wider"


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("task", [False, True])
def test_every_parameter_is_of_a_known_kind(family, task):
    """A kernel whose input grows either learns more slowly or maps to outputs, whose input is multiplied; all else stays."""
    heads = ("classify:3", "tag:4", "qa") if task else zoo.objective(zoo.HOME[family], family).heads
    found = scaling(family, Mup(base_width=16), heads=heads)
    multipliers = dict(found.multipliers)
    assert found.rates.keys() == found.initial.keys() and not found.rates.keys() & multipliers.keys()
    for path, shape in shapes(family, heads).items():
        words = axes_words(path)
        if not path.endswith("/kernel"):
            assert path not in found.rates and (path not in multipliers or path.endswith("token_embed/embedding")), path
        elif words[-1] in ("vocab", "labels"):
            assert multipliers[path] == 0.5, path
        elif not path.endswith("embed_projection/kernel"):
            assert found.rates[path] == 0.5 and found.initial[path] == pytest.approx(0.5**0.5), (path, shape)
    tables = [path for path in multipliers if axes_words(path)[-1] != "labels"]
    assert len(tables) == (0 if task or family in ("albert", "electra") else 1), tables
    assert any(path.endswith("labels/kernel") for path in multipliers) == (task or family == "electra")


def test_widths_that_are_no_part_of_the_model_s_do_not_grow():
    """ALBERT's and ELECTRA's embeddings here: what reads them is left alone, and so are logits that are products with their table."""
    for family, projection in (("albert", "embed_projection/kernel"), ("electra", "discriminator/embed_projection/kernel")):
        found = scaling(family, Mup(base_width=16))
        assert projection in shapes(family) and projection not in found.rates
        assert "token_embed/embedding" not in dict(found.multipliers)


def test_low_rank_factors_learn_as_what_they_contract():
    found = scaling("gpt", Mup(base_width=16), lora=config.Lora(rank=2, targets=(".*",)))
    rates = {path: rate for path, rate in found.rates.items() if path.startswith("lora/")}
    assert rates and all(path.endswith("/a") and rate == 0.5 for path, rate in rates.items())


def test_initial_values_are_the_standard_ones_times_their_factors():
    found = scaling("bert", Mup(base_width=8))
    plain = zoo.model("bert")
    scaled = dataclasses.replace(plain, initial=found.initial)
    rng = jax.random.key(1)
    before, after = (tree.paths(zoo.jit(lambda rng, made=made: made.init(rng, LENGTHS))(rng)) for made in (plain, scaled))
    for path, leaf in before.items():
        np.testing.assert_allclose(after[path], leaf * (0.5 if path in found.rates else 1.0), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("rule", optim.ADAM_LIKE)
def test_rates_scale_the_step_but_not_the_decay(rule):
    params = {"decoder": {"layers": {"mlp": {"wi": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}}}}, "token_embed": {"embedding": jnp.ones((5, 3))}}
    gradient = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), params)

    def moved(decay: float, rates: dict[str, float]) -> dict[str, np.ndarray]:
        options = config.Optimizer(name=rule, learning_rate=0.1, weight_decay=decay, eps=0.0)
        made = optim.make(options, config.Schedule(name="constant"), steps=2, params=params, rates=rates)
        updates, _ = made.transform.update(gradient, made.transform.init(params), params)
        return tree.paths(optax.tree.sub(optax.apply_updates(params, updates), params))

    path = "decoder/layers/mlp/wi/kernel"
    whole, slow = moved(0.0, {}), moved(0.0, {path: 0.25})
    for other, leaf in whole.items():
        np.testing.assert_allclose(slow[other], leaf * (0.25 if other == path else 1.0), rtol=1e-5)
    np.testing.assert_allclose(moved(0.5, {path: 0.25})[path] - slow[path], -0.1 * 0.5, rtol=1e-5, err_msg="the decay is the rate times itself at any width")


@pytest.mark.parametrize("family", UNTIED)
@pytest.mark.parametrize("scanned", [True, False])
def test_folded_parameters_compute_the_same_without_multipliers(family, scanned):
    """Logits under multipliers, those of attention too, are logits of the folded parameters in the standard model."""
    name = zoo.HOME[family]
    heads = zoo.objective(name, family).heads
    made = zoo.CONFIGS[family]
    found = mup.make(Mup(base_width=16, base_heads=made.num_heads), made, context=Context(zoo.layout()), heads=heads, lengths=LENGTHS)
    assert found.multipliers and found.attention != 1.0
    options = {"multipliers": found.multipliers, "attention_multiplier": found.attention, "scan_layers": scanned}
    scaled, plain = (zoo.model(family, heads=heads, **context) for context in (options, {}))
    params, batch, objective = zoo.params(family, heads), zoo.batch(name, family), zoo.objective(name, family)

    def losses(model, params):
        return jax.tree.leaves(
            zoo.jit(lambda params, batch: objective.loss(model, params, batch, rng=None, carry=objective.init_carry(model, 8), train=False)[0])(params, batch)
        )

    ours, folded, without = losses(scaled, params), losses(plain, mup.folded(params, scaled.module.context)), losses(plain, params)
    np.testing.assert_allclose(ours, folded, rtol=1e-5)
    assert not np.allclose(ours, without, rtol=1e-3)


@pytest.mark.parametrize("preset", ["fsdp", "fsdp+tp", "sp"])
def test_devices_compute_what_one_does(preset):
    found = scaling("gpt", Mup(base_width=16, base_heads=4))
    options = {"multipliers": found.multipliers, "attention_multiplier": found.attention}
    mesh = {"preset": preset, "fsdp": 2, **({} if preset == "fsdp" else {"tensor": 2})}
    (one, start), (many, placed) = (zoo.gradients("gpt", "causal", on=on, **options) for on in (None, zoo.layout(**mesh)))
    batch = zoo.batch("causal", "gpt")
    (loss, gradient), (there, spread) = one(start, batch), many(placed, batch)
    np.testing.assert_allclose(loss, there, rtol=1e-5)
    zoo.assert_equal_gradients(spread, gradient)
    assert not np.allclose(loss, zoo.reference("gpt", "causal")[0], rtol=1e-3)


def test_other_widths_of_a_model():
    wide = mup.at_width(zoo.CONFIGS["llama"], 64)
    assert (wide.width, wide.num_heads, wide.num_kv_heads, wide.mlp_width) == (64, 8, 4, 96)
    fixed = mup.at_width(zoo.CONFIGS["palm"], 64, heads=4)
    assert (fixed.num_heads, fixed.head_dim, fixed.mlp_width) == (4, 8, 96)
    with pytest.raises(ConfigError, match=r"model\.num_heads=4 at model\.width=32 would be 2\.5 at a width of 20"):
        mup.at_width(zoo.CONFIGS["bert"], 20)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text) -> Path:
    """A run of some steps, twice as wide as its base, and text that it makes."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert runs.run(tiny(text), workdir, sample=True) == 0
    return workdir


def tiny(text: Path, **changes):
    options = {"train__steps": 3, "train__ema_decay": None, "train__microbatches": 1, "log__norms": "false", "mup__base_width": 8}
    return runs.tiny("concat", text=text, **options | changes)


def test_a_run_says_what_it_scales_and_keeps_to_it(trained, text):
    table = (trained / "params.txt").read_text(encoding="utf-8")
    assert "rate" in table.splitlines()[0] and any("wi/kernel" in line and line.endswith("x 0.5") for line in table.splitlines())
    with pytest.raises(ConfigError, match="mup.base_width"):
        runs.run(tiny(text, mup__base_width=16), trained)


def test_at_the_base_width_a_run_is_the_standard_run_bit_for_bit(text):
    """Two steps of training from the seed, with dropout."""
    ends = []
    for width in (None, 16):
        this = run_lib.setup(tiny(text, mup__base_width=width))
        now = this.init_state(this.init_params())
        for batch, _ in zip(this.loader(), range(2)):
            now, _ = this.train_step(now, this.to_device(batch, batch_size=16, rows=list(range(16))))
        ends.append(now)
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(tree.paths(end["params"])) for end in ends))


def test_parameters_of_another_parametrisation_are_refused(trained, text, tmp_path):
    begun = {"init": f"ckpt:{trained}", "tokenizer__path": trained / "tokenizer"}
    same = run_lib.setup(tiny(text, **begun), workdir=tmp_path / "same")
    params, _ = weights.start(same)
    now, before = tree.paths(params), tree.paths(weights.load(f"ckpt:{trained}")[1])
    for path in now:
        np.testing.assert_array_equal(now[path], before[path])
    standard = run_lib.setup(tiny(text, mup__base_width=None, **begun), workdir=tmp_path / "standard")
    with pytest.raises(ConfigError, match=r"set --config\.mup\.base_width=8"):
        weights.start(standard)


def test_a_recipe_that_takes_its_model_takes_its_parametrisation(trained):
    cfg = config.base(objective=registry.resolve(run_lib.read_config(trained)).objective)
    cfg.init, cfg.data.length = f"ckpt:{trained}", 16
    adopt.adopt(cfg)
    assert registry.resolve(cfg).mup == Mup(base_width=8)


def test_tied_tables_cannot_be_converted(trained, tmp_path):
    with pytest.raises(ConfigError, match="tie_embeddings=false"):
        convert.convert(f"ckpt:{trained}", f"hf:{tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_untied_models_are_converted_with_their_multipliers_folded(text, tmp_path):
    workdir = tmp_path / "run"
    assert runs.run(tiny(text, mup__base_heads=2, model__tie_embeddings="false"), workdir) == 0
    assert convert.convert(f"ckpt:{workdir}", f"hf:{tmp_path / 'out'}")
    this, params = weights.load(f"ckpt:{workdir}")
    there, read = weights.load(f"hf:{tmp_path / 'out'}")
    ours, theirs = this.model.module.context, there.model.module.context
    assert ours.multipliers and ours.attention_multiplier == pytest.approx(0.5**0.5) and (theirs.multipliers, theirs.attention_multiplier) == ((), 1.0)
    batch = {"tokens_BL": jnp.arange(8)[None] + 40, "segments_BL": jnp.ones((1, 8), jnp.int32), "positions_BL": jnp.arange(8)[None]}

    def logits(run, params):
        return run.model.logits(params, run.model.hidden(params, batch, mask="causal").hidden_BLD, head="lm")

    np.testing.assert_allclose(logits(this, params), logits(there, read), rtol=1e-4, atol=1e-6)


def test_configs_from_before_the_key_are_of_the_standard_parametrisation(trained):
    stored = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    del stored["mup"]
    assert registry.resolve(config.complete(stored, registry.REGISTRIES)).mup == Mup()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer__name": "adafactor"}, "allowed: adamw, lion"),
        ({"mup__base_width": "None", "mup__base_heads": 2}, "base_heads=2 without mup.base_width"),
        ({"init": "hf:somewhere"}, "standard parametrisation"),
    ],
)
def test_what_it_is_not_defined_for_is_refused(text, changes, told):
    with pytest.raises(ConfigError, match=told):
        registry.resolve(tiny(text, **changes))


def test_bases_that_do_not_fit_are_refused(text):
    with pytest.raises(ConfigError, match=r"mup\.base_width=12.*no whole number"):
        run_lib.setup(tiny(text, mup__base_width=12))
    with pytest.raises(ConfigError, match="models that fit: gpt, bert"):
        registry.resolve(runs.tiny("spans", text=text, mup__base_width=8))
    with pytest.raises(ConfigError, match="other parameters"):
        mup.make(Mup(base_width=16), zoo.CONFIGS["electra"], context=Context(zoo.layout()), heads=("mlm", "rtd"), lengths=LENGTHS)
