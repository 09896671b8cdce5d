"""The objectives: readable golden examples, the statistics and round trips of their features, and their losses as sums and weights."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm import state, text, tree
from ptm.config import Data
from ptm.data.batch import Document, keyed_rng
from ptm.data.loader import Loader
from ptm.fields import ConfigError
from ptm.models import gpt
from ptm.nn.stack import Output
from ptm.objectives import OBJECTIVES, causal, mlm, span_corruption

DECODER, ENCODER, BOTH = (types.SimpleNamespace(kind=kind) for kind in ("decoder", "encoder", "encoder_decoder"))
KIND = {"causal": DECODER, "mlm": ENCODER, "span_corruption": BOTH}
SENTENCE = "Thank you for inviting me to your party last week."
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "thank", "you", "for", "invit", "##ing", "me", "to", "your", "part", "##y", "last", "week", "."]


def build(name, tokenizer, *, length, packing="default", **options):
    entry = OBJECTIVES[name]
    return entry.build(entry.config(**options), tokenizer=tokenizer, length=length, packing=packing, model_config=KIND[name])


def make(objective, tokens, *, key=(0, "doc", 0)):
    return list(objective.features(Document(str(key[1]), np.asarray(tokens, np.int32)), rng=keyed_rng(*key), draw=None))


@functools.cache
def chars(sentinels=0):
    return text.make("chars", texts=[SENTENCE], specials=True, sentinels=sentinels)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A WordPiece vocabulary of a few words; two words of the sentence have two pieces."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return text.make("wordpiece", path=str(path), lowercase=True)


def shown(tokenizer, ids, joint=" "):
    return joint.join(tokenizer.pieces(ids))


# --- golden examples ---


def causal_golden():
    (example,) = make(build("causal", chars(), length=64), chars().encode("to you"))
    assert shown(chars(), example["tokens_BL"], "") == "<s>to you"
    assert shown(chars(), example["targets_BL"], "") == "to you</s>"
    assert example["weights_BL"].tolist() == [1] * 7


def test_causal_golden():
    causal_golden()


MLM_GOLDEN = {  # seed, what the model reads, what it must say at the chosen places
    "token": (6, "[CLS] thank you ##ing invit ##ing me to [MASK] part [MASK] last week . [SEP]", "for your ##y"),
    "whole_word": (1, "[CLS] thank you for [MASK] [MASK] me to your part [MASK] last week . [SEP]", "invit ##ing part ##y"),
    "span": (4, "[CLS] thank you [MASK] invit ##ing me to [MASK] [MASK] [MASK] last week [MASK] [SEP]", "for your part ##y ."),
}


@pytest.mark.parametrize("unit", list(MLM_GOLDEN))
def test_mlm_golden(words, unit):
    """One word is replaced at random in the first example, one piece is kept in the second."""
    seed, masked, chosen = MLM_GOLDEN[unit]
    (example,) = make(build("mlm", words, length=32, unit=unit, rate=0.3), words.encode(SENTENCE), key=(seed, "doc", 0))
    assert shown(words, example["targets_BL"]) == "[CLS] thank you for invit ##ing me to your part ##y last week . [SEP]"
    assert shown(words, example["tokens_BL"]) == masked
    assert shown(words, example["targets_BL"][example["weights_BL"] > 0]) == chosen


def test_span_corruption_golden():
    tokenizer = chars(sentinels=8)
    (example,) = make(build("span_corruption", tokenizer, length=32, input_length=64), tokenizer.encode(SENTENCE))
    assert shown(tokenizer, example["inputs_BI"], "") == "Thank you for inviting<extra_id_0> to your p<extra_id_1> last week<extra_id_2></s>"
    assert shown(tokenizer, example["targets_BL"], "") == "<extra_id_0> me<extra_id_1>arty<extra_id_2>.</s>"
    assert shown(tokenizer, example["tokens_BL"], "") == "<pad><extra_id_0> me<extra_id_1>arty<extra_id_2>."
    assert example["weights_BL"].tolist() == [1] * len(example["targets_BL"])


# --- randomness ---


def flat(examples):
    return [{name: value.tolist() for name, value in example.items()} for example in examples]


@pytest.mark.parametrize(("name", "random"), [("causal", False), ("mlm", True), ("span_corruption", True)])
def test_features_are_pure_in_seed_id_and_visit(name, random):
    objective = build(name, zoo.Vocabulary(), length=40, **({"input_length": 60} if name == "span_corruption" else {}))
    tokens = zoo.documents(1, length=50)[0].tokens_L
    first = flat(make(objective, tokens, key=(0, "a", 0)))
    assert flat(make(objective, tokens, key=(0, "a", 0))) == first
    for key in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
        assert (flat(make(objective, tokens, key=key)) != first) == random


@pytest.mark.parametrize("name", ["mlm", "span_corruption"])
@pytest.mark.parametrize(("visits", "different"), [(1, 1), (2, 2), (None, 4)])
def test_visits_are_static_copies_or_dynamic(tmp_path, name, visits, different):
    """Over four epochs a document is corrupted in 1, n, or 4 ways."""
    (tmp_path / "one.txt").write_text(SENTENCE + "\n")
    tokenizer = chars(sentinels=16)
    objective = build(name, tokenizer, length=64, packing="none", visits=visits)
    data = Data(source=(f"text:{tmp_path}/one.txt",), holdout=0.0, packing="none", prefetch=0)
    loader = Loader(data, featurizer=objective, tokenizer=tokenizer, seed=0, batch_size=1, streams=1)
    epochs = [next(loader)["inputs_BI" if name == "span_corruption" else "tokens_BL"].tobytes() for _ in range(4)]
    loader.close()
    assert len(set(epochs)) == different
    assert epochs[:2] == epochs[2:] or visits is None


# --- masked language modelling ---


def whole(objective, tokens, *, key=(0, "doc", 0)):
    """The masked document without the frames of its parts: (corrupted, original, weights)."""
    parts = make(objective, tokens, key=key)
    return tuple(np.concatenate([part[name][1:-1] for part in parts]) for name in ("tokens_BL", "targets_BL", "weights_BL"))


def vocabulary_mlm(**options):
    return build("mlm", zoo.Vocabulary(), length=16, **options)


@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("unit", ["token", "whole_word", "span"])
def test_masking_rate_is_exact_on_average(unit, rate):
    """Also where rate * length is no whole number and words have several tokens; words of all sizes get their share."""
    length, objective = 101, vocabulary_mlm(unit=unit, rate=rate)
    weights, sizes = [], []
    for doc in zoo.documents(800, length=length):
        weights.append(whole(objective, doc.tokens_L, key=(0, doc.id, 0))[2])
        starts = np.flatnonzero(np.r_[True, zoo.Vocabulary().word_starts(doc.tokens_L)[1:]])
        sizes.append(np.repeat(np.diff(np.r_[starts, length]), np.diff(np.r_[starts, length])))
    counts = np.sum(weights, axis=1)
    assert abs(counts.mean() - rate * length) < 5 * counts.std() / len(counts) ** 0.5 < 0.6
    for some in (np.array(sizes) <= 2, np.array(sizes) >= 6):
        assert np.array(weights)[some].mean() == pytest.approx(rate, rel=0.12)


def test_at_least_one_unit_of_a_short_document_is_masked():
    for unit in ("token", "whole_word", "span"):
        for seed in range(20):
            assert whole(vocabulary_mlm(unit=unit), [9, 10, 11], key=(seed, "d", 0))[2].sum() >= 1


def check_shares(objective, mask_share, random_share):
    corrupted, original, weights = map(np.concatenate, zip(*(whole(objective, d.tokens_L, key=(0, d.id, 0)) for d in zoo.documents(100, length=300))))
    chosen = weights > 0
    np.testing.assert_array_equal(corrupted[~chosen], original[~chosen])
    count, ordinary = chosen.sum(), zoo.VOCAB - len(zoo.Vocabulary.special_ids)
    changed = random_share * (1 - 1 / ordinary)  # a random token may be the original
    for hits, share in (
        (corrupted[chosen] == zoo.Vocabulary.mask_id, mask_share),
        ((corrupted[chosen] != zoo.Vocabulary.mask_id) & (corrupted[chosen] != original[chosen]), changed),
        (corrupted[chosen] == original[chosen], 1 - mask_share - changed),
    ):
        assert abs(hits.mean() - share) <= 5 * (share * (1 - share) / count) ** 0.5
    used = set(corrupted[chosen & (corrupted != original)].tolist()) - {zoo.Vocabulary.mask_id}
    assert not used & zoo.Vocabulary.special_ids, "special tokens never stand in for others"
    assert not random_share or len(used) == ordinary, "all others do"


@pytest.mark.parametrize("unit", ["token", "whole_word"])
@pytest.mark.parametrize(("mask_share", "random_share"), [(0.8, 0.1), (1.0, 0.0), (0.3, 0.5), (0.0, 1.0)])
def test_shares_of_mask_random_and_kept(unit, mask_share, random_share):
    check_shares(vocabulary_mlm(rate=0.3, unit=unit, mask_share=mask_share, random_share=random_share), mask_share, random_share)


def test_words_are_never_split_and_spans_share_their_fate():
    for unit in ("whole_word", "span"):
        config = mlm.Config(unit=unit, mask_share=0.5, random_share=0.0)
        for doc in zoo.documents(50, length=120):
            word = np.cumsum(zoo.Vocabulary().word_starts(doc.tokens_L))
            starts = zoo.Vocabulary().word_starts(doc.tokens_L)
            chosen, number = mlm.choose(120, starts, config=config, rng=keyed_rng(0, doc.id, 0))
            corrupted, original, weights = whole(vocabulary_mlm(**dataclasses.asdict(config)), doc.tokens_L, key=(0, doc.id, 0))
            np.testing.assert_array_equal(np.flatnonzero(weights), chosen)
            assert set(np.flatnonzero(np.isin(word, word[chosen]))) == set(chosen)
            if unit == "span":
                assert all(len(set((corrupted == original)[chosen[number == n]])) == 1 for n in set(number))


def test_span_lengths_are_geometric():
    """Truncated at 10 with mean 3.8 words (SpanBERT, section 3.1)."""
    config = mlm.Config(unit="span", rate=0.05)
    lengths = []
    for seed in range(60):
        _, number = mlm.choose(2000, np.ones(2000, bool), config=config, rng=keyed_rng(seed))
        lengths += np.unique(number, return_counts=True)[1].tolist()
    shares = 0.2 * 0.8 ** np.arange(10)
    shares /= shares.sum()
    assert shares @ np.arange(1, 11) == pytest.approx(3.8, abs=0.01)
    assert max(lengths) == 10 and np.mean(lengths) == pytest.approx(3.8, rel=0.06)  # a few run into another or pass the budget
    np.testing.assert_allclose(np.bincount(lengths, minlength=11)[1:] / len(lengths), shares, atol=0.035)


def test_long_documents_are_masked_whole_then_cut_and_framed():
    tokens = zoo.documents(1, length=100)[0].tokens_L
    parts = make(vocabulary_mlm(), tokens)
    assert [len(part["tokens_BL"]) for part in parts] == [16] * 7 + [4]
    for part in parts:
        for name in ("tokens_BL", "targets_BL"):
            assert (part[name][0], part[name][-1]) == (zoo.Vocabulary.cls_id, zoo.Vocabulary.sep_id)
        assert part["weights_BL"][0] == part["weights_BL"][-1] == 0
    np.testing.assert_array_equal(np.concatenate([part["targets_BL"][1:-1] for part in parts]), tokens)
    assert sum(part["weights_BL"].sum() for part in parts) in (15, 16)


def test_a_row_without_room_is_refused():
    with pytest.raises(ConfigError, match="data.length=2 leaves no room.*3 or more"):
        build("mlm", zoo.Vocabulary(), length=2)


def test_overflow_is_dropped_at_random_and_counted():
    objective = vocabulary_mlm()
    room, kept = objective.lengths["S"], np.zeros(16)
    assert room == 3
    for seed in range(300):
        (example,) = zoo.examples("mlm", "bert", 1, length=14, seed=seed)
        given = zoo.row([example | {"weights_BL": np.r_[0, np.ones(14), 0].astype(np.float32)}], objective.lengths, objective.fields)
        row, again = objective.finish(given), objective.finish(given)
        assert row["weights_BL"].sum() == room and row["dropped_B"] == 14 - room
        np.testing.assert_array_equal(row["target_index_BS"], np.flatnonzero(row["weights_BL"]))
        np.testing.assert_array_equal(row["target_index_BS"], again["target_index_BS"])
        kept += row["weights_BL"]
    assert kept[0] == kept[15] == 0
    np.testing.assert_allclose(kept[1:15], 300 * 3 / 14, atol=5 * (300 * 3 / 14) ** 0.5)


def test_finish_marks_places_without_target():
    objective = vocabulary_mlm(rate=0.5)
    empty = objective.finish(zoo.row([], objective.lengths, objective.fields))
    assert empty["target_index_BS"].tolist() == [16] * objective.lengths["S"] and empty["dropped_B"] == 0 and not empty["weights_BL"].any()
    (example,) = zoo.examples("mlm", "bert", 1, length=9)
    row = objective.finish(zoo.row([example], objective.lengths, objective.fields))
    chosen = np.flatnonzero(row["weights_BL"])
    assert row["target_index_BS"].tolist() == chosen.tolist() + [16] * (objective.lengths["S"] - len(chosen))


def test_places_without_target_select_nothing():
    """Not the last position either, which has a target here."""
    objective = vocabulary_mlm(rate=0.5)
    given = zoo.row([], objective.lengths, objective.fields)
    given["weights_BL"][-1] = 1.0
    batch = zoo.stack([objective.finish(given)])
    hidden, _, weights = objective.select(jnp.ones((1, 16, 4)), batch)
    assert weights.tolist() == [[1.0] + [0.0] * 9]
    assert hidden.sum(axis=2).tolist() == [[4.0] + [0.0] * 9]


# --- span corruption ---


def reassemble(inputs, targets, sentinels, eos):
    """The text that an input and its target stand for; checks sentinels and ends on the way."""
    assert inputs[-1] == targets[-1] == eos
    spans, seen = {}, []
    for token in targets[:-1]:
        if token in sentinels:
            seen.append(token)
            spans[token] = []
        else:
            spans[seen[-1]].append(token)
    assert seen == list(sentinels[: len(seen)]) == [token for token in inputs if token in sentinels], "sentinels come in order, the same on both sides"
    assert all(spans.values()), "no span is empty"
    return [t for token in inputs[:-1] for t in (spans[token] if token in spans else [token])]


class Numbers(zoo.Vocabulary):
    """Room for hundreds of sentinels above 1,000 pieces."""

    vocab_size = 2000
    sentinels = tuple(range(1999, 1399, -1))


@settings(max_examples=150, deadline=None)
@given(length=st.integers(2, 400), rate=st.floats(0.01, 0.95), mean_span=st.floats(1.0, 40.0), seed=st.integers(0, 1000))
def test_span_corruption_reassembles_its_input(length, rate, mean_span, seed):
    objective = build("span_corruption", Numbers(), length=800, input_length=800, rate=rate, mean_span=mean_span)
    tokens = np.random.default_rng(seed).integers(8, 1000, length)
    (example,) = make(objective, tokens, key=(seed,) * 3)
    inputs, targets = example["inputs_BI"].tolist(), example["targets_BL"].tolist()
    assert reassemble(inputs, targets, Numbers.sentinels, Numbers.eos_id) == tokens.tolist()
    assert (len(inputs), len(targets)) == objective.config.example_lengths(length)
    assert example["tokens_BL"].tolist() == [Numbers.pad_id, *targets[:-1]]
    noise, spans = objective.config.spans(length)
    assert len(targets) == noise + spans + 1 and 0 < spans <= noise < length


@pytest.mark.parametrize(
    ("rate", "mean_span", "input_length", "length", "raw"),
    [(0.15, 3.0, 512, 114, 568), (0.15, 8.0, 512, 100, 588), (0.5, 3.0, 512, 512, 766)],
)
def test_raw_length_is_the_published_one(rate, mean_span, input_length, length, raw):
    """T5's own lengths for 512 inputs are 568 raw tokens and 114 targets; UL2's denoisers, worked out by hand, follow from the same rule."""
    config = span_corruption.Config(rate=rate, mean_span=mean_span, input_length=input_length)
    assert config.raw_length(length) == raw
    assert config.example_lengths(raw) == (input_length, length)


def test_number_of_noise_tokens_and_spans():
    assert span_corruption.Config().spans(568) == (85, 28)
    assert span_corruption.Config().spans(100) == (15, 5)
    assert span_corruption.Config().spans(10) == (2, 1)
    assert span_corruption.Config().spans(2) == (1, 1)
    assert span_corruption.Config(rate=0.5, mean_span=32.0).spans(512) == (256, 8)
    assert span_corruption.Config(rate=0.9, mean_span=1.0).spans(10) == (9, 1)


@pytest.mark.parametrize("rate", [0.02, 0.15, 0.5, 0.85])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 12.5])
@pytest.mark.parametrize(("input_length", "length"), [(4, 8), (32, 16), (100, 100), (128, 300)])
def test_every_piece_fits_its_rows(rate, mean_span, input_length, length):
    config = span_corruption.Config(rate=rate, mean_span=mean_span, input_length=input_length)
    raw = config.raw_length(length)
    for count in range(2, raw + 1):
        inputs, targets = config.example_lengths(count)
        assert inputs <= input_length and targets <= length
    inputs, targets = config.example_lengths(raw + 1)
    assert inputs > input_length or targets > length, "one token more would not fit"


def test_all_ways_to_place_spans_are_equally_likely():
    """5 clean tokens in 2 parts and 3 corrupted in 2: 4 x 2 ways."""
    counts = {}
    rng = keyed_rng("ways")
    for _ in range(4000):
        noise = span_corruption.random_spans(8, 3, 2, rng)
        assert noise.sum() == 3 and not noise[0] and noise[-1]
        counts[tuple(noise)] = counts.get(tuple(noise), 0) + 1
    assert len(counts) == 8
    assert all(abs(count - 500) < 5 * (500 * 7 / 8) ** 0.5 for count in counts.values())


def test_span_corruption_says_what_it_needs():
    with pytest.raises(ConfigError, match="needs a tokenizer with pad, eos and 28 sentinels.*sentinels=28"):
        build("span_corruption", chars(sentinels=8), length=114, input_length=512)
    with pytest.raises(ConfigError, match="no text fits objective.input_length=4 and data.length=2"):
        build("span_corruption", zoo.Vocabulary(), length=2, input_length=4)


# --- causal ---


@pytest.mark.parametrize(("boundaries", "tokens", "targets"), [(True, "<s>abc", "abc</s>"), (False, "ab", "bc")])
def test_causal_boundaries_and_pieces_that_fill_a_row(boundaries, tokens, targets):
    tokenizer = text.make("chars", texts=["abcdefgh"], specials=True)
    objective = build("causal", tokenizer, length=4, packing="none", boundaries=boundaries)
    (example,) = make(objective, tokenizer.encode("abc"))
    assert (shown(tokenizer, example["tokens_BL"], ""), shown(tokenizer, example["targets_BL"], "")) == (tokens, targets)
    (full,) = make(objective, tokenizer.encode("abcdefgh"[: objective.raw_length]))
    assert len(full["tokens_BL"]) == 4
    assert not make(build("causal", tokenizer, length=4, boundaries=False), tokenizer.encode("a")), "one token has nothing to predict"


@pytest.mark.parametrize("specials", [False, True])
def test_windows_are_random_places_of_the_text_that_fill_a_row(tmp_path, specials):
    letters = "abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "letters.txt").write_text(letters)
    tokenizer = text.make("chars", texts=[letters], specials=specials)
    objective = build("causal", tokenizer, length=6, packing="window")
    data = Data(source=(f"text:{tmp_path}/letters.txt",), document="file", holdout=0.0, packing="window", prefetch=0)
    loader = Loader(data, featurizer=objective, tokenizer=tokenizer, seed=0, batch_size=64, streams=1)
    batch = next(loader)
    loader.close()
    assert (batch["segments_BL"] == 1).all() and (batch["weights_BL"] == 1).all()
    np.testing.assert_array_equal(batch["positions_BL"], np.tile(np.arange(6), (64, 1)))
    seen = {shown(tokenizer, np.append(row, target[-1:]), "") for row, target in zip(batch["tokens_BL"], batch["targets_BL"])}
    assert all(len(window) == 7 and window in letters for window in seen) and len(seen) > 10
    np.testing.assert_array_equal(batch["tokens_BL"][:, 1:], batch["targets_BL"][:, :-1])


# --- mutations: the tests above see a fault ---


def test_a_dropped_shift_is_seen(monkeypatch):
    original = causal.Causal.features

    def unshifted(self, doc, *, rng, draw):
        for example in original(self, doc, rng=rng, draw=draw):
            yield example | {"targets_BL": example["tokens_BL"]}

    monkeypatch.setattr(causal.Causal, "features", unshifted)
    with pytest.raises(AssertionError):
        causal_golden()


def test_flipped_shares_are_seen():
    with pytest.raises(AssertionError):
        check_shares(vocabulary_mlm(rate=0.3, mask_share=0.1, random_share=0.8), 0.8, 0.1)


def test_a_lost_span_is_seen():
    objective = build("span_corruption", Numbers(), length=64, input_length=64)
    tokens = np.arange(10, 50)
    (example,) = make(objective, tokens)
    inputs, targets = example["inputs_BI"].tolist(), example["targets_BL"].tolist()
    assert reassemble(inputs, targets, Numbers.sentinels, Numbers.eos_id) == tokens.tolist()
    assert reassemble(inputs, [t for t in targets if t != targets[2]], Numbers.sentinels, Numbers.eos_id) != tokens.tolist()


# --- losses ---


class Table:
    """A model whose logits are a row of its one parameter, chosen by the token: what it must give can be worked out by hand."""

    module = types.SimpleNamespace(context=types.SimpleNamespace(loss_chunk=1000, layout=None))

    def hidden(self, params, batch, *, mask, head, train, rng):
        return Output(hidden_BLD=params["table"][batch["tokens_BL"]])

    def logits(self, params, hidden, *, head):
        return hidden


def table_loss(objective, params, batch):
    totals, aux, _ = objective.loss(Table(), params, batch, rng=None, carry=None, train=True)
    return state.weighted_sum(objective, totals, objective.weights(batch)), (totals, aux)


TABLE = {"table": jnp.asarray(np.random.default_rng(0).standard_normal((zoo.VOCAB, zoo.VOCAB), np.float32))}
HOMES = [("gpt", "causal"), ("bert", "mlm"), ("t5", "span_corruption")]


@pytest.mark.parametrize(("family", "name"), HOMES)
def test_loss_accuracy_bits_per_byte_and_z_by_hand(family, name):
    """Sums over the real targets alone, in float64, and the gradient of both terms."""
    objective = zoo.objective(name, family, z_loss=0.1)
    batch = zoo.batch(name, family)
    (loss, (totals, aux)), grad = zoo.jit(jax.value_and_grad(functools.partial(table_loss, objective), has_aux=True))(TABLE, batch)

    table = np.asarray(TABLE["table"], np.float64)
    log_z = np.log(np.exp(table).sum(axis=1))
    expected_grad, nll, z, hits, num_bytes, weight = np.zeros_like(table), 0.0, 0.0, 0, 0, 0
    tokens, targets, weights = (np.asarray(batch[field]) for field in ("tokens_BL", "targets_BL", "weights_BL"))
    for token, target in zip(tokens[weights > 0], targets[weights > 0]):
        softmax = np.exp(table[token] - log_z[token])
        expected_grad[token] += softmax * (1 + 0.1 * 2 * log_z[token])
        expected_grad[token, target] -= 1
        nll, z, hits, weight = nll + log_z[token] - table[token, target], z + log_z[token] ** 2, hits + (table[token].argmax() == target), weight + 1
        num_bytes += 3 if 8 <= target < 40 else 0
    assert weight == weights.sum() > 5 and num_bytes < 3 * weight or name == "mlm"
    np.testing.assert_allclose([loss, totals["tokens"], totals["z"]], [(nll + 0.1 * z) / weight, nll, z], rtol=1e-5)
    np.testing.assert_allclose(grad["table"], expected_grad / weight, atol=1e-6)
    np.testing.assert_allclose(aux.ratios["accuracy"], [hits, weight])
    np.testing.assert_allclose(aux.ratios["bits_per_byte"], [nll / np.log(2), num_bytes], rtol=1e-5)


def test_bits_per_byte_of_a_uniform_model_is_the_entropy():
    """Uniform over 2^k pieces of one byte costs k bits a byte; of two bytes half of that."""
    for size, ascii_text in ((1, "abcd"), (2, "éèüñ")):
        tokenizer = text.make("chars", texts=[ascii_text])
        objective = build("causal", tokenizer, length=4, boundaries=False)
        batch = zoo.stack([objective.finish(zoo.row(make(objective, tokenizer.encode(ascii_text)), objective.lengths, objective.fields))])
        _, (_, aux) = table_loss(objective, {"table": jnp.zeros((4, 4))}, batch)
        bits, num_bytes = aux.ratios["bits_per_byte"]
        assert (float(bits / num_bytes), float(num_bytes)) == (pytest.approx(2 / size), 3 * size)


def test_dropped_targets_are_reported():
    objective = zoo.objective("mlm", "bert")
    batch = zoo.batch("mlm", "bert") | {"dropped_B": jnp.arange(8.0)}
    _, (_, aux) = table_loss(objective, TABLE, batch)
    np.testing.assert_allclose(aux.ratios["dropped_share"], [28, 28 + jnp.sum(batch["weights_BL"])])


@pytest.mark.parametrize(("family", "name"), HOMES)
def test_weights_depend_on_the_batch_alone(family, name):
    """They are the sum of the weights, whatever the model; parts of a batch add up to it; all targets of MLM are among the selected positions."""
    objective = zoo.objective(name, family, z_loss=0.1)
    batch = zoo.batch(name, family)
    weights = objective.weights(batch)
    assert set(weights) == set(objective.coefficients) == {"tokens", "z"}
    np.testing.assert_array_equal(list(weights.values()), float(np.asarray(batch["weights_BL"], np.float64).sum()))
    parts = [objective.weights(jax.tree.map(lambda x, part=part: x[part::2], batch))["tokens"] for part in range(2)]
    assert float(sum(parts)) == float(weights["tokens"]) and float(parts[0]) != float(parts[1])
    hidden = jnp.ones((*batch["tokens_BL"].shape, 4))
    assert float(jnp.sum(objective.select(hidden, batch)[2])) == float(weights["tokens"])


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize(("family", "name"), HOMES)
def test_microbatches_give_the_gradient_of_the_whole_batch(family, name, microbatches):
    """Rows of unequal weight, one of padding: averaging the averages of parts would be wrong."""
    batch = zoo.batch(name, family)
    rows = np.asarray(batch["weights_BL"]).sum(axis=1)
    assert 0 in rows and len(set(rows)) > 2
    step, params = zoo.gradients(family, name, microbatches=microbatches)
    loss, grads = step(params, batch)
    expected_loss, expected_grads = zoo.reference(family, name)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected_grads)


@pytest.mark.parametrize(("family", "name"), HOMES)
def test_loss_is_unchanged_by_padding(family, name):
    """More rows and more positions of padding."""
    objective, made = zoo.objective(name, family), zoo.model(family)
    batch = zoo.batch(name, family, extra_rows=2, extra_length=8)
    assert batch["tokens_BL"].shape == (10, zoo.LENGTH + 8)
    totals = zoo.jit(lambda p, b: objective.loss(made, p, b, rng=None, carry=None, train=False)[0])(zoo.params(family, heads=objective.heads), batch)
    np.testing.assert_allclose(state.weighted_sum(objective, totals, objective.weights(batch)), zoo.reference(family, name)[0], rtol=1e-6)


@pytest.mark.parametrize(("family", "name"), HOMES)
def test_a_batch_without_targets_gives_zero_and_no_nan(family, name):
    objective = zoo.objective(name, family)
    empty = zoo.stack([objective.finish(zoo.row([], objective.lengths, objective.fields)) for _ in range(8)])
    assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, zoo.batch(name, family))
    step, params = zoo.plain_gradients(family, name)
    loss, grads = step(params, empty)
    assert float(loss) == 0.0
    assert all(not np.asarray(leaf).any() for leaf in tree.paths(grads).values())


def test_objectives_declare_what_they_need():
    assert causal.Causal(causal.Config(), tokenizer=chars(), length=8, packing="default", model_config=gpt.Config()).heads == ("lm",)
    with pytest.raises(ConfigError, match="mask token"):
        build("mlm", text.make("chars", texts=["abc"]), length=8)
    for name, packing in (("mlm", "window"), ("span_corruption", "window"), ("span_corruption", "concat")):
        with pytest.raises(ConfigError, match=f"data.packing={packing}"):
            build(name, zoo.Vocabulary(), length=8, packing=packing)
