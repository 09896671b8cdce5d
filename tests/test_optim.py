"""Update rules against plain optax on unstacked layers, schedules at their corners, masks, freezing, layerwise rates, state paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from ptm import config, optim, tree
from ptm.fields import ConfigError

N, D, H, K, F, V = 2, 16, 2, 8, 24, 20
FACTORED_SIZE = 16
SHAPES = {
    "token_embed/embedding": (V, D),
    "decoder/layers/attention/query/kernel": (N, D, H, K),
    "decoder/layers/attention/query/bias": (N, H, K),
    "decoder/layers/attention/out/kernel": (N, H, K, D),
    "decoder/layers/mlp/wi/kernel": (N, D, F),
    "decoder/layers/mlp_norm/scale": (N, D),
    "decoder/relative_bias/embedding": (8, H),
    "decoder/final_norm/scale": (D,),
    "lm_head/kernel": (D, V),
}
CONSTANT = config.Schedule(name="constant")
SPARED = {"decoder/layers/attention/query/bias", "decoder/layers/mlp_norm/scale", "decoder/final_norm/scale"}

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # the tests mostly compile


def draw(seed: int, *, scale: float = 1.0) -> dict:
    """Random leaves; each layer of a stack is 10 times larger than the one below, so that a rule that mixes layers shows."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in SHAPES.items():
        leaf = rng.normal(size=shape) * scale
        if tree.stacked(path):
            leaf *= 10.0 ** np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        flat[path] = jnp.asarray(leaf, jnp.float32)
    return tree.unflatten(flat)


def unstack(params: dict) -> dict:
    """{path#layer: leaf}, kernels as plain matrices: what an unrolled model without head dimensions would hold."""
    out = {}
    for path, leaf in tree.paths(params).items():
        for layer, value in enumerate(leaf) if tree.stacked(path) else [(0, leaf)]:
            if path.endswith("kernel"):
                value = value.reshape(-1, value.shape[-1]) if "/out/" in path else value.reshape(value.shape[0], -1)
            out[f"{path}#{layer}"] = value
    return out


def run(transform, params, grads):
    state, update = transform.init(params), compiled(transform.update)
    for gradient in grads:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def compare(options: config.Optimizer, reference, *, elsewhere=None, only=lambda path: True, rtol=2e-5):
    """Holds three steps to those of `reference` on unstacked layers, for the paths that `only` picks; the others to `elsewhere`."""
    params, grads = draw(0), [draw(seed, scale=0.1 * seed) for seed in (1, 2, 3)]
    ours = unstack(run(optim.make(options, CONSTANT, steps=10, params=params).transform, params, grads))
    start, flat_grads = unstack(params), [unstack(gradient) for gradient in grads]
    picked = {key: only(key.partition("#")[0]) for key in start}
    for rule, expected_there in ((reference, True), (elsewhere, False)):
        keys = [key for key in start if picked[key] == expected_there]
        assert bool(keys) == (rule is not None)
        if not keys:
            continue
        theirs = run(optax.chain(optax.clip_by_global_norm(options.clip_norm), rule), start, flat_grads)
        for key in keys:
            moved, expected = ours[key] - start[key], theirs[key] - start[key]
            assert np.abs(expected).max() > 0, key
            noise = 1e-5 * np.abs(expected).max() + 3e-7 * np.abs(start[key]).max()
            np.testing.assert_allclose(moved, expected, rtol=rtol, atol=noise, err_msg=key)


def mask(params):
    return {key: key.partition("#")[0] not in SPARED for key in params}


LR, WD = 0.03, 0.1


def options(name: str, **keys) -> config.Optimizer:
    return config.Optimizer(name=name, learning_rate=LR, weight_decay=WD, **{"clip_norm": 1.0, "b1": 0.9, "b2": 0.99} | keys)


def test_adamw_equals_optax_per_layer():
    compare(options("adamw"), optax.adamw(LR, b1=0.9, b2=0.99, weight_decay=WD, mask=mask))


