"""compute.remat=auto: what is kept by shapes alone against the compiler's own buffers, and the policy that follows from a budget."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest
import runs
import zoo

from ptm import config, describe, recompute, registry
from ptm import run as run_lib
from ptm.config import Compute
from ptm.fields import ConfigError
from ptm.models import bert
from ptm.objectives import distillation, mlm

GIB = 2**30


def shapes(name, family):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), zoo.batch(name, family))


def kept(family, policy):
    name = zoo.HOME[family]
    objective, params = zoo.objective(name, family), zoo.params(family, heads=zoo.objective(name, family).heads)
    return recompute.kept_bytes(zoo.model(family, heads=objective.heads, remat=policy), objective, params, shapes(name, family))


@pytest.mark.parametrize("family", ["gpt", "bert", "t5", "xlnet"])
def test_policies_keep_less_the_more_they_recompute(family):
    none, dots, full = (kept(family, policy) for policy in recompute.ORDER)
    assert none > dots > full > 0


def test_kept_bytes_are_those_of_a_known_function():
    """Of tanh(x w) w': x and the result of tanh, twice what a hand counts; parameters and batch are there anyway."""

    class Objective:
        def loss(self, model, params, batch, *, rng, carry, train):
            hidden = jnp.tanh(batch["x"] @ params["w"])
            return {"loss": jnp.sum(jnp.square(hidden @ params["v"]))}, None, None

    params = {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32), "v": jax.ShapeDtypeStruct((16, 4), jnp.float32)}
    found = recompute.kept_bytes(None, Objective(), params, {"x": jax.ShapeDtypeStruct((32, 8), jnp.float32)})
    assert 4 * (32 * 16 + 32 * 4) <= found <= 4 * (3 * 32 * 16 + 2 * 32 * 4)


def test_the_budget_decides(caplog):
    name = zoo.HOME["gpt"]
    objective = zoo.objective(name, "gpt")
    params, rows = zoo.params("gpt", heads=objective.heads), len(zoo.batch(name, "gpt")["tokens_BL"])
    sizes = {policy: kept("gpt", policy) / GIB for policy in recompute.ORDER}
    pick = functools.partial(
        recompute.choose, lambda policy: zoo.model("gpt", heads=objective.heads, remat=policy), [objective], params, lambda _, rows: shapes(name, "gpt"), rows=rows
    )
    assert [pick(budget=sizes[policy] * 1.001, parts=1) for policy in recompute.ORDER] == list(recompute.ORDER)
    assert pick(budget=sizes["none"] / 8 * 1.001, parts=8) == "none"
    with caplog.at_level(logging.WARNING):
        assert pick(budget=0.0, parts=1) == "full"
    assert "less than any policy keeps" in caplog.text


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="set both"):
        registry.resolve(config.base(model=bert.BertConfig(), objective=mlm.Config(), compute=Compute(remat="auto")))
    with pytest.raises(ConfigError, match="set both"):
        registry.resolve(config.base(model=bert.BertConfig(), objective=mlm.Config(), compute=Compute(remat_budget=1.0)))
    with pytest.raises(ConfigError, match="teacher"):
        taught = object.__new__(distillation.Distillation)
        recompute.choose(lambda policy: None, [taught], {}, lambda *_: {}, rows=1, budget=1.0, parts=1)


def test_what_was_chosen_is_recorded(tmp_path):
    """A session of a run tells the policy, not that it was left to a budget."""
    text = runs.corpus(tmp_path / "text.txt")
    for budget, policy in (("1.0", "none"), ("0.0", "full")):
        run = run_lib.setup(runs.tiny("concat", text=text, compute__remat="auto", compute__remat_budget=budget), devices=jax.devices()[:1])
        assert describe.session(run, 0, {})["remat"] == policy
