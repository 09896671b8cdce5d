"""Permutation language modelling: readable examples, what is predicted and how often, its loss, and memory from batch to batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo
from jax.sharding import PartitionSpec

from ptm import config as config_lib
from ptm import registry, state, text, tree
from ptm import run as run_lib
from ptm.config import Data
from ptm.data.batch import Document, keyed_rng
from ptm.data.loader import Loader
from ptm.fields import ConfigError
from ptm.models import xlnet
from ptm.objectives import OBJECTIVES, mixture, mlm, permutation

SENTENCE = "Thank you for inviting me."


def build(tokenizer=None, *, length=32, packing="default", **options):
    entry = OBJECTIVES["permutation"]
    return entry.build(entry.config(**options), tokenizer=tokenizer or zoo.Vocabulary(), length=length, packing=packing, model_config=None)


def example(objective, tokens, *, key=(0, "doc", 0)):
    (made,) = objective.features(Document(str(key[1]), np.asarray(tokens, np.int32)), rng=keyed_rng(*key), draw=None)
    return made


def finished(objective, *tokens, key=(0, "doc", 0)):
    """The row that holds these documents."""
    return objective.finish(zoo.row([example(objective, part, key=key) for part in tokens], objective.lengths, objective.fields))


@functools.cache
def chars():
    return text.make("chars", texts=[SENTENCE], specials=True)


# --- golden example ---

ORDER = {  # what the query stream reads (_ = not yet, ? = here), and what it must say
    "span": [
        "Th___?_ou for inviti__ me.  ", "Th?__ _ou for inviti__ me. a", "Tha__ _ou for inviti?_ me. n", "Tha__ ?ou for invitin_ me. y",
        "Tha_? you for invitin_ me. k", "Tha?k you for invitin_ me. n", "Thank you for invitin? me. g",
    ],
    "token": [
        "T_ank _ou _or i__it_ng?me.  ", "T_ank ?ou _or i__it_ng me. y", "T?ank you _or i__it_ng me. h", "Thank you _or i?_it_ng me. n",
        "Thank you _or in_it?ng me. i", "Thank you _or in?iting me. v", "Thank you ?or inviting me. f",
    ],
}  # fmt: skip


def shown(row):
    """One line a target, in their order."""
    rank, lines = row["rank_BL"][row["segments_BL"] == 1], []
    pieces = chars().pieces(row["tokens_BL"][: len(rank)])
    assert pieces[-2:] == ["<sep>", "<cls>"] and not rank[-2:].any()
    for number in range(1, rank.max() + 1):
        here = rank.tolist().index(number)
        read = ("?" if n == here else piece if rank[n] < number else "_" for n, piece in enumerate(pieces[:-2]))
        lines.append("".join(read) + " " + chars().pieces([row["targets_BL"][here]])[0])
    return lines


@pytest.mark.parametrize("unit", ["span", "token"])
def test_golden(unit):
    """The targets of spans stand together; each sees the context and the targets before it in the order, wherever they stand."""
    row = finished(build(chars(), partial=4, unit=unit), chars().encode(SENTENCE), key=(1, "doc", 0))
    assert shown(row) == ORDER[unit]
    np.testing.assert_array_equal(row["weights_BL"], row["rank_BL"] > 0)
    chosen = np.flatnonzero(row["weights_BL"])
    assert row["target_index_BS"].tolist() == chosen.tolist() + [32] * (10 - len(chosen)) and row["dropped_B"] == 0


# --- what is predicted ---


def test_features_are_pure_in_seed_id_and_visit():
    tokens = zoo.documents(1, length=30)[0].tokens_L
    first = finished(build(), tokens, key=(0, "a", 0))
    again = finished(build(), tokens, key=(0, "a", 0))
    assert first.keys() == again.keys() and all(np.array_equal(first[name], again[name]) for name in first)
    for key in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
        assert not np.array_equal(finished(build(), tokens, key=key)["rank_BL"], first["rank_BL"])


@pytest.mark.parametrize("partial", [2, 6, 7])
@pytest.mark.parametrize("unit", ["span", "token"])
def test_one_of_k_tokens_is_predicted(unit, partial):
    """On average, also where K does not divide the length, at every place of a text; at least one token stays."""
    length, rng, config = 41, keyed_rng("share"), permutation.Config(unit=unit, partial=partial)
    hits = np.zeros((4000, length))
    for row in hits:
        row[permutation.choose(length, config=config, rng=rng)] = 1
    counts = hits.sum(axis=1)
    assert abs(counts.mean() - length / partial) < 5 * counts.std() / len(counts) ** 0.5 and counts.max() < length
    places = hits.mean(axis=0)
    if unit == "token":
        assert np.all(abs(places - 1 / partial) < 5 * (1 / partial / len(hits)) ** 0.5)
    for size in range(4):
        assert all(len(permutation.choose(size, config=config, rng=rng)) < max(size, 1) for _ in range(50))


def test_spans_have_lengths_of_one_to_five_in_contexts_of_k_times_as_many():
    """P(n) ~ 1/n; with K = 6 spans rarely touch, so that their lengths can be read off."""
    rng, lengths = keyed_rng("spans"), []
    for _ in range(300):
        chosen = permutation.choose(600, config=permutation.Config(partial=40), rng=rng)
        lengths += [len(run) for run in np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)]
    counts = np.bincount(lengths, minlength=6)[1:6] / len(lengths)
    expected = 1 / np.arange(1, 6) / np.sum(1 / np.arange(1, 6))
    np.testing.assert_allclose(counts, expected, atol=5 * (0.25 / len(lengths)) ** 0.5)


def test_every_order_is_equally_likely_and_each_document_has_its_own():
    """Ranks are 1, 2, ... in each segment; orders of a document do not depend on what else is in the row."""
    objective = build(length=64, partial=3, unit="token")
    a, b = (doc.tokens_L for doc in zoo.documents(2, length=12))
    alone = finished(objective, a)["rank_BL"][:14]
    np.testing.assert_array_equal(finished(objective, a, b)["rank_BL"][:14], alone)
    np.testing.assert_array_equal(finished(objective, b, a)["rank_BL"][14:28], alone)
    firsts = []
    for seed in range(400):
        rank = finished(objective, a, b, key=(seed, "doc", 0))["rank_BL"]
        for segment in (rank[:14], rank[14:28]):
            assert sorted(segment[segment > 0]) == list(range(1, (segment > 0).sum() + 1)) and not segment[12:].any()
        firsts.append(np.flatnonzero(rank[:12]).tolist().index(rank[:12].tolist().index(1)))
    assert abs(np.mean(firsts) - (rank[:12] > 0).sum() / 2 + 0.5) < 0.3


def test_overflow_is_dropped_from_the_loss_not_from_the_order():
    objective = build(length=32, partial=2, unit="token")
    objective.lengths = {**objective.lengths, "S": 5}
    row = finished(objective, zoo.documents(1, length=30)[0].tokens_L)
    assert row["dropped_B"] == row["rank_BL"].max() - 5 and row["weights_BL"].sum() == 5 and row["rank_BL"].max() in (15, 16)
    assert set(row["target_index_BS"]) == set(np.flatnonzero(row["weights_BL"]))


# --- direction and rows that go on ---


def test_half_of_the_documents_are_read_from_their_end():
    """Where there is memory; their last tokens stay last. Without memory signed distances know no direction, and nothing is turned."""
    tokens = np.arange(8, 20)
    made = [example(build(memory_length=8), tokens, key=(seed, "doc", 0)) for seed in range(400)]
    turned = [bool(item["reversed_BL"].all()) for item in made]
    for item, backwards in zip(made, turned):
        assert item["tokens_BL"].tolist() == [*(tokens[::-1] if backwards else tokens), 6, 5] and item["start_BL"].tolist() == [1] + [0] * 13
        assert backwards or not item["reversed_BL"].any()
    assert abs(np.mean(turned) - 0.5) < 5 * 0.5 / 400**0.5
    assert not any(example(build(memory_length=8, bidirectional=False), tokens, key=(seed, "doc", 0))["reversed_BL"].any() for seed in range(20))
    assert set(example(build(), tokens)) == {"tokens_BL", "noise_BL"}


def test_rows_go_on_where_they_ended(tmp_path):
    """Row b of a batch continues row b of the batch before: put end to end they are whole documents, and start_B says where one begins."""
    lines = ["".join(np.random.default_rng(n).permutation(list("abcdefghijklmnopqrstuvwxyz"))) * (1 + n % 3) for n in range(30)]
    (tmp_path / "letters.txt").write_text("\n".join(lines) + "\n")
    tokenizer = text.make("chars", texts=lines, specials=True)
    objective = build(tokenizer, length=16, memory_length=8, bidirectional=False)
    data = Data(source=(f"text:{tmp_path}/letters.txt",), holdout=0.0, prefetch=0)
    loader = Loader(data, featurizer=objective, tokenizer=tokenizer, seed=0, batch_size=4, streams=4)
    batches = [next(loader) for _ in range(40)]
    loader.close()
    for row in range(4):
        starts = [int(batch["start_B"][row]) for batch in batches]
        ends = [batch["tokens_BL"][row][-1] == tokenizer.cls_id for batch in batches]
        assert starts == [1, *map(int, ends[:-1])] and 0 < sum(starts) < 40
        stream = tokenizer.pieces(np.concatenate([batch["tokens_BL"][row] for batch in batches]))
        documents = "".join("\n" if piece == "<cls>" else "" if piece == "<sep>" else piece for piece in stream).split("\n")
        assert set(documents[:-1]) <= set(lines)


def memory_config(tmp_path, **changes):
    return runs.tiny("memory", text=runs.corpus(tmp_path / "corpus.txt", documents=20), **changes)


def test_memory_needs_a_stream_for_each_row(tmp_path):
    """That is the default; anything else is refused with what to set."""
    assert registry.streams(registry.resolve(memory_config(tmp_path))) == 16
    assert registry.streams(registry.resolve(memory_config(tmp_path, train__batch_size=192, data__streams=192))) == 192
    with pytest.raises(ConfigError, match="data.streams=4, but with objective.memory_length=12.*--config.data.streams=16"):
        registry.resolve(memory_config(tmp_path, data__streams=4))
    with pytest.raises(ConfigError, match="data.packing=first_fit breaks documents off.*allowed: default, concat"):
        registry.resolve(memory_config(tmp_path, data__packing="first_fit"))
    assert registry.streams(registry.resolve(memory_config(tmp_path, data__streams=4, objective__memory_length=0))) == 4
    with pytest.raises(ConfigError, match="data.packing=window"):
        build(packing="window")
    parts = {"order": permutation.Config(memory_length=8), "masks": mlm.Config()}
    mixed = config_lib.base(model=xlnet.Config(), objective=mixture.Config(parts=parts), evals={}, data=Data(source=("text:x",)))
    with pytest.raises(ConfigError, match="a part of objective mixture has memory_length=8, but parts have no memory"):
        registry.resolve(mixed)


# --- loss ---


def test_loss_reads_the_query_stream_at_its_targets():
    """Cross entropy of the query stream's logits, one target at a time; rows of padding and places without target add nothing."""
    objective, model, params, batch = zoo.objective("permutation", "xlnet"), zoo.model("xlnet"), zoo.params("xlnet"), zoo.batch("permutation", "xlnet")
    totals, aux, carry = zoo.jit(functools.partial(objective.loss, model, rng=None, carry=None, train=False))(params, batch)
    logits = np.asarray(model.logits(params, model.hidden(params, batch, mask="permutation").query_BSD, head="lm"), np.float64)
    expected, count = 0.0, 0
    for row, places in enumerate(np.asarray(batch["target_index_BS"])):
        for number, place in enumerate(places):
            if place < zoo.LENGTH:
                expected += np.log(np.exp(logits[row, number]).sum()) - logits[row, number, batch["tokens_BL"][row, place]]
                count += 1
    np.testing.assert_allclose(totals["tokens"], expected, rtol=1e-5)
    assert count == objective.weights(batch)["tokens"] == aux.ratios["accuracy"][1] > 20 and carry is None