def test_lion_equals_optax_per_layer():
    compare(options("lion"), optax.lion(LR, b1=0.9, b2=0.99, weight_decay=WD, mask=mask))


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_sgd_equals_optax(b1):
    reference = optax.chain(optax.sgd(1.0, momentum=b1 or None), optax.add_decayed_weights(-WD, mask), optax.scale(LR))
    compare(options("sgd", b1=b1), reference)
    moments = jax.tree.leaves(optim.make(options("sgd", b1=b1), CONSTANT, steps=10, params=draw(0)).transform.init(draw(0)))
    assert sum(leaf.size for leaf in moments) - 1 == (tree.size(draw(0)) if b1 else 0)


def test_lamb_equals_optax_per_layer_and_adam_where_nothing_decays():
    lamb = optax.lamb(LR, b1=0.9, b2=0.99, eps=1e-8, weight_decay=WD, mask=mask)
    compare(options("lamb"), lamb, only=lambda path: path not in SPARED, elsewhere=optax.adam(LR, b1=0.9, b2=0.99))


def test_lamb_moves_zero_parameters():
    params = jax.tree.map(jnp.zeros_like, draw(0))
    moved = run(optim.make(options("lamb", clip_norm=None), CONSTANT, steps=10, params=params).transform, params, [draw(1)])
    np.testing.assert_allclose(np.abs(moved["lm_head"]["kernel"]), LR, rtol=1e-2)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adafactor_equals_optax_per_layer(b1, monkeypatch):
    monkeypatch.setattr(optim, "FACTORED_SIZE", FACTORED_SIZE)
    reference = optax.adafactor(LR, min_dim_size_to_factor=FACTORED_SIZE, momentum=b1 or None, weight_decay_rate=LR * WD, weight_decay_mask=mask)
    compare(options("adafactor", b1=b1, b2=1.0), reference, rtol=1e-4)


def test_adafactor_factors_each_layer_and_caps_its_decay(monkeypatch):
    monkeypatch.setattr(optim, "FACTORED_SIZE", FACTORED_SIZE)
    params = draw(0)
    optimizer = optim.make(options("adafactor", b1=0.0, b2=0.5), CONSTANT, steps=10, params=params)
    state, update = optimizer.transform.init(params), compiled(optimizer.transform.update)
    shapes = {}
    optim.map_state(lambda path, leaf: shapes.setdefault(path, set()).add(leaf.shape), state, params=params)
    assert shapes["decoder/layers/attention/out/kernel"] == {(N, 1, 1, D), (N, H, K, 1)}
    assert shapes["decoder/relative_bias/embedding"] == {(8, H)} and shapes["decoder/layers/attention/query/bias"] == {(N, H, K)}
    for value in (1.0, 2.0, 2.0):
        _, state = update(jax.tree.map(lambda p, v=value: jnp.full_like(p, v * 1e-6), params), state, params)
    found = []
    optim.map_state(lambda path, leaf: found.append(leaf) if path == "decoder/final_norm/scale" else None, state, params=params)
    second = 1 - 2**-0.8  # below the cap; the third, 1 - 3 ** -0.8 = 0.58, is above
    np.testing.assert_allclose(found[0], 1e-12 * (0.5 * (second * 1 + (1 - second) * 4) + 0.5 * 4), rtol=1e-5)


def in_layers(path: str) -> bool:
    return "/layers/" in path and path.endswith("kernel")


def test_muon_equals_optax_per_layer_and_adam_elsewhere():
    def kernels(params):
        return {key: optax.contrib.MuonDimensionNumbers(0, 1) if in_layers(key.partition("#")[0]) else None for key in params}

    reference = optax.contrib.muon(LR, beta=0.9, weight_decay=WD, consistent_rms=0.2, muon_weight_dimension_numbers=kernels)
    adamw = optax.adamw(LR, b1=0.9, b2=0.99, weight_decay=WD, mask=mask)
    compare(options("muon"), reference, only=in_layers, elsewhere=adamw, rtol=1e-3)


def test_muon_gives_each_layer_singular_values_near_one():
    params = draw(0)
    plain = config.Optimizer(name="muon", learning_rate=1.0, weight_decay=0.0)
    transform = optim.make(plain, CONSTANT, steps=10, params=params).transform
    updates, _ = compiled(transform.update)(draw(1), transform.init(params), params)
    out = np.asarray(updates["decoder"]["layers"]["attention"]["out"]["kernel"]).reshape(N, H * K, D) / (0.2 * D**0.5)
    for layer in out:
        values = np.linalg.svd(layer, compute_uv=False)
        assert 0.9 < values[0] < 1.3 and np.median(values) > 0.6


