"""Replaced-token detection: what is sampled and where, what the discriminator must say, and the arms of the ablation by hand."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

from ptm import config as config_lib
from ptm import fields, models, registry, state, text, tree
from ptm.data.batch import Document, keyed_rng
from ptm.fields import ConfigError
from ptm.models import bert, electra
from ptm.nn.stack import Output
from ptm.objectives import OBJECTIVES, mlm, rtd

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "chef", "cook", "##ed", "meal", "ate", "a", "serve", "soup", "."]
ARMS = list(rtd.ARMS)


class Tables:
    """A model that knows nothing but the token it stands on: each head's logits are a row of a table."""

    module = types.SimpleNamespace(context=types.SimpleNamespace(loss_chunk=1000, layout=None))

    def hidden(self, params, batch, *, mask, part, train, rng):
        assert mask == "full" and part in ("generator", "discriminator")
        return Output(hidden_BLD=jax.nn.one_hot(batch["tokens_BL"], len(params["mlm"])))

    def logits(self, params, hidden, *, head):
        return hidden @ params[head]


def tables(size=zoo.VOCAB, seed=0):
    rng = np.random.default_rng(seed)
    return {"mlm": rng.standard_normal((size, size)), "restore": rng.standard_normal((size, size)), "rtd": 2 * rng.standard_normal(size)}


def total(objective, params, batch, model=None, rng=None):
    totals, aux, _ = objective.loss(model or Tables(), params, batch, rng=rng, carry=None, train=True)
    return state.weighted_sum(objective, totals, objective.weights(batch)), (totals, aux)


def sampled(objective, params, batch, *, rng=None, model=None):
    """What the discriminator reads."""
    model = model or Tables()
    hidden_BLD = model.hidden(params, batch, mask="full", part="generator", train=False, rng=None).hidden_BLD
    _, samples_BS, _ = objective.generate(model, params, batch, hidden_BLD, rng=jax.random.key(0) if rng is None else rng)
    return np.asarray(rtd.replaced(batch, samples_BS))


# --- what is read, sampled and asked ---


