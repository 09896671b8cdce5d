"""Low-rank adaptation and frozen parameters: what moves, what is computed, what is saved; and configs that were stored before a key was there."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

import ptm
from ptm import config, convert, evaluate, lora, models, optim, parallel, registry, state, train, tree, weights
from ptm import run as run_lib
from ptm.checkpoint import Checkpoints
from ptm.config import Lora
from ptm.fields import ConfigError
from ptm.nn.context import Context

RANK = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def base(tmp_path_factory, text) -> Path:
    """A run of some steps that others begin from."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    assert runs.run(runs.tiny("concat", text=text, train__steps=3, train__ema_decay=None), workdir) == 0
    return workdir


def adapting(base: Path, text: Path, **changes):
    """The config of a low-rank adaptation of a run; of all kernels, so that each kind of them is among the targets."""
    options = {"log__norms": "false", "train__microbatches": 1, "lora__rank": RANK, "lora__targets": ".*", "lora__alpha": 4.0, "init": f"ckpt:{base}", "tokenizer__path": base / "tokenizer"}
    return runs.tiny("concat", text=text, **options | {"train__steps": 8, "checkpoint__every": 4} | changes)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, base, text) -> Path:
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    assert runs.run(adapting(base, text), workdir) == 0
    return workdir


def read(workdir: Path, step: int, which: str = "params") -> dict[str, np.ndarray]:
    """The saved parameters of a step by path."""
    reader = Checkpoints.reader(workdir / "ckpt")
    return {path: np.asarray(leaf) for path, leaf in tree.paths(reader.restore_params(step, reader.structure(step)[which], which=which)).items()}


def abstract(family: str, options: Lora) -> dict[str, jax.ShapeDtypeStruct]:
    made = models.make(zoo.CONFIGS[family], context=Context(zoo.layout()), heads=zoo.objective(zoo.HOME[family], family).heads, lora=options)
    lengths = {"L": zoo.LENGTH, "I": zoo.INPUTS} if made.config.kind == "encoder_decoder" else {"L": zoo.LENGTH}
    return jax.eval_shape(functools.partial(made.init, lengths=lengths), jax.random.key(0))


def test_a_change_by_hand():
    """Two layers; a kernel that leads to the heads, one that leads from them, and a plain one: each is one matrix of rank 1."""
    params = {
        "decoder": {"layers": {"query": {"kernel": np.zeros((2, 3, 2, 2))}, "out": {"kernel": np.zeros((2, 2, 2, 3))}}},
        "pooler": {"dense": {"kernel": np.ones((2, 2))}},
        "embed_projection": {"kernel": np.array([[1.0, 2.0], [3.0, 4.0]])},
    }
    options = Lora(rank=1, alpha=2.0, targets=(".*",))
    factors = lora.init(jax.random.key(0), params, options)
    assert {path: leaf.shape for path, leaf in tree.paths(factors).items()} == {
        "decoder/layers/query/kernel/a": (2, 3, 1), "decoder/layers/query/kernel/b": (2, 1, 2, 2),
        "decoder/layers/out/kernel/a": (2, 2, 2, 1), "decoder/layers/out/kernel/b": (2, 1, 3),
        "embed_projection/kernel/a": (2, 1), "embed_projection/kernel/b": (1, 2),
    }  # fmt: skip
    factors["embed_projection"]["kernel"] = {"a": np.array([[1.0], [10.0]]), "b": np.array([[1.0, -1.0]])}
    query = factors["decoder"]["layers"]["query"]["kernel"]
    query["b"] = np.arange(8.0).reshape(2, 1, 2, 2)
    merged = lora.merge({**params, "lora": factors}, options)
    assert merged["embed_projection"]["kernel"].tolist() == [[1 + 2, 2 - 2], [3 + 20, 4 - 20]]
    for layer in range(2):
        np.testing.assert_allclose(
            merged["decoder"]["layers"]["query"]["kernel"][layer].reshape(3, 4), 2 * query["a"][layer] @ query["b"][layer].reshape(1, 4), rtol=1e-6
        )
    assert not np.any(merged["decoder"]["layers"]["out"]["kernel"]) and set(merged) == set(params)


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_every_family_has_targets(family):
    """By default queries and values of all attention; with .* every kernel but those of heads that are trained anyway. All lie as their kernels do."""
    for options in (Lora(rank=RANK), Lora(rank=RANK, targets=(".*",))):
        flat = tree.paths(abstract(family, options))
        kernels = {path for path in flat if path.endswith("/kernel")}
        mine = {path.removeprefix("lora/").removesuffix("/a") for path in flat if path.startswith("lora/") and path.endswith("/a")}
        wanted = {path for path in kernels if re.fullmatch(".*/(query|value)/kernel", path)} if options.targets != (".*",) else kernels
        assert mine == {path for path in wanted if not re.match("pooler|pair_head|classify_head|tag_head|qa_head", path)} and mine
        for path in mine:
            a, b = (flat[f"lora/{path}/{name}"] for name in "ab")
            layers = a.shape[: tree.stacked(path)]
            assert layers == b.shape[: tree.stacked(path)] and a.shape[len(layers) : -1] + b.shape[1 + len(layers) :] == flat[path].shape[len(layers) :]
            words = parallel.axes_words(path)
            of_a, of_b = (parallel.axes_words(f"lora/{path}/{name}") for name in "ab")
            assert of_a[:-1] + of_b[1 + len(layers) :] == words and of_a[-1] == of_b[len(layers)] == "rank"
        frozen = optim.make(config.Optimizer(), config.Schedule(), steps=2, params=tree.unflatten(flat), lora=options).frozen
        trained = {path for path, fixed in frozen.items() if not fixed}
        assert {path for path in trained if path.startswith("lora/")} == {f"lora/{path}/{name}" for path in mine for name in "ab"}
        assert all(re.match("lora|pooler|pair_head", path) for path in trained)