def test_clip_applies_once_to_the_trainable_gradient():
    params, gradient = draw(0), draw(1)

    def updated(**keys):
        options = config.Optimizer(name="sgd", learning_rate=1.0, weight_decay=0.0, b1=0.0, **keys)
        transform = optim.make(options, CONSTANT, steps=10, params=params).transform
        return compiled(transform.update)(gradient, transform.init(params), params)[0]

    assert float(optax.tree.norm(updated(clip_norm=0.5))) == pytest.approx(0.5, rel=1e-5)
    head = updated(clip_norm=0.5, freeze=("decoder/.*", "token_embed/.*"))["lm_head"]
    assert float(optax.tree.norm(head)) == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_array_equal(updated(clip_norm=None)["lm_head"]["kernel"], -gradient["lm_head"]["kernel"])


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_leaves_do_not_move_and_have_no_moments(name):
    params = draw(0)
    optimizer = optim.make(options(name, freeze=("token_embed/.*", ".*/query/.*")), CONSTANT, steps=10, params=params)
    state = optimizer.transform.init(params)
    updates, _ = compiled(optimizer.transform.update)(draw(1), state, params)
    flat = tree.paths(updates)
    frozen = {path for path, value in optimizer.frozen.items() if value}
    assert frozen == {"token_embed/embedding", "decoder/layers/attention/query/kernel", "decoder/layers/attention/query/bias"}
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for path, update in flat.items():
        assert bool(np.any(update)) == (path not in frozen), path
        assert not (optimizer.decayed[path] and path in frozen)
    located = []
    optim.map_state(lambda path, leaf: located.append(path), state, params=params)
    assert set(located) - {None} == set(SHAPES) - frozen


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_state_leaf_is_located_and_has_the_dimensions_of_its_parameter(name):
    abstract = tree.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()})
    state = jax.eval_shape(optim.make(options(name), CONSTANT, steps=10, params=abstract).transform.init, abstract)
    seen = []

    def check(path, leaf):
        seen.append(path)
        if path is None:
            assert leaf.size <= 3
        else:
            assert len(leaf.shape) == len(SHAPES[path]) and all(a in (1, b) for a, b in zip(leaf.shape, SHAPES[path], strict=True))

    optim.map_state(check, {"opt_state": state, "ema": abstract}, params=abstract)
    assert set(SHAPES) <= set(seen)


def test_layerwise_factors_of_one_stack():
    factors = optim.layer_factors(draw(0), decay=0.5)
    np.testing.assert_allclose(factors["decoder/layers/mlp/wi/kernel"], np.array([0.25, 0.5]).reshape(N, 1, 1))
    assert factors["token_embed/embedding"] == 0.125 and factors["decoder/relative_bias/embedding"] == 0.125
    assert factors["decoder/final_norm/scale"] == factors["lm_head/kernel"] == 1


def test_layerwise_factors_of_a_decoder_on_an_encoder():
    shapes = {"encoder/layers/mlp/wi/kernel": (2, 4, 4), "decoder/layers/mlp/wi/kernel": (3, 4, 4), "encoder/final_norm/scale": (4,)}
    shapes |= {"decoder/final_norm/scale": (4,), "token_embed/embedding": (9, 4), "embed_norm/scale": (4,), "lm_head/kernel": (4, 9)}
    params = tree.unflatten({path: np.zeros(shape) for path, shape in shapes.items()})
    powers = {path: np.log2(factor).ravel().tolist() for path, factor in optim.layer_factors(params, decay=0.5).items()}
    assert powers["decoder/layers/mlp/wi/kernel"] == [-3, -2, -1] and powers["encoder/layers/mlp/wi/kernel"] == [-5, -4]
    assert powers["encoder/final_norm/scale"] == [-3] and powers["decoder/final_norm/scale"] == powers["lm_head/kernel"] == [0]
    assert powers["token_embed/embedding"] == powers["embed_norm/scale"] == [-6]


