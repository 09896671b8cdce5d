"""Distillation: the two terms by hand and in their limits, the teacher beside the student in whole runs."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import config, convert, evaluate, hf, parallel, registry, state, teacher, tree, weights
from ptm import run as run_lib
from ptm import text as text_lib
from ptm.fields import ConfigError
from ptm.hf import files, transfer
from ptm.models import electra
from ptm.nn.losses import divergence
from ptm.nn.stack import Output
from ptm.objectives import causal, distillation, mlm

FAMILIES = {"gpt": "causal", "bert": "mlm", "t5": "span_corruption"}
ALL = {"hidden": 0.5, "hidden_layers": "all", "hidden_distance": "mse", "projection": 32, "soft": 2.0}


# The terms by hand.


@pytest.mark.parametrize(
    ("temperature", "nats", "slope"), [(1.0, 0.9 * np.log(1.8) + 0.1 * np.log(0.2), 0.4), (2.0, 4 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5)), 0.5)]
)
def test_soft_labels_by_hand(temperature, nats, slope):
    """A student of even odds and a teacher of 9 to 1, which temperature 2 makes 3 to 1; a third piece, which only the teacher has, and padding do not count."""
    student, taught = jnp.zeros((1, 2, 2)), jnp.log(jnp.array([[[9.0, 1.0, 5.0], [1.0, 9.0, 7.0]]]))

    def total(logits):
        return divergence(lambda x: x, lambda x: x, logits, taught, jnp.array([[2.0, 0.0]]), temperature=temperature, chunk=8)

    value, gradient = jax.value_and_grad(total)(student)
    np.testing.assert_allclose(value, 2 * nats, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[[-2 * slope, 2 * slope], [0, 0]]], atol=1e-6)  # weight x temperature x (student's share - teacher's)


def _teaching(family="gpt", **options) -> distillation.Taught:
    return distillation.Taught(zoo.objective(FAMILIES[family], family), config=distillation.Config(teacher="ckpt:none", **options))


def _hidden(ours, theirs, **options) -> float:
    """The term `hidden` of one row with two real positions and one of padding; states are given as [layer][position]."""
    batch = {"segments_BL": jnp.array([[1, 1, 0]])}
    out, taught = (Output(hidden_BLD=None, states_NBLD=jnp.asarray(states, jnp.float32)[:, None]) for states in (ours, theirs))
    return float(_teaching(**options)._hidden(None, None, batch, out, taught))


def test_hidden_states_by_hand():
    east, north, far, other = [1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [9.0, 9.0]
    cosine = _hidden([[east] * 3, [east, east, other]], [[other] * 3, [north, far, east]], hidden=1.0)
    np.testing.assert_allclose(cosine, 1.0)  # a right angle and none, whatever the lengths; the last layer alone
    squared = _hidden([[east] * 3, [east, east, other]], [[east] * 3, [north, far, east]], hidden=1.0, hidden_distance="mse", hidden_layers="all")
    np.testing.assert_allclose(squared, (0 + 0) / 2 + ((1 + 4) / 2 + 4 / 2) / 2)  # mean over the embeddings and the one layer


def test_layers_meet_every_k_th_of_the_teacher():
    """Embeddings meet embeddings, and three layers the second, fourth and sixth."""
    student, taught = ([[[float(n)] * 4] * 3 for n in layers] for layers in ((0, 2, 4, 6), range(7)))
    assert _hidden(student, taught, hidden=1.0, hidden_distance="mse", hidden_layers="all") == 0
    taught[4] = taught[5]
    assert _hidden(student, taught, hidden=1.0, hidden_distance="mse", hidden_layers="all") == pytest.approx(2 * 1 / 4)


# The loss of small models.


@functools.cache
def _teacher(family: str, on: parallel.Layout | None = None):
    """A deeper model than the student, and its parameters."""
    made = zoo.model(family, on=on, changes=(("num_layers", 4),))
    lengths = zoo.objective(FAMILIES[family], family).lengths
    return made, zoo.jit(functools.partial(made.init, lengths=lengths))(jax.random.key(7))


@functools.cache
def _loss(family: str, *, on: parallel.Layout | None = None, microbatches: int = 1, chunk: int = 4096, same: bool = False, **options):
    """(compiled (params, teacher_params, batch) -> (loss, gradient, totals), params, teacher_params); `same`: the student is its own teacher."""
    taught = _teaching(family, **options)
    student, params = zoo.model(family, heads=taught.heads, on=on, loss_chunk=chunk), zoo.params(family, heads=taught.heads)
    model, teacher_params = (zoo.model(family, on=on, loss_chunk=chunk), params) if same else _teacher(family, on)

    def step(params, teacher_params, batch):
        made = dataclasses.replace(student, teacher=model, teacher_params=teacher_params)
        loss, grads, (totals, *_), _ = state.gradients(made, taught, params, batch, microbatches=microbatches, rng=None, carry=None, train=False)
        return loss, grads, totals

    if on is None:
        return zoo.jit(step), params, teacher_params
    places = on.parameters(params), on.parameters(teacher_params)
    return zoo.jit(step, in_shardings=(*places, on.batch()), out_shardings=(on.replicated(), places[0], on.replicated())), params, teacher_params


def _value(family: str, **options):
    step, params, teacher_params = _loss(family, **options)
    return step(params, teacher_params, zoo.batch(FAMILIES[family], family))


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_without_soft_labels_and_hidden_states_the_loss_is_the_plain_one(family):
    """Exactly: the same program for loss and gradient."""
    plain, student = zoo.objective(FAMILIES[family], family), zoo.model(family)

    def program(objective) -> str:
        def step(params, batch):
            return state.gradients(student, objective, params, batch, microbatches=2, rng=jax.random.key(0), carry=None)[:3]

        printed = str(jax.make_jaxpr(step)(zoo.params(family), zoo.batch(FAMILIES[family], family)))
        return re.sub("0x[0-9a-f]+", "", printed)  # addresses of functions

    assert program(_teaching(family, soft=0.0)) == program(plain)
    assert program(_teaching(family, soft=0.0, hard=0.5)) != program(plain)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_nothing_is_to_be_learned_from_oneself(family):
    loss, grads, totals = _value(family, same=True, hard=0.0, hidden=1.0, hidden_layers="all")
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(zoo.reference(family, FAMILIES[family])[1]))
    assert abs(float(loss)) < 1e-5 and abs(float(totals["soft"])) < 1e-4 and abs(float(totals["hidden"])) < 1e-4
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(grads)) < 1e-4 * size


def test_hot_labels_match_logits():
    """As the temperature grows, the soft term becomes half the mean squared difference of centred logits (Hinton et al. 2015, section 2.1)."""
    rng = np.random.default_rng(0)
    ours, theirs = (rng.standard_normal((2, 3, 11)).astype(np.float32) for _ in range(2))
    difference = (ours - ours.mean(-1, keepdims=True)) - (theirs - theirs.mean(-1, keepdims=True))
    value = divergence(lambda x: x, lambda x: x, ours, theirs, jnp.ones((2, 3)), temperature=50.0, chunk=9)
    np.testing.assert_allclose(value, np.sum(difference**2) / (2 * 11), rtol=0.03)


def test_chunks_change_nothing():
    step, params, teacher_params = _loss("gpt", chunk=24)
    loss, grads, _ = step(params, teacher_params, zoo.batch("causal", "gpt"))
    expected_loss, expected, _ = _value("gpt")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected)


@pytest.mark.parametrize(("family", "microbatches", "mesh"), [("gpt", 2, None), ("bert", 1, {"data": 2, "fsdp": 2, "tensor": 2})])
def test_microbatches_and_devices_change_nothing(family, microbatches, mesh):
    """With a projection of the student's hidden states, whose gradient is there too."""
    expected_loss, expected, totals = _value(family, **ALL)
    assert set(totals) == {"tokens", "soft", "hidden"} and float(jnp.max(jnp.abs(expected["hidden_projection"]["kernel"]))) > 0
    loss, grads, _ = _value(family, **ALL, microbatches=microbatches, on=mesh and zoo.layout(**mesh))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    zoo.assert_equal_gradients(grads, expected)


