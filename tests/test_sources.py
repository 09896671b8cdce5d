"""What a mixture tells of its sources on the device: losses by source, which add up to the loss and change nothing of it."""

import contextlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import registry, state, train
from ptm.data.batch import SOURCE, keyed_rng
from ptm.fields import ConfigError
from ptm.models import bert
from ptm.objectives import pairs

CASES = [
    ("gpt", "causal"), ("bert", "mlm"), ("electra", "rtd"), ("xlnet", "permutation"), ("t5", "span_corruption"), ("bert", "classify"), ("bert", "tag"),
    ("bert", "choose"), ("bert", "span_qa"), ("bert", "regress"),
]  # fmt: skip
STEPS = 14


def with_sources(batch):
    """Of three sources the first two, segment by segment in turns over the rows."""
    segments = np.asarray(batch["segments_BL"])
    number = (segments + np.arange(len(segments))[:, None]) % 2
    return {**batch, SOURCE: jnp.asarray((number[..., None] == np.arange(3)) & (segments > 0)[..., None], jnp.int8)}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_losses_of_sources_add_up_to_the_loss(family, name):
    made = zoo.objective(name, family)
    model, params = zoo.model(family, heads=made.heads), zoo.params(family, heads=made.heads)
    batch = with_sources(zoo.batch(name, family))
    del (plain := dict(batch))[SOURCE]
    run = zoo.jit(lambda *batches: [made.loss(model, params, batch, rng=None, carry=None, train=False)[:2] for batch in batches])
    (totals, aux), (plain_totals, plain_aux) = run(batch, plain)
    assert plain_aux.sources == {} and jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6), totals, plain_totals))
    weights = made.weights(batch)
    for term in totals:
        of_term = [aux.sources[f"{'loss' if len(totals) == 1 else f'loss/{term}'}_{n}"] for n in range(3)]
        (_, first), (_, second), absent = of_term
        assert float(first) > 0 and float(second) > 0 and [float(x) for x in absent] == [0, 0]
        total, weight = (sum(float(x) for x in part) for part in zip(*of_term))
        np.testing.assert_allclose(total / weight, totals[term] / weights[term], rtol=1e-5)
        assert weight == pytest.approx(float(weights[term]) * (2 if name == "span_qa" else 1))


@pytest.mark.parametrize(("family", "name"), [("bert", "mlm"), ("gpt", "causal")])
def test_gradients_are_those_without_sources(family, name):
    """Also in parts of a batch, and with logits in chunks; losses by source are those of the whole."""
    made = zoo.objective(name, family)
    params, batch = zoo.params(family), with_sources(zoo.batch(name, family))

    def step(chunk, microbatches, params, batch):
        return state.gradients(zoo.model(family, loss_chunk=chunk), made, params, batch, microbatches=microbatches, rng=None, carry=None, train=False)

    loss, grads, (_, _, aux), _ = zoo.jit(lambda *given: step(8, 2, *given))(params, batch)
    expected, expected_grads = zoo.reference(family, name)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected_grads)
    _, _, (_, _, whole), _ = zoo.jit(lambda *given: step(4096, 1, *given))(params, batch)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), aux.sources, whole.sources)) and len(whole.sources) == 3


def test_merged_sentences_keep_their_sources():
    """full_sentences drops the cls of all documents but the first; what moves takes its source along."""
    made = pairs.Pairs(
        pairs.Config(task="none", format="full_sentences"), tokenizer=zoo.Vocabulary(), length=24, packing="default", model_config=bert.BertConfig(num_types=2)
    )
    docs = zoo.documents(2, length=6)
    examples = list(itertools.chain.from_iterable(made.features(doc, rng=keyed_rng(doc.id), draw=None) for doc in docs))
    row = zoo.row(examples, made.lengths, made.fields)
    row[SOURCE] = (np.array([-1, *(int(n >= len(examples) // 2) for n in range(len(examples)))])[row["segments_BL"], None] == np.arange(2)).astype(np.int8)
    done = made.finish(row)
    real = done["segments_BL"] > 0
    assert done[SOURCE].shape == (24, 2) and not done[SOURCE][~real].any() and (done[SOURCE][real].sum(axis=1) == 1).all()
    own = [done["targets_BL"][done[SOURCE][:, n] == 1] for n in range(2)]
    for doc, found in zip(docs, own):
        assert [token for token in found if token >= 8] == doc.tokens_L.tolist()


def test_a_run_of_two_sources(tmp_path):
    """Its rows tell of sources; stopped beyond a change of weights it ends as if nothing had happened."""
    texts = [runs.corpus(tmp_path / f"{n}.txt", seed=n) for n in range(2)]

    def config():
        made = runs.tiny("concat", text=texts[0])
        made.data.source = tuple(f"text:{text}" for text in texts)
        made.data.weight_schedule, made.data.max_epochs = ("0=1:0", "5=1:3"), (50.0,)
        return made

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert runs.run(config(), whole) == 0
    with runs.at_batch(8, runs.stop):
        assert runs.run(config(), cut) == 75
    assert runs.run(config(), cut) == 0
    runs.assert_same(cut, whole, STEPS)
    for key, value, allowed in (("max_epochs", (60.0,), True), ("weight_schedule", ("0=1:0", "5=1:3", "9=1:1"), True), ("weight_schedule", (), False)):
        changed = config()
        changed.data[key] = value
        with pytest.raises(ConfigError, match=f"data.{key}"):
            train.check_resume(registry.resolve(changed), whole, ())
        with contextlib.nullcontext() if allowed else pytest.raises(ConfigError, match=f"data.{key}"):
            assert list(train.check_resume(registry.resolve(changed), whole, (f"data.{key}",))) == [f"data.{key}"]
    named = config()
    named.data.streams = 8  # the state of the data has the last word on it
    assert train.check_resume(registry.resolve(named), whole, ()) == {"data.streams": (4, 8)}
    rows = [json.loads(line) for line in runs.metrics(whole).splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    assert "loss_0" in steps[4] and "loss_1" not in steps[4] and steps[4]["tokens_1"] == steps[4]["draws_1"] == 0
    last = steps[STEPS]
    assert min(last["loss_0"], last["loss_1"]) <= last["loss"] <= max(last["loss_0"], last["loss_1"]) and last["tokens_1"] > 0
    (validation, *_) = [row for row in rows if "validation/loss" in row]
    assert {"validation/loss_0", "validation/loss_1"} <= validation.keys()
    low, high = sorted((validation["validation/loss_0"], validation["validation/loss_1"]))
    assert low <= validation["validation/loss"] <= high
