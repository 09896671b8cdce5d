"""Dropout (design, section 3): the numbers of jax's own generator and of linen's own module, without its loop over arrays on CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptm.nn import dropout


@pytest.mark.parametrize(("shape", "share"), [((), 0.3), ((0, 3), 0.5), ((1001,), 0.5), ((3, 5, 70), 0.9), ((2, 1, 64, 64), 0.1)])
def test_bernoulli_is_that_of_the_library(shape, share):
    for seed in (0, 7):
        rng = jax.random.fold_in(jax.random.key(seed), 3)
        expected = np.asarray(jax.random.bernoulli(rng, share, shape))
        assert np.array_equal(dropout.bernoulli(rng, share, shape), expected)
        assert np.array_equal(jax.jit(dropout.bernoulli, static_argnums=(1, 2))(rng, share, shape), expected)


def test_bernoulli_of_other_generators_and_of_float64_is_that_of_the_library():
    rng = jax.random.key(1, impl="rbg")
    assert np.array_equal(dropout.bernoulli(rng, 0.9, (64,)), jax.random.bernoulli(rng, 0.9, (64,)))
    with jax.enable_x64(True):
        rng = jax.random.key(1)
        assert np.array_equal(dropout.bernoulli(rng, 0.9, (64,)), jax.random.bernoulli(rng, 0.9, (64,)))


def test_bits_are_made_without_a_loop_on_cpu():
    def program(function):
        return jax.jit(function, static_argnums=(1, 2)).lower(jax.random.key(0), 0.9, (64, 64)).compile().as_text()

    assert " while(" in program(jax.random.bernoulli)  # else the library has become as fast, and ours can go
    assert " while(" not in program(dropout.bernoulli) and " conditional(" not in program(dropout.bernoulli)


def test_module_drops_what_that_of_linen_drops():
    x = jnp.arange(1.0, 301.0).reshape(3, 100)

    class Twice(nn.Module):
        kind: type

        @nn.compact
        def __call__(self, x):
            return self.kind(0.2)(self.kind(0.5, deterministic=False)(x), deterministic=False)

    rngs = {"dropout": jax.random.key(5)}
    ours, theirs = (Twice(kind).apply({}, x, rngs=rngs) for kind in (dropout.Dropout, nn.Dropout))
    assert np.array_equal(ours, theirs) and 0.25 < np.mean(np.asarray(ours) > 0) < 0.55
    gradient = jax.grad(lambda x: jnp.sum(dropout.Dropout(1.0, deterministic=False).apply({}, x, rngs=rngs)))(x)
    assert not np.any(gradient)
    assert dropout.Dropout(0.5).apply({}, x, deterministic=True) is x
