"""Mixtures of objectives: who shares batches and who takes turns, in which shares, with which losses, and that nothing is lost on resume."""

import collections
import contextlib
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import config, evaluate, fields, objectives, registry, samples, state
from ptm import run as run_lib
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data import turns
from ptm.data.batch import Document, keyed_rng
from ptm.data.loader import Loader
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import bert, t5
from ptm.objectives import causal, denoising, mixture, mlm, pairs, prefix, span_corruption, ul2

STEPS = 14
PARTS = {"tokens": mlm.Config(), "words": mlm.Config(unit="whole_word", rate=0.3), "left": prefix.Config()}
SPANS = {"spans": span_corruption.Config(input_length=24), "shuffle": denoising.Config(variant="deshuffling", input_length=30)}


def build(parts, *, kind, weights=(), length=16, packing="default"):
    model_config = types.SimpleNamespace(kind=kind, num_types=2)
    return objectives.make(
        mixture.Config(parts=parts, weights=weights), tokenizer=zoo.Vocabulary(), length=length, packing=packing, model_config=model_config
    )  # fmt: skip


def make(objective, tokens, key=(0, "doc", 0)):
    return list(objective.features(Document("doc", np.asarray(tokens, np.int32)), rng=keyed_rng(*key), draw=None))


# --- who shares batches ---


@pytest.mark.parametrize(
    ("kind", "parts", "branches"),
    [
        ("encoder", PARTS, ["tokens_words", "left"]),
        ("encoder", {"a": mlm.Config(), "b": mlm.Config(z_loss=0.1), "c": mlm.Config(visits=1)}, ["a", "b", "c"]),
        ("encoder", {"a": mlm.Config(), "nsp": pairs.Config(), "sop": pairs.Config(task="sop")}, ["a", "nsp", "sop"]),
        ("decoder", {"left": causal.Config(), "prefix": prefix.Config(), "spans": denoising.Config(), "ul2": ul2.Config()}, ["left", "prefix_spans", "ul2"]),
        ("encoder_decoder", {**SPANS, "split": prefix.Config(input_length=20)}, ["spans_shuffle_split"]),
    ],
)
def test_equal_signatures_share_batches(kind, parts, branches):
    made = build(parts, kind=kind, length=40)
    assert [branch.name for branch in made.branches] == branches
    assert [part.name for part in made.parts] == list(parts)
    assert sum(branch.weight for branch in made.branches) == len(parts)
    (only, *more) = mixture.branches(made)
    assert (only.name == "") == (not more), "what needs no turns needs no name"


def test_shared_rows_are_the_longest():
    """I of the longer encoder's row, S of the higher rate; what is done to a row as a whole is done with these."""
    (spans,) = build(SPANS, kind="encoder_decoder").branches
    assert spans.objective.lengths == {"L": 16, "I": 30}
    masked = build(PARTS, kind="encoder").branches[0].objective
    assert masked.lengths == {"L": 16, "S": 6} and build({"a": mlm.Config()}, kind="encoder").branches[0].objective.lengths["S"] == 3
    row = masked.finish(zoo.row(make(masked, range(8, 20))[:1], masked.lengths, masked.fields))
    assert row["target_index_BS"].shape == (6,) and row["part_BL"].shape == (16,)


GOLDEN = [
    (1, "16 20 8 13 15 18 12 14 9 11 22 10 17 21 19 2", "8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 2"),
    (0, "23 24 25 26 27 28 29 30 31 32 33 34 35 36 47 2", "47 37 38 39 2"),
]


def test_golden():
    """Pieces go to parts by chance, and each part cuts off as much as it can use: 15 tokens to shuffle, up to 26 for spans. 2 is the end, 47 a sentinel."""
    (branch,) = build(SPANS, kind="encoder_decoder", weights=("shuffle=3",)).branches
    examples = make(branch.objective, np.arange(8, 40), key=(5, "doc", 0))
    shown = [(int(e["part_BL"][0]), *(" ".join(zoo.Vocabulary().pieces(e[name])) for name in ("inputs_BI", "targets_BL"))) for e in examples]
    assert shown == GOLDEN