@pytest.mark.parametrize("family", ["gpt", "t5"])
def test_nothing_has_moved_at_step_0(family):
    """Bit for bit the logits of the model without factors."""
    objective = zoo.objective(zoo.HOME[family], family)
    plain = zoo.model(family)
    made = dataclasses.replace(plain, lora=Lora(rank=RANK, targets=(".*",)))
    params = zoo.params(family)
    with_factors = {**params, "lora": lora.init(jax.random.key(1), params, made.lora)}
    batch = zoo.batch(zoo.HOME[family], family)

    def logits(model):
        return zoo.jit(lambda params: model.logits(params, model.hidden(params, batch, mask=objective.mask).hidden_BLD, head="lm"))

    np.testing.assert_array_equal(logits(made)(with_factors), logits(plain)(params))
    moved = tree.map_paths(lambda path, leaf: leaf + 0.1 if path.endswith("/b") else leaf, with_factors)
    assert np.abs(np.asarray(logits(made)(moved) - logits(plain)(params))).max() > 0.1
    alone, merged = made.merged(moved)
    assert alone == plain and jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_array_equal(logits(alone)(merged), logits(made)(moved))


def test_the_gradient_of_the_factors():
    """That of the kernel, taken through the product; and nothing is computed for what is frozen."""
    family, objective = "gpt", zoo.objective("causal", "gpt")
    options = Lora(rank=RANK, alpha=6.0)
    made = dataclasses.replace(zoo.model(family), lora=options)
    params = {**zoo.params(family), "lora": lora.init(jax.random.key(1), zoo.params(family), options)}
    params = tree.map_paths(lambda path, leaf: leaf + 0.01 if path.endswith("/b") else leaf, params)
    frozen = optim.make(config.Optimizer(), config.Schedule(), steps=2, params=params, lora=options).frozen
    batch = zoo.batch("causal", family)

    def gradient(model, frozen, microbatches=1):
        return zoo.jit(
            lambda params: state.gradients(model, objective, params, batch, microbatches=microbatches, rng=None, carry=None, train=False, frozen=frozen)[1]
        )

    ours = tree.paths(gradient(made, frozen)(params))
    assert set(ours) == {path for path in tree.paths(params) if path.startswith("lora/")} and len(ours) == 4
    alone, merged = made.merged(params)
    full = tree.paths(gradient(alone, None)(merged))
    for name in ("query", "value"):
        kernel = full[f"decoder/layers/attention/{name}/kernel"]
        a, b = (params["lora"]["decoder"]["layers"]["attention"][name]["kernel"][factor] for factor in "ab")
        for factor, expected in (("a", jnp.einsum("ndhk,nrhk->ndr", kernel, b)), ("b", jnp.einsum("ndr,ndhk->nrhk", a, kernel))):
            np.testing.assert_allclose(ours[f"lora/decoder/layers/attention/{name}/kernel/{factor}"], 3.0 * expected, atol=2e-6, rtol=1e-4)
    fixed = {path: path.startswith("decoder") for path in full}
    part = tree.paths(gradient(alone, fixed, 2)(merged))
    assert set(part) == {path for path in full if not path.startswith("decoder")}
    for path, leaf in part.items():
        np.testing.assert_allclose(leaf, full[path], atol=1e-6, rtol=1e-5)