def test_a_batch_without_targets_gives_zero_and_no_nan():
    objective = zoo.objective("permutation", "xlnet")
    empty = zoo.stack([objective.finish(zoo.row([], objective.lengths, objective.fields)) for _ in range(8)])
    step, params = zoo.plain_gradients("xlnet", "permutation")
    loss, grads = step(params, empty)
    assert float(loss) == 0.0 and all(not np.asarray(leaf).any() for leaf in tree.paths(grads).values())


# --- memory from batch to batch ---


@functools.cache
def remembering(microbatches):
    """(batch, carry) -> (loss, gradient, carry) of an objective with memory."""
    objective = zoo.objective("permutation", "xlnet", memory_length=6)
    model, params = zoo.model("xlnet"), zoo.params("xlnet")

    def step(batch, carry):
        loss, grads, _, carry = state.gradients(model, objective, params, batch, microbatches=microbatches, rng=None, carry=carry, train=False)
        return loss, grads, carry

    return zoo.jit(step), zoo.batch("permutation", "xlnet", memory_length=6), objective.init_carry(model, 8)


@pytest.fixture(scope="module")
def second():
    """The batch that follows a first one in some rows, the memory of that one, and what they give at once."""
    step, batch, empty = remembering(1)
    _, _, carry = step(batch, empty)
    following = batch | {"start_B": jnp.array([0, 0, 1, 0, 0, 1, 0, 0]), "segments_BL": jnp.maximum(batch["segments_BL"], 1)}
    _, _, carry = step(following, carry)
    assert np.asarray(carry["valid_BM"]).any(axis=1).all()
    return following, carry, step(following, carry)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_take_the_rows_of_the_memory_with_them(second, microbatches):
    """Loss, gradient and the new memory, row by row, are those of the whole batch."""
    batch, carry, (expected_loss, expected_grads, expected_carry) = second
    loss, grads, carry = remembering(microbatches)[0](batch, carry)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected_grads)
    np.testing.assert_array_equal(carry["valid_BM"], expected_carry["valid_BM"])
    np.testing.assert_allclose(carry["states_BNMD"], expected_carry["states_BNMD"], atol=1e-5)