def test_shares_of_drawn_examples():
    (branch,) = build(SPANS, kind="encoder_decoder", weights=("shuffle=3",)).branches
    examples = make(branch.objective, np.random.default_rng(0).integers(8, 40, 40_000))
    shuffled = np.mean([example["part_BL"][0] == 1 for example in examples])
    assert abs(shuffled - 0.75) < 5 * (0.75 * 0.25 / len(examples)) ** 0.5 and len(examples) > 1500
    again = make(branch.objective, np.random.default_rng(0).integers(8, 40, 40_000), key=(1, "doc", 0))
    assert [e["part_BL"][0] for e in again[:100]] != [e["part_BL"][0] for e in examples[:100]]


def test_the_loss_of_a_shared_batch_is_the_sum_of_its_parts():
    """Totals of a batch that holds rows of both parts, and the shares of its predicted tokens."""
    made = build(SPANS, kind="encoder_decoder")
    (blend,) = (branch.objective for branch in made.branches)
    model, params = zoo.model("t5"), zoo.params("t5")
    docs = zoo.documents(4, length=11)
    rows = {name: [] for name in SPANS}
    for number, part in enumerate(made.parts):
        for doc in docs[2 * number :][:2]:
            (example,) = part.objective.features(doc, rng=keyed_rng(0, doc.id), draw=None)
            example["part_BL"] = np.full(len(example["tokens_BL"]), number, np.int32)
            rows[part.name].append(blend.finish(zoo.row([example], blend.lengths, blend.fields)))
    run = zoo.jit(lambda batch: blend.loss(model, params, batch, rng=None, carry=None, train=False)[:2])
    alone = {name: run(zoo.stack(values * 2)) for name, values in rows.items()}
    totals, aux = run(zoo.stack([*rows["spans"], *rows["shuffle"]]))
    np.testing.assert_allclose(totals["tokens"], sum(float(part["tokens"]) for part, _ in alone.values()) / 2, rtol=1e-6)
    counts = {name: sum(row["weights_BL"].sum() for row in values) for name, values in rows.items()}
    for name, count in counts.items():
        np.testing.assert_allclose(aux.ratios[f"share/{name}"], [count, sum(counts.values())])
    assert counts["shuffle"] == 24 > counts["spans"]


def test_microbatches_give_the_gradient_of_the_whole_batch():
    made = build(SPANS, kind="encoder_decoder")
    (blend,) = (branch.objective for branch in made.branches)
    rows = [zoo.row(make(blend, doc.tokens_L, key=(0, doc.id))[:1], blend.lengths, blend.fields) for doc in zoo.documents(7, length=11)]
    batch = zoo.stack([blend.finish(row) for row in [*rows, zoo.row([], blend.lengths, blend.fields)]])
    assert len(set(np.asarray(batch["part_BL"]).max(axis=1))) == 2
    model, params = zoo.model("t5"), zoo.params("t5")

    def step(parts):
        return zoo.jit(lambda p: state.gradients(model, blend, p, batch, microbatches=parts, rng=None, carry=None, train=False)[:3])(params)

    expected, expected_grads, (_, _, whole) = step(1)
    for parts in (2, 4):
        value, grads, (_, _, aux) = step(parts)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        zoo.assert_equal_gradients(grads, expected_grads)
        np.testing.assert_allclose(aux.ratios["share/spans"], whole.ratios["share/spans"])


# --- config ---