def test_golden(tmp_path):
    """One sample is what stood there, one is another word: only this one counts as replaced."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    words = text.make("wordpiece", path=str(tmp_path / "vocab.txt"), lowercase=True)
    objective = rtd.RTD(rtd.Config(rate=0.3), tokenizer=words, length=16, packing="none", model_config=electra.Config())
    doc = Document("doc", words.encode("the chef cooked the meal ."))
    (example,) = objective.features(doc, rng=keyed_rng(12, "doc", 0), draw=None)
    batch = zoo.stack([objective.finish(zoo.row([example], objective.lengths, objective.fields))])
    generator = np.zeros((len(PIECES), len(PIECES)))
    generator[PIECES.index("[MASK]"), [PIECES.index(word) for word in ("meal", "soup", "ate", "cook")]] = 9.0
    read = sampled(objective, {"mlm": generator}, batch)[0]
    size = int(batch["segments_BL"].sum())
    shown = {name: " ".join(words.pieces(ids[:size])) for name, ids in (("masked", np.asarray(batch["tokens_BL"][0])), ("read", read))}
    labels = "".join("R" if new else "." for new in (read != np.asarray(batch["targets_BL"][0]))[:size])
    assert shown == {"masked": "[CLS] the chef cook ##ed the [MASK] [MASK] [SEP]", "read": "[CLS] the chef cook ##ed the meal ate [SEP]"}
    assert labels == ".......R."


def test_chosen_tokens_are_masked_or_kept_as_published():
    objective = zoo.objective("rtd", "electra")
    fates = []
    for doc in zoo.documents(300, length=100):
        for part in objective.features(doc, rng=keyed_rng(0, doc.id, 0), draw=None):
            chosen = part["weights_BL"] > 0
            fates += np.where(part["tokens_BL"] == zoo.Vocabulary.mask_id, "mask", np.where(part["tokens_BL"] == part["targets_BL"], "kept", "other"))[
                chosen
            ].tolist()
    assert set(fates) == {"mask", "kept"} and len(fates) > 4000
    assert fates.count("mask") / len(fates) == pytest.approx(0.85, abs=0.03)


def test_a_sample_that_hits_the_original_counts_as_original():
    """The generator always says 9; the discriminator finds everything replaced. Right are the chosen places where another token stood, no others."""
    objective, batch, params = zoo.objective("rtd", "electra"), zoo.batch("rtd", "electra"), tables()
    chosen, real = np.asarray(batch["weights_BL"]) > 0, np.asarray(batch["segments_BL"]) > 0
    targets = np.where(chosen & (np.arange(zoo.LENGTH) % 2 == 0), 9, np.asarray(batch["targets_BL"]))
    batch = {**batch, "targets_BL": jnp.asarray(targets)}
    params["mlm"][:, 9], params["rtd"][:] = 100.0, 1.0
    read = sampled(objective, params, batch)
    np.testing.assert_array_equal(read, np.where(chosen, 9, targets))
    replaced = chosen & (targets != 9)
    assert 0 < replaced.sum() < chosen.sum()
    ratios = {name: [float(x) for x in pair] for name, pair in total(objective, params, batch)[1][1].ratios.items()}
    assert ratios["precision"] == [replaced.sum(), real.sum()] and ratios["recall"] == [replaced.sum()] * 2
    assert ratios["discriminator_accuracy"] == [replaced.sum(), real.sum()] and ratios["replaced_share"] == [replaced.sum(), real.sum()]


# --- noise ---


def many(rows=8, seed=0):
    """Full rows of one document each, with four chosen positions."""
    objective = zoo.objective("rtd", "electra", rate=0.25)
    examples = zoo.examples("rtd", "electra", rows, length=14, seed=seed, rate=0.25)
    return objective, zoo.stack([objective.finish(zoo.row([example], objective.lengths, objective.fields)) for example in examples])


def test_samples_depend_on_the_row_the_place_and_the_step_alone():
    """Not on the order of rows, on those beside it, on padding, or on the devices."""
    objective, batch = zoo.objective("rtd", "electra"), zoo.batch("rtd", "electra")
    params = tables()
    first = sampled(objective, params, batch)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(sampled(objective, params, {name: value[order] for name, value in batch.items()}), first[order])
    np.testing.assert_array_equal(sampled(objective, params, {name: value[2:4] for name, value in batch.items()}), first[2:4])
    padded = zoo.batch("rtd", "electra", extra_rows=2, extra_length=8)
    np.testing.assert_array_equal(sampled(objective, params, padded)[:8, : zoo.LENGTH], first)
    if jax.device_count() >= 8:
        on = zoo.layout(preset="dp", data=8)
        spread = zoo.jit(functools.partial(_samples, objective), in_shardings=(on.replicated(), on.batch()))
        np.testing.assert_array_equal(spread(params, jax.device_put(batch, on.batch())), first)
    other = sampled(objective, params, batch, rng=jax.random.key(1))
    assert (other != first).sum() > 3


def _samples(objective, params, batch):
    hidden_BLD = Tables().hidden(params, batch, mask="full", part="generator", train=False, rng=None).hidden_BLD
    return rtd.replaced(batch, objective.generate(Tables(), params, batch, hidden_BLD, rng=jax.random.key(0))[1])


def test_noise_differs_from_row_to_row_and_place_to_place():
    objective, batch = many()
    params = {"mlm": np.zeros((zoo.VOCAB, zoo.VOCAB))}
    samples = sampled(objective, params, batch)[np.asarray(batch["weights_BL"]) > 0]
    assert len(samples) >= 24 and len(set(samples.tolist())) > 14
    changed = {**batch, "tokens_BL": batch["tokens_BL"].at[0, 1].add(1)}
    assert (sampled(objective, params, changed)[0] != sampled(objective, params, batch)[0]).any()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_generator(temperature):
    """Frequencies over many steps are those of the softmax of logits / temperature, and pieces that no tokenizer has are never drawn."""
    objective = zoo.objective("rtd", "electra", rate=0.25, temperature=temperature)
    _, batch = many(rows=4)
    row = np.full(zoo.VOCAB + 3, -9.0)
    row[[8, 9, 10]] = [0.0, 1.0, 2.0]
    row[-3:] = 50.0
    params = {"mlm": np.tile(row, (zoo.VOCAB + 3, 1))}
    chosen = np.asarray(batch["weights_BL"]) > 0
    draw = zoo.jit(
        jax.vmap(lambda rng: rtd.replaced(batch, objective.generate(Tables(), params, batch, jax.nn.one_hot(batch["tokens_BL"], len(row)), rng=rng)[1]))
    )
    seen = np.asarray(draw(jax.random.split(jax.random.key(0), 300)))[:, chosen].ravel()
    expected = np.exp(row[: zoo.VOCAB] / temperature)
    expected /= expected.sum()
    shares = np.bincount(seen, minlength=zoo.VOCAB) / len(seen)
    assert len(shares) == zoo.VOCAB
    np.testing.assert_allclose(shares, expected, atol=5 * (0.25 / len(seen)) ** 0.5)


# --- the loss ---


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("chunk", [1000, 24])
@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_by_hand(arm, chunk, monkeypatch):
    """Terms, their weights and coefficients, in float64, from the tokens that were sampled; all at once and in chunks."""
    monkeypatch.setattr(Tables.module.context, "loss_chunk", chunk)
    objective, batch, params = zoo.objective("rtd", "electra", arm=arm, z_loss=0.1), zoo.batch("rtd", "electra"), tables()
    loss, (totals, aux) = zoo.jit(functools.partial(total, objective))(params, batch)
    read = np.asarray(zoo.jit(functools.partial(_samples, objective))(params, batch))
    masked, targets, weights, segments = (np.asarray(batch[name]) for name in ("tokens_BL", "targets_BL", "weights_BL", "segments_BL"))
    chosen, real, replaced = weights > 0, segments > 0, read != targets
    np.testing.assert_array_equal(read[~chosen], targets[~chosen])
    assert 0 < replaced.sum() <= chosen.sum()

    log_z = np.log(np.exp(params["mlm"]).sum(axis=1))
    mlm_nll = (log_z[masked] - params["mlm"][masked, targets])[chosen].sum()
    counted = chosen if arm in ("fifteen", "replace_mlm") else real
    detect = -log_sigmoid(np.where(replaced, 1, -1) * params["rtd"][read])
    new = np.take_along_axis(log_softmax(params["restore"][read]), targets[..., None], axis=-1)[..., 0]
    kept = np.where(replaced, -np.inf, log_sigmoid(-params["rtd"][read]))
    mixed = -np.logaddexp(new + log_sigmoid(params["rtd"][read]), kept)
    main = {"electra": detect, "fifteen": detect, "replace_mlm": -new, "all_tokens_mlm": mixed}[arm][counted].sum()
    term, coefficient = ("rtd", 50.0) if arm in ("electra", "fifteen") else ("restore", 1.0)
    np.testing.assert_allclose([totals["mlm"], totals["z"], totals[term]], [mlm_nll, (log_z[masked[chosen]] ** 2).sum(), main], rtol=1e-5)
    expected = (mlm_nll + 0.1 * (log_z[masked[chosen]] ** 2).sum()) / chosen.sum() + coefficient * main / counted.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.ratios["generator_accuracy"], [(params["mlm"].argmax(axis=1)[masked] == targets)[chosen].sum(), chosen.sum()])
    if term == "rtd":
        said = params["rtd"][read] > 0
        hits, found = (said & replaced)[counted].sum(), (said == replaced)[counted].sum()
        np.testing.assert_allclose(aux.ratios["discriminator_accuracy"], [found, counted.sum()])
        np.testing.assert_allclose(aux.ratios["precision"], [hits, said[counted].sum()])
        np.testing.assert_allclose(aux.ratios["recall"], [hits, replaced[counted].sum()])


def test_weights_depend_on_the_batch_alone_and_add_up():
    batch = zoo.batch("rtd", "electra")
    chosen, real = float(batch["weights_BL"].sum()), float((batch["segments_BL"] > 0).sum())
    expected = {"electra": real, "fifteen": chosen, "replace_mlm": chosen, "all_tokens_mlm": real}
    for arm in ARMS:
        objective = zoo.objective("rtd", "electra", arm=arm)
        weights = objective.weights(batch)
        assert set(weights) == set(objective.coefficients) == {"mlm", rtd.ARMS[arm].term}
        assert float(weights["mlm"]) == chosen and float(weights[rtd.ARMS[arm].term]) == expected[arm]
        parts = [objective.weights(jax.tree.map(lambda x, part=part: x[part::2], batch)) for part in range(2)]
        assert all(float(parts[0][term] + parts[1][term]) == float(weights[term]) for term in weights)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_gradient_of_the_whole_batch(microbatches):
    step, params = zoo.gradients("electra", "rtd", microbatches=microbatches)
    loss, grads = step(params, zoo.batch("rtd", "electra"))
    expected_loss, expected_grads = zoo.reference("electra", "rtd")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected_grads)


def test_padding_changes_nothing_and_alone_it_gives_zero():
    step, params = zoo.plain_gradients("electra", "rtd")
    objective = zoo.objective("rtd", "electra")
    loss, _ = step(params, zoo.batch("rtd", "electra", extra_rows=2, extra_length=8))
    np.testing.assert_allclose(loss, zoo.reference("electra", "rtd")[0], rtol=1e-6)
    empty = zoo.stack([objective.finish(zoo.row([], objective.lengths, objective.fields)) for _ in range(8)])
    loss, grads = step(params, empty)
    assert float(loss) == 0.0
    assert all(not np.asarray(leaf).any() for leaf in tree.paths(grads).values())


@pytest.mark.parametrize("tie", ["none", "tokens", "embeddings"])
def test_gradients_meet_in_tied_embeddings_only(tie):
    """Each term's gradient is zero on the other encoder and its head; nothing goes through the samples."""
    objective, batch = zoo.objective("rtd", "electra"), zoo.batch("rtd", "electra")
    made = zoo.model("electra", changes=(("tie_embeddings", tie),))
    shapes = tree.paths(jax.eval_shape(functools.partial(made.init, lengths={"L": zoo.LENGTH}), jax.random.key(0)))
    params = tree.unflatten({path: 0.2 * keyed_rng(path).standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()})

    def terms(params):
        totals = objective.loss(made, params, batch, rng=None, carry=None, train=False)[0]
        return jnp.stack([totals["mlm"], totals["rtd"]])

    grads = tree.paths(zoo.jit(jax.jacrev(terms))(params))
    moves = {path: tuple(bool(np.abs(row).max() > 0) for row in np.asarray(leaf)) for path, leaf in grads.items() if not path.endswith("key/bias")}
    for path, moved in moves.items():
        top = path.partition("/")[0]
        if top in ("generator", "mlm_head"):
            assert moved == (True, False), path
        elif top in ("discriminator", "rtd_head"):
            assert moved == (False, True), path
        else:
            assert moved == (top in electra.TIED[tie], True), path