def test_widths_that_differ_need_a_projection():
    student = zoo.model("gpt", changes=(("width", 16),))
    made = dataclasses.replace(student, teacher=_teacher("gpt")[0], teacher_params=_teacher("gpt")[1])
    params = jax.eval_shape(functools.partial(student.init, lengths={"L": zoo.LENGTH}), jax.random.key(0))
    with pytest.raises(ConfigError, match="--config.objective.projection=32"):
        jax.eval_shape(functools.partial(_teaching(hidden=1.0).loss, made, rng=None, carry=None, train=False), params, zoo.batch("causal", "gpt"))


def test_only_objectives_of_tokens_teach():
    part = zoo.objective("pairs", "bert")
    with pytest.raises(ConfigError, match="has a part Pairs"):
        distillation.Taught(part, config=distillation.Config(teacher="ckpt:none"))


# Whole runs.


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def taught_by(tmp_path_factory, text):
    """The workdir of a BERT of four layers."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    assert runs.run(runs.tiny("mlm", text=text, model__num_layers=4, train__steps=7), workdir) == 0
    return workdir


def _student(text, spec: str, *, parts=None, model=(), **options):
    """A config of seconds: a BERT of two layers."""
    made = registry.resolve(runs.tiny("mlm", text=text, **dict(model)))
    objective = distillation.Config(parts=parts or {"mlm": mlm.Config()}, teacher=spec, **options)
    return config.base(model=made.model, objective=objective, evals=made.evals, **{name: getattr(made, name) for name in config.SECTIONS})


NARROW = {"model__width": 8, "model__num_heads": 2}
ALONE = {"hard": 0.0, "hidden": 1.0, "hidden_layers": "all", "projection": 16}  # nothing but the teacher to learn from


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text, taught_by):
    """An uninterrupted run of a student of half the teacher's width."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert runs.run(_student(text, f"ckpt:{taught_by}", model=NARROW, **ALONE), workdir) == 0
    return workdir