def test_memory_is_void_where_a_document_begins(second):
    """Rows whose document begins in them do not feel the memory; that of each other row matters to it, and to it alone."""
    batch, carry, (_, _, expected) = second
    step = remembering(1)[0]
    noise = jnp.asarray(np.random.default_rng(0).standard_normal(carry["states_BNMD"].shape, np.float32))
    changed = step(batch, carry | {"states_BNMD": noise})[2]["states_BNMD"]
    same = np.all(np.asarray(changed == expected["states_BNMD"])[:, 1:], axis=(1, 2, 3))  # above the first layer's input
    np.testing.assert_array_equal(same, np.asarray(batch["start_B"]) == 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


def test_a_step_that_is_not_accepted_leaves_no_memory(corpus):
    """The next rows continue text that was never read into it, so they begin anew, as after a first batch."""
    run = run_lib.setup(runs.tiny("memory", text=corpus), devices=jax.devices()[:1])
    loader = run.loader()
    first = next(loader)
    loader.close()
    values = run.init_state(run.init_params())
    assert not any(np.asarray(leaf).any() for leaf in values["carry"].values()) and values["carry"]["states_BNMD"].shape == (16, 2, 12, 16)
    values, metrics = run.train_step(values, first)
    assert int(metrics["skips"]) == 0 and np.asarray(values["carry"]["valid_BM"]).any()
    broken = values | {"params": jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), values["params"])}
    after, metrics = run.train_step(broken, first)
    assert int(metrics["skips"]) == 1 and not any(np.asarray(leaf).any() for leaf in after["carry"].values())