def test_only_factors_move_and_have_moments(adapted, base):
    before, first, last = read(base, 3), read(adapted, 4), read(adapted, 8)
    factors = {path for path in last if path.startswith("lora/")}
    assert {path for path in last if path not in factors} == set(before) and len(factors) == 12
    for path, leaf in last.items():
        if path in factors:
            assert np.any(leaf != first[path]), path
        else:
            np.testing.assert_array_equal(leaf, before[path])
    moments = {path for path in runs.leaves(adapted, 8) if path.startswith("opt_state/") and path.endswith(("/a", "/b", "/kernel", "/bias", "/scale", "/embedding"))}
    assert {path.partition("/lora/")[2] for path in moments} == {path.removeprefix("lora/") for path in factors}
    table = (adapted / "params.txt").read_text()
    assert re.search(r"token_embed/embedding .* frozen$", table, re.MULTILINE) and re.search(r"lora/.*/query/kernel/b .* yes$", table, re.MULTILINE)


def test_resumed_exactly(adapted, base, text, tmp_path):
    with runs.at_batch(7, runs.stop):
        assert runs.run(adapting(base, text), tmp_path) == 75
    assert runs.run(adapting(base, text), tmp_path) == 0
    runs.assert_same(tmp_path, adapted, 8)
    with pytest.raises(ConfigError, match=r"another config.*\n  lora.rank: 2 -> 1"):
        runs.run(adapting(base, text, lora__rank=1), tmp_path)


def test_who_uses_the_model_gets_plain_kernels(adapted, base, text):
    """ptm.load, `ptm evaluate`, `ptm convert` and a run that begins there: all have the function of the adapted model."""
    run, params = ptm.load(f"ckpt:{adapted}")
    saved = read(adapted, 8)
    expected = tree.paths(lora.merge(tree.unflatten(saved), Lora(rank=RANK, alpha=4.0)))
    assert run.model.lora is None and set(tree.paths(params)) == set(expected)
    moved = [path for path, leaf in expected.items() if np.any(leaf != saved[path])]
    assert sorted({path.split("/")[-2] for path in moved}) == ["key", "out", "query", "value", "wi", "wo"]
    for path, leaf in tree.paths(params).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    rows = [json.loads(line) for line in runs.metrics(adapted).splitlines()]
    found, last = evaluate.evaluate(f"ckpt:{adapted}"), [row for row in rows if "validation/loss" in row][-1]
    assert last["step"] == 8 and found["validation/loss"] == pytest.approx(last["validation/loss"], rel=1e-5)
    means = tree.paths(weights.load(f"ckpt:{adapted}@avg2")[1])
    others = tree.paths(lora.merge(tree.unflatten(read(adapted, 4)), Lora(rank=RANK, alpha=4.0)))
    for path in moved:
        np.testing.assert_allclose(means[path], (expected[path] + others[path]) / 2, atol=1e-6, err_msg=path)
    again = run_lib.setup(adapting(base, text, init=f"ckpt:{adapted}"), workdir=None, devices=jax.devices()[:1])
    started, told = weights.start(again)
    assert set(tree.paths(started)) == set(saved) and told == f"Parameters of step 8 from ckpt:{adapted}."
    assert not np.any(started["lora"]["decoder"]["layers"]["mlp"]["wi"]["kernel"]["b"])
    np.testing.assert_allclose(started["decoder"]["layers"]["mlp"]["wi"]["kernel"], expected["decoder/layers/mlp/wi/kernel"], atol=1e-6)