@pytest.mark.parametrize("arm", [pytest.param("electra", marks=pytest.mark.slow), "all_tokens_mlm"])
def test_one_batch_is_overfit(arm):
    """With new samples at each step: the generator learns the tokens; the discriminator, or the model that restores them, what was replaced."""
    objective, batch = zoo.objective("rtd", "electra", arm=arm), zoo.batch("rtd", "electra")
    batch = {name: value[jnp.array([0, 1, 3, 5])] for name, value in batch.items()}
    made, optimizer = zoo.model("electra", heads=objective.heads), optax.adam(6e-3)

    @zoo.jit
    def train(params, rng):
        def step(carry, number):
            params, moments = carry
            loss, grads, (totals, weights, aux), _ = state.gradients(
                made, objective, params, batch, microbatches=1, rng=jax.random.fold_in(rng, number), carry=None
            )  # fmt: skip
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), (loss, aux.ratios["generator_accuracy"][0] / weights["mlm"])

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(250))[1]

    losses, accuracy = train(made.init(jax.random.key(0), {"L": zoo.LENGTH}), jax.random.key(1))
    assert losses[0] > (30 if arm == "electra" else 4) and losses[-10:].mean() < 0.1 * losses[0]
    assert accuracy[0] < 0.5 and accuracy[-1] == 1