def test_a_student_trains_beside_its_teacher(whole, taught_by):
    rows = [json.loads(line) for line in runs.metrics(whole).splitlines()]
    first, last = ([row for row in rows if "loss/soft" in row][place] for place in (0, -1))
    np.testing.assert_allclose(last["loss"], last["loss/soft"] + last["loss/hidden"], rtol=1e-5)
    assert last["loss/soft"] < first["loss/soft"] / 2 and last["loss/hidden"] < first["loss/hidden"] / 2
    assert last["loss/tokens"] < first["loss/tokens"] - 0.5, "what the teacher knows of the labels is learned without seeing them"
    saved = runs.leaves(whole, 14)
    assert saved["params/encoder/layers/mlp/wi/kernel"].shape[0] == 2, "the teacher's four layers are no part of the state"
    assert not [path for path in saved if "teacher" in path]
    fingerprints = json.loads((whole / "env.json").read_text())["fingerprints"]
    assert set(fingerprints) == {"data", "tokenizer", "teacher"}


def test_a_stopped_student_ends_as_if_nothing_had_happened(text, whole, taught_by, tmp_path):
    cfg = _student(text, f"ckpt:{taught_by}", model=NARROW, **ALONE)
    with runs.at_batch(5, runs.stop):
        assert runs.run(cfg, tmp_path) == 75
    assert runs.run(cfg, tmp_path) == 0
    runs.assert_same(tmp_path, whole, 14)


def test_evaluation_is_that_of_the_loop(whole):
    rows = [json.loads(line) for line in runs.metrics(whole).splitlines()]
    last = [row for row in rows if "validation/loss" in row][-1]
    measured = evaluate.evaluate(f"ckpt:{whole}")
    # On other numbers of devices sums have another order. The divergence is a small difference of logarithms as large as that of the vocabulary: their last
    # digit is more of it than of a loss.
    digit = np.finfo(np.float32).eps * np.log(runs.SHAPE["vocab_size"])
    for name, atol in {"loss": 0, "loss/soft": digit, "loss/hidden": 0, "accuracy": 0}.items():
        np.testing.assert_allclose(measured[f"validation/{name}"], last[f"validation/{name}"], rtol=1e-5, atol=atol, err_msg=name)


def test_the_teacher_is_no_constant_of_the_program(text, taught_by):
    run = teacher.attach(run_lib.setup(_student(text, f"ckpt:{taught_by}"), devices=jax.devices()[:1]))
    step = functools.partial(state.eval_step, model=run.model, objective=run.objective)
    batch = next(run.validation(16))
    constants = jax.make_jaxpr(step)(run.abstract_params, batch, run.teacher.params).consts
    assert sum(np.size(constant) for constant in constants) < 1000 < tree.size(run.teacher.params)


def test_a_student_begins_with_every_k_th_layer(text, taught_by):
    run = teacher.attach(run_lib.setup(_student(text, f"ckpt:{taught_by}", init_layers=True), devices=jax.devices()[:1]))
    params, told = teacher.start(run)
    saved = runs.leaves(taught_by, 7)
    for path, leaf in tree.paths(params).items():
        expected = saved["params/" + path]
        np.testing.assert_array_equal(leaf, expected[[0, 2]] if tree.stacked(path) else expected, err_msg=path)
    assert str(taught_by) in told
    narrow = _student(text, f"ckpt:{taught_by}", model={"model__width": 8}, init_layers=True)
    with pytest.raises(ConfigError, match="init_layers=true needs a teacher of the student's shape"):
        teacher.start(teacher.attach(run_lib.setup(narrow, devices=jax.devices()[:1])))