def test_convert_merges(adapted, tmp_path):
    assert convert.convert(f"ckpt:{adapted}", f"hf:{tmp_path / 'out'}")
    run, params = ptm.load(f"hf:{tmp_path / 'out'}")
    ours = tree.paths(ptm.load(f"ckpt:{adapted}")[1])
    for path, leaf in tree.paths(params).items():
        np.testing.assert_allclose(leaf, ours[path], atol=1e-6, err_msg=path)


def test_on_eight_devices(adapted, base, text, tmp_path):
    """The same run split over rows, width and heads, to rounding."""
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__steps": 4, "train__ema_decay": None, "train__skip_sigma": None}
    assert runs.run(adapting(base, text, **mesh), tmp_path, devices=8) == 0
    ours, theirs = read(tmp_path, 4), read(adapted, 4)
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, atol=3e-4, err_msg=path)


def test_what_cannot_be_trained_is_refused(base, text):
    def setup(**changes):
        return run_lib.setup(adapting(base, text, **changes), devices=jax.devices()[:1])

    with pytest.raises(ConfigError, match="lora.targets: 'attention' matches none of the 6 parameters; a pattern must match the whole path"):
        setup(lora__targets="attention")
    with pytest.raises(ConfigError, match="lora.train: 'clasify_head/.*' matches none"):
        setup(lora__train="clasify_head/.*")
    with pytest.raises(ConfigError, match="matches all .* nothing is left to train"):
        setup(optimizer__freeze="lora/.*")
    untied = runs.tiny("concat", text=text, model__tie_embeddings="false", init=f"ckpt:{base}", tokenizer__path=base / "tokenizer", lora__rank=1)
    with pytest.raises(ConfigError, match="lm_head would begin afresh and be frozen.*--config.lora.train=lm_head/"):
        weights.start(run_lib.setup(untied, devices=jax.devices()[:1]))


# --- configs that were stored before a key was declared ---------------------------------------------------------------------------------


def test_a_run_of_an_earlier_version_goes_on(base, text, tmp_path):
    """Keys and a section that its config.json lacks count as their defaults, which mean what was done before them."""
    cfg, old = runs.tiny("concat", text=text, train__steps=3, train__ema_decay=None), tmp_path / "old"
    shutil.copytree(base, old)
    path = old / "config.json"
    stored = json.loads(path.read_text())
    del stored["lora"], stored["checkpoint"]["mode"], stored["model"]["scale_by_layer"], stored["objective"]["z_loss"], stored["evals"]["validation"]["batches"]
    path.write_text(json.dumps(stored))
    assert run_lib.read_config(old) == config.to_dict(registry.resolve(cfg))
    assert evaluate.evaluate(f"ckpt:{old}")["validation/loss"] == evaluate.evaluate(f"ckpt:{base}")["validation/loss"]
    longer = registry.resolve(runs.tiny("concat", text=text, train__steps=4, train__ema_decay=None))
    assert train.check_resume(longer, old, ()) == {"train.steps": (3, 4)}
    del stored["data"]["length"]  # a default that this run has not
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="data.length: 128 -> 16"):
        train.check_resume(longer, old, ())


def test_what_a_stored_config_may_not_be(tmp_path, text):
    stored = config.to_dict(registry.resolve(runs.tiny("concat", text=text)))
    assert config.complete(stored, registry.REGISTRIES) == stored
    for damage, message in (
        ({**stored, "tranning": {}}, "unknown key tranning"),
        ({**stored, "model": {**stored["model"], "widht": 3}}, r"unknown key model.widht. Did you mean 'width'"),
        ({**stored, "evals": {"validation": {"name": "los"}}}, "unknown evals.validation.name 'los'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(damage))
        with pytest.raises(ConfigError, match=f"config.json: {message}"):
            run_lib.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 0, "mod')
    with pytest.raises(ConfigError, match="config.json is damaged"):
        run_lib.read_config(tmp_path)