def tiny(*, text, parts=None, weights=("left=2",), **changes):
    """A BERT that learns masked tokens and words in one batch and prefixes in the other; dropout, two microbatches and averages, as in runs.tiny."""
    cfg = config.base(
        model=bert.BertConfig(**runs.SHAPE | {"num_layers": 1}, max_length=32, attention_dropout=0.0),
        objective=mixture.Config(parts=PARTS if parts is None else parts, weights=weights),
        evals={"validation": loss.Config(every=7)},
        train=Train(steps=STEPS, batch_size=8, microbatches=2, ema_decay=0.9),
        data=Data(source=(f"text:{text}",), length=32, streams=4, packing_bins=4),
        tokenizer=Tokenizer(kind="bytes"),
        optimizer=Optimizer(learning_rate=1e-2),
        schedule=Schedule(name="constant"),
        checkpoint=Checkpoint(every=6, keep_latest=3),
        log=Log(every=1, writers=()),
    )
    for key, value in changes.items():
        config.override(cfg, key.replace("__", "."), value, registry.REGISTRIES)
    return cfg


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def test_config_of_parts_survives_json_and_the_command_line():
    cfg = tiny(text="x.txt", objective__parts__words__rate="0.4", objective__weights="words=2,left=0.5")
    resolved = registry.resolve(cfg)
    assert resolved.objective.parts["words"] == mlm.Config(unit="whole_word", rate=0.4) and resolved.objective.parts["left"] == prefix.Config()
    assert [resolved.objective.weight(name) for name in PARTS] == [1.0, 2.0, 0.5]
    tree = json.loads(json.dumps(config.to_dict(resolved)))
    assert tree["objective"]["parts"]["words"]["name"] == "mlm" and registry.resolve(tree) == resolved
    assert config.fingerprint(tree) == config.fingerprint(resolved)
    changes = config.diff(config.defaults_of(resolved), resolved)
    assert changes["objective.parts.words.rate"] == (0.15, 0.4) and "objective.parts.left.share" not in changes
    keys = config.schema(cfg, registry.REGISTRIES)
    flat = {key: value for key, value in config.flatten(resolved).items() if key.startswith("objective.") and not key.endswith(".name")}
    assert set(flat) == {key for key in keys if key.startswith("objective.")} and len(flat) > 20
    for key, value in flat.items():
        config.override(cfg, key, fields.unparse(value), registry.REGISTRIES)
    assert registry.resolve(cfg) == resolved


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"objective__parts__word__rate": "1"}, ["--config.objective.parts.word.rate", "Did you mean 'objective.parts.words.rate'?"]),
        ({"objective__parts__words__unit": "wrd"}, ["objective.parts.words.unit=wrd", "whole_word"]),
        ({"objective__parts__words__rate": "1"}, ["objective.parts.words.rate=1.0", "nothing to predict from"]),
        ({"objective__parts__words__name": "mlm"}, ["cannot be overridden"]),
        ({"objective__parts__words": "mlm"}, ["is a section"]),
        ({"objective__weights": "2,1"}, ["objective.weights=2,1", "PART=WEIGHT", "left, tokens, words"]),
        ({"objective__weights": "word=2"}, ["'word=2'", "Did you mean 'words'?"]),
        ({"objective__weights": "words=0"}, ["'words=0' is no weight", "above 0"]),
        ({"objective__weights": "words=some"}, ["words=some", "allowed: float"]),
    ],
)  # fmt: skip
def test_refused(changes, parts):
    with pytest.raises(ConfigError) as error:
        registry.resolve(tiny(text="x.txt", **changes))
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "objective mixture has no parts"),
        ({"a": mlm.Config(), "b": span_corruption.Config()}, "objective span_corruption trains models of kind encoder_decoder, but model bert"),
        ({"a b": mlm.Config()}, "objective.parts has an entry named 'a b'"),
        ({"a-b": mlm.Config()}, "the name of a part"),
        ({"a": mixture.Config(parts=PARTS)}, "is a mixture itself"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        registry.resolve(tiny(text="x.txt", parts=parts, weights=()))


def test_branches_have_names_of_their_own():
    """A part must not be called as others are that share batches: loaders and metrics go by these names."""
    with pytest.raises(ConfigError, match="share batches are called tokens_words together, and so is another part"):
        build({**PARTS, "tokens_words": mlm.Config(z_loss=0.1)}, kind="encoder")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree["words"].update(rat=1), "unknown key objective.parts.words.rat"),
        (lambda tree: tree["words"].pop("name"), "objective.parts.words has no key 'name'"),
        (lambda tree: tree["words"].update(name="mml"), "objective.parts.words.name 'mml'"),
        (lambda tree: tree.update(words=3), "objective.parts.words=3"),
    ],
)
def test_json_of_parts_is_checked(edit, message):
    tree = config.to_dict(registry.resolve(tiny(text="x.txt")))
    edit(tree["objective"]["parts"])
    with pytest.raises(ConfigError, match=message):
        registry.resolve(tree)