def test_layerwise_decay_scales_updates():
    params, gradient = draw(0), draw(1)

    def updated(decay):
        transform = optim.make(options("adamw", layerwise_decay=decay), CONSTANT, steps=10, params=params).transform
        return tree.paths(compiled(transform.update)(gradient, transform.init(params), params)[0])

    before, after, factors = updated(1.0), updated(0.5), optim.layer_factors(params, decay=0.5)
    for path in SHAPES:
        np.testing.assert_allclose(after[path], before[path] * factors[path], rtol=1e-6)


def test_schedules_at_their_corners():
    def values(name, *steps, **keys):
        factor = optim.schedule_factor(config.Schedule(name=name, **keys), steps=100)
        return [round(float(factor(step)), 5) for step in steps]

    for name in optim.SCHEDULES:
        assert values(name, 0, 5, 10, warmup_steps=10) == [0.0, 0.5, 1.0]
        assert values(name, 0) == [1.0]
    assert values("constant", 10, 55, 100, 200, warmup_steps=10) == [1, 1, 1, 1]
    assert values("linear", 55, 100, 150, warmup_steps=10, final_factor=0.2) == [0.6, 0.2, 0.2]
    assert values("cosine", 55, 100, 150, warmup_steps=10, final_factor=0.2) == [0.6, 0.2, 0.2]
    assert values("cosine", 25) == [round(0.5 + 0.5 * np.cos(np.pi / 4), 5)]
    assert values("rsqrt", 25, 100, warmup_steps=25) == [1.0, 0.5]
    assert values("rsqrt", 1, 4, 100) == [1.0, 0.5, 0.1]
    assert values("wsd", 79, 80, 90, 100, warmup_steps=10, final_factor=0.1) == [1.0, 1.0, 0.55, 0.1]
    assert values("wsd", 60, 80, 100, warmup_steps=60, decay_share=0.9) == [1.0, 0.5, 0.0]
    assert values("linear", 50, 100, warmup_steps=100) == [0.5, 1.0]


def test_the_learning_rate_that_is_told_is_the_one_that_is_applied():
    params = tree.unflatten({"lm_head/kernel": jnp.ones((2, 2))})
    keys = config.Optimizer(name="sgd", learning_rate=0.4, weight_decay=0.0, b1=0.0, clip_norm=None)
    optimizer = optim.make(keys, config.Schedule(name="linear", warmup_steps=2), steps=6, params=params)
    state = optimizer.transform.init(params)
    for step in range(6):
        updates, state = optimizer.transform.update(jax.tree.map(jnp.ones_like, params), state, params)
        np.testing.assert_allclose(updates["lm_head"]["kernel"], -optimizer.learning_rate(step), rtol=1e-6)
    assert float(optimizer.learning_rate(2)) == pytest.approx(0.4) and float(optimizer.learning_rate(6)) == 0


def test_decay_mask_follows_the_patterns():
    optimizer = optim.make(options("adamw"), CONSTANT, steps=10, params=draw(0))
    assert {path for path, decayed in optimizer.decayed.items() if not decayed} == SPARED
    assert list(optimizer.decayed) == list(optimizer.frozen) == list(tree.paths(draw(0)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adam"}, "unknown optimizer.name 'adam'.*Did you mean 'adamw'"),
        ({"freeze": ("embed",)}, "optimizer.freeze: 'embed' matches none .*whole path"),
        ({"freeze": (".*",)}, "nothing is left to train"),
        ({"no_decay": (".*/bias", ".*/gamma")}, "optimizer.no_decay: '.*/gamma' matches none"),
    ],
)
def test_wrong_optimizer_keys(keys, message):
    with pytest.raises(ConfigError, match=message):
        optim.make(config.Optimizer(**keys), CONSTANT, steps=10, params=draw(0))


def test_wrong_schedule_keys():
    with pytest.raises(ConfigError, match="unknown schedule.name 'cosin'.*Did you mean 'cosine'"):
        optim.schedule_factor(config.Schedule(name="cosin"), steps=10)
    with pytest.raises(ConfigError, match="schedule.warmup_steps=11 is longer than the run"):
        optim.schedule_factor(config.Schedule(warmup_steps=11), steps=10)


def test_default_patterns_need_not_match():
    params = tree.unflatten({"lm_head/kernel": jnp.ones((2, 2))})
    assert optim.make(config.Optimizer(), CONSTANT, steps=10, params=params).decayed == {"lm_head/kernel": True}