def test_memory_lies_with_the_rows_of_the_batch(corpus):
    run = run_lib.setup(runs.tiny("memory", text=corpus, mesh__data=2, mesh__fsdp=2), devices=jax.devices()[:4])
    assert {leaf.sharding.spec for leaf in run.abstract_state["carry"].values()} == {PartitionSpec(("data", "fsdp"))}


def test_a_stopped_run_goes_on_with_its_memory(corpus, tmp_path):
    """Stopped after step 4 and finished: state, memory included, data state and metrics are those of the run that was not stopped, bit for bit."""
    config = runs.tiny("memory", text=corpus, train__steps=8)
    with runs.at_batch(0, runs.stop) as batches:
        assert runs.run(config, tmp_path / "whole") == 0
    with runs.at_batch(4, runs.stop) as first:
        assert runs.run(config, tmp_path / "stopped") == 75
    assert runs.leaves(tmp_path / "stopped", 4)["carry/valid_BM"].any()
    with runs.at_batch(0, runs.stop) as then:
        assert runs.run(config, tmp_path / "stopped") == 0
    assert first + then == batches
    runs.assert_same(tmp_path / "stopped", tmp_path / "whole", 8)


@pytest.mark.slow
@pytest.mark.parametrize(("begin", "then"), [(1, 8), (8, 1)])
def test_memory_goes_to_other_device_counts(corpus, tmp_path, begin, then):
    """The same rows with their memory; sums are added in another order, so that values agree to a tolerance only."""
    config = runs.tiny("memory", text=corpus, train__steps=8)
    assert runs.run(config, tmp_path / "whole") == 0
    with runs.at_batch(5, runs.stop):
        assert runs.run(config, tmp_path / "moved", devices=begin) == 75
    assert runs.run(config, tmp_path / "moved", devices=then) == 0
    ours, theirs = (runs.leaves(tmp_path / name, 8) for name in ("moved", "whole"))
    for path in ("carry/valid_BM", "carry/states_BNMD", "params/mask_embed"):
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-3, err_msg=path)