# --- turns ---


def test_turns_are_drawn_by_weight_and_pure():
    def draws(*weights, seed=0):
        return [turns.turn(step, seed=seed, weights=weights) for step in range(4000)]

    drawn = draws(1, 2, 5)
    assert drawn == draws(0.125, 0.25, 0.625) != draws(1, 2, 5, seed=1)
    for number, share in collections.Counter(drawn).items():
        expected = (1, 2, 5)[number] / 8
        assert abs(share / 4000 - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5


def taken(loader, count):
    return [{name: value.copy() for name, value in next(loader).items()} for _ in range(count)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def run(text):
    return run_lib.setup(tiny(text=text), devices=jax.devices()[:1])


def test_branches_give_their_own_batches_in_turn(run):
    """Batch t is the next one of the branch of step t; branches read the documents in other orders; any host gives its rows of it."""
    with contextlib.closing(run.loader()) as loader, contextlib.ExitStack() as stack:
        batches = taken(loader, 12)
        alone = {}
        for branch in run.branches:
            seed = turns.branch_seed(0, branch.name)
            made = Loader(run.config.data, featurizer=branch.objective, tokenizer=run.tokenizer, seed=seed, batch_size=8, streams=4)
            alone[branch.name] = stack.enter_context(contextlib.closing(made))
        names = [run.at(step).branches[0].name for step in range(12)]
        assert set(names) == {"tokens_words", "left"} and len({turns.branch_seed(0, name) for name in names} | {0}) == 3
        assert_same(batches, [next(alone[name]) for name in names])
        stats = loader.stats()
    assert stats["rows"] == 96 and stats["left/rows"] == 8 * names.count("left")
    filled = {name: sum((b["segments_BL"] > 0).sum() for b, n in zip(batches, names) if n == name) for name in set(names)}
    assert stats["share/left"] == pytest.approx(filled["left"] / sum(filled.values()))
    assert stats["padding_share"] == pytest.approx(1 - sum(filled.values()) / (96 * 32))
    for rows in (range(4), range(4, 8)):
        with contextlib.closing(run.loader(rows=rows)) as host:
            assert_same(taken(host, 12), [{name: value[list(rows)] for name, value in batch.items()} for batch in batches])


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_turns_go_on_where_they_were(run, at):
    """Also from the states of two hosts together."""
    with contextlib.closing(run.loader()) as straight, contextlib.closing(run.loader()) as restored:
        taken(straight, at)
        saved = json.loads(json.dumps(straight.state()))
        assert sorted(saved) == ["0", "1", "2", "3"]
        stats, expected = straight.stats(), taken(straight, 6)
        taken(restored, 3)
        restored.restore(saved)
        assert restored.stats() == stats
        assert_same(taken(restored, 6), expected)
    halves: dict = {}
    for rows in (range(4), range(4, 8)):
        with contextlib.closing(run.loader(rows=rows)) as host:
            taken(host, at)
            halves |= host.state()
    with contextlib.closing(run.loader()) as restored:
        restored.restore(json.loads(json.dumps(halves)))
        assert_same(taken(restored, 6), expected)


# --- whole runs ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    workdir = tmp_path_factory.mktemp("whole")
    with runs.at_batch(0, runs.stop) as batches:
        assert runs.run(tiny(text=text), workdir) == 0
    return workdir, batches


def test_a_stopped_run_ends_as_if_nothing_had_happened(text, whole, tmp_path):
    workdir, batches = whole
    with runs.at_batch(5, runs.stop) as first:
        assert runs.run(tiny(text=text), tmp_path) == 75
    with runs.at_batch(0, runs.stop) as rest:
        assert runs.run(tiny(text=text), tmp_path) == 0
    assert first + rest == batches and len(first) == 5
    runs.assert_same(tmp_path, workdir, STEPS)


def test_what_a_run_logs(whole, run):
    """Each step what its branch reports under the branch's name; the parts' validation losses and their sum by weight; `ptm evaluate` gives the same."""
    rows = [json.loads(line) for line in runs.metrics(whole[0]).splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    assert list(steps) == list(range(1, STEPS + 1))
    for step, row in steps.items():
        name = run.at(step - 1).branches[0].name
        other = ({"tokens_words", "left"} - {name}).pop()
        assert row[f"{name}/loss"] == row["loss"] and f"{name}/accuracy" in row and f"{other}/loss" not in row and "accuracy" not in row
        if name == "tokens_words":
            assert row[f"{name}/share/tokens"] + row[f"{name}/share/words"] == pytest.approx(1.0)
        assert row["share/left"] + row["share/tokens_words"] == pytest.approx(1.0)
    validation = [row for row in rows if "validation/loss" in row][-1]
    assert all(f"validation/{part}/{metric}" in validation for part in PARTS for metric in ("loss", "accuracy", "bits_per_byte", "tokens"))
    parts = [validation[f"validation/{part}/loss"] for part in PARTS]
    assert len(set(parts)) == 3 and validation["validation/loss"] == pytest.approx((parts[0] + parts[1] + 2 * parts[2]) / 4)
    again = evaluate.evaluate(f"ckpt:{whole[0]}@{STEPS}")
    assert {key: value for key, value in validation.items() if key != "step"} == {key: value for key, value in again.items() if "/" in key}


def test_each_branch_is_compiled_once(run):
    params = run.init_params()
    values, seen = run.init_state(params), set()
    with contextlib.closing(run.loader()) as loader:
        for step in range(8):
            batch = run.to_device(next(loader), batch_size=8, rows=list(range(8)))
            values, _ = run.at(step).train_step(values, batch)
            seen.add(run.at(step).branches[0].name)
    assert seen == {"tokens_words", "left"} and int(values["step"]) == 8
    assert [alone.train_step.compiled._cache_size() for alone in {id(run.at(step)): run.at(step) for step in range(8)}.values()] == [1, 1]


def test_show_batch_shows_the_first_turn(run):
    first = run.at(0).objective.mask
    (other,) = {branch.objective.mask for branch in run.branches} - {first}
    shown = samples.show_batch(run, 1)
    assert f"attention {first}" in shown and f"attention {other}" not in shown


def test_heads_of_all_branches_are_made(text):
    """A run whose branches need different heads has them all; the one without turn gets no gradient."""
    both = run_lib.setup(tiny(text=text, parts={"nsp": pairs.Config(), "tokens": mlm.Config()}, weights=()), devices=jax.devices()[:1])
    assert set(both.model.module.heads) == {"mlm", "pair"} and "pair_head" in both.abstract_params


def test_mode_losses_of_ul2(text):
    """A run of UL2 is evaluated by mode."""
    cfg = config.base(
        model=t5.Config(**runs.SHAPE | {"vocab_size": 300}, head_dim=8, mlp_width=32), objective=ul2.Config(input_length=64),
        evals={"validation": loss.Config()},
        train=Train(batch_size=8), data=Data(source=(f"text:{text}",), length=64), tokenizer=Tokenizer(kind="bytes", sentinels=32), log=Log(writers=()),
    )  # fmt: skip
    made = run_lib.setup(cfg, devices=jax.devices()[:1])
    assert made.at(3) is made and [part.name for part in made.parts] == ["r", "x", "s"]
    assert [part.weight for part in made.parts] == pytest.approx([0.33, 0.33, 0.34])
    assert [dict(part.objective.fields).keys() == {"inputs_BI", "tokens_BL", "targets_BL", "weights_BL"} for part in made.parts] == [True] * 3
    modes = dict(zip(("r", "s", "x"), made.tokenizer.sentinels[-3:]))
    for part in made.parts:
        alone = dataclasses.replace(made, branches=(part,), parts=())
        batch = next(alone.validation(8))
        starts = (np.asarray(batch["input_positions_BI"]) == 0) & (np.asarray(batch["input_segments_BI"]) > 0)
        assert set(np.asarray(batch["inputs_BI"])[starts]) == {modes[part.name]} and float(jnp.sum(batch["weights_BL"])) > 20