def test_several_objectives_teach_by_turns(text, taught_by):
    cfg = _student(text, f"ckpt:{taught_by}", parts={"tokens": mlm.Config(), "spans": mlm.Config(unit="span")}, weights=("spans=3",))
    run = teacher.attach(run_lib.setup(cfg, devices=jax.devices()[:1]))
    values = run.evaluate("validation", run.init_params())
    np.testing.assert_allclose(values["validation/loss"], (values["validation/tokens/loss"] + 3 * values["validation/spans/loss"]) / 4, rtol=1e-5)
    assert len(run.branches) == 2 and values["validation/spans/loss/soft"] > 0


def test_a_directory_teaches_as_the_checkpoint_that_it_was_made_from(text, taught_by, tmp_path):
    assert convert.convert(f"ckpt:{taught_by}", f"hf:{tmp_path / 'hf'}")
    values = []
    for spec in (f"ckpt:{taught_by}", f"hf:{tmp_path / 'hf'}"):
        run = teacher.attach(run_lib.setup(_student(text, spec), devices=jax.devices()[:1]))
        values.append(run.evaluate("validation", run.init_params()))
    assert values[0].keys() == values[1].keys()
    np.testing.assert_allclose(list(values[0].values()), list(values[1].values()), rtol=1e-5)


def test_a_directory_of_another_tokenizer_teaches_nothing(text, tmp_path):
    """ELECTRA's generator teaches as long as its ids stand for the student's text."""
    spec, made = f"hf:{tmp_path / 'generator'}", registry.resolve(runs.tiny("mlm", text=text))
    shape = electra.Config(**{**runs.SHAPE, "dropout": 0.0}, max_length=48, generator_fraction=0.5, attention_dropout=0.0)
    params = jax.jit(functools.partial(transfer.model(shape, ("mlm",)).init, lengths={"L": 48}))(jax.random.key(3))
    exported = hf.write(shape, ("mlm",), jax.device_get(params))[""]
    files.write(tmp_path / "generator", exported.config, exported.tensors)
    objective = distillation.Config(parts={"mlm": mlm.Config()}, teacher=spec)
    run = run_lib.setup(config.base(model=shape, objective=objective, tokenizer=made.tokenizer, data=made.data), devices=jax.devices()[:1])
    assert tree.diff(teacher.attach(run).teacher.params, params) == ""
    text_lib.make("wordpiece", texts=[" ".join(runs.WORDS)], vocab_size=60, lowercase=True).save(str(tmp_path / "generator"))
    with pytest.raises(ConfigError, match="has another tokenizer than this run"):
        teacher.attach(run)


def test_a_teacher_that_is_gone_or_changed_is_missed(text, whole, taught_by, tmp_path):
    copy, workdir = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(taught_by, copy)
    cfg = _student(text, f"ckpt:{copy}")
    with runs.at_batch(3, runs.stop):
        assert runs.run(cfg, workdir) == 75
    shutil.rmtree(copy / "ckpt" / "7")  # now the newest one is that of step 6
    with pytest.raises(ConfigError, match="teacher .* changed since step 3"):
        runs.run(cfg, workdir)
    shutil.rmtree(copy)
    for action in (lambda: runs.run(cfg, workdir), lambda: evaluate.evaluate(f"ckpt:{workdir}")):
        with pytest.raises(ConfigError, match="(?s)there is no folder .*put it back, or go on without it .*--config.init=ckpt:"):
            action()
    run, params = weights.load(f"ckpt:{workdir}", devices=jax.devices()[:1])  # to use the student needs no teacher
    assert tree.diff(run.abstract_params, params) == ""


def test_a_teacher_must_read_what_the_student_reads(text, taught_by):
    def refusal(cfg) -> str:
        with pytest.raises(ConfigError) as raised:
            teacher.attach(run_lib.setup(cfg, devices=jax.devices()[:1]))
        return str(raised.value)

    spec = f"ckpt:{taught_by}"
    sentinels = _student(text, spec, model={"tokenizer__sentinels": 1})
    assert "made with another tokenizer" in refusal(sentinels)
    long = _student(text, spec, model={"data__length": 64, "model__max_length": 64})
    assert "has 48 positions, rows have 64" in refusal(long)
    decoder = registry.resolve(runs.tiny("concat", text=text))
    objective = distillation.Config(parts={"causal": causal.Config()}, teacher=spec)
    gpt = config.base(model=decoder.model, objective=objective, tokenizer=decoder.tokenizer, data=decoder.data)
    assert "is of kind encoder, the student of kind decoder" in refusal(gpt)
    with pytest.raises(ConfigError, match="objective.teacher is empty"):
        registry.resolve(_student(text, ""))
    with pytest.raises(ConfigError, match="objective.teacher=here; allowed: ckpt:"):
        registry.resolve(_student(text, "here"))