def test_the_generator_alone_is_a_masked_language_model():
    """Objective mlm on electra trains the generator, with the loss that it has within rtd, whatever else the model holds."""
    objective, batch = zoo.objective("mlm", "electra"), zoo.batch("rtd", "electra")
    params = zoo.params("electra", heads=("mlm", "rtd"))
    both = zoo.jit(lambda params: zoo.objective("rtd", "electra").loss(zoo.model("electra"), params, batch, rng=None, carry=None, train=False)[0])(params)
    for heads in (("mlm",), ("mlm", "rtd")):
        made = zoo.model("electra", heads=heads)
        alone = zoo.jit(lambda params, made=made: objective.loss(made, params, batch, rng=None, carry=None, train=False)[0])(params)
        np.testing.assert_allclose(alone["tokens"], both["mlm"], rtol=1e-6)


# --- configs ---


def test_configs():
    assert issubclass(rtd.Config, mlm.Config) and OBJECTIVES["rtd"].build.kinds == ("encoder",)
    with pytest.raises(ConfigError, match="temperature=0"):
        fields.check(rtd.Config(temperature=0.0), "objective")
    with pytest.raises(ConfigError, match="needs the heads mlm, rtd, but model bert has no rtd. Models that fit it: electra"):
        registry.resolve(config_lib.base(model=bert.BertConfig(), objective=rtd.Config(), evals={}))
    registry.resolve(config_lib.base(model=electra.Config(), objective=rtd.Config(arm="all_tokens_mlm"), evals={}))
    with pytest.raises(ConfigError, match="model bert has no head restore"):
        models.make(bert.BertConfig(vocab_size=8), context=zoo.model("electra").module.context, heads=("restore",))


@pytest.mark.parametrize("arm", ARMS)
def test_flops_of_every_arm(arm):
    """The formula equals the matrix products in the traced program."""
    from test_models import dot_flops

    objective = zoo.objective("rtd", "electra", arm=arm)
    made = zoo.model("electra", heads=objective.heads)
    batch = {key: value[:1] for key, value in zoo.batch("rtd", "electra").items()}
    shapes = jax.eval_shape(functools.partial(made.init, lengths={"L": zoo.LENGTH}), jax.random.key(0))
    traced = jax.make_jaxpr(lambda params: objective.loss(made, params, batch, rng=None, carry=None, train=False)[0])(shapes)
    np.testing.assert_allclose(made.forward_flops(objective.lengths, objective.target_positions, heads=objective.heads), dot_flops(traced.jaxpr), rtol=1e-6)
