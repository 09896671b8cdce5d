"""Prefix language modelling, T5's unsupervised objectives and UL2: readable golden examples, what of a text they keep, and that no answer is seen."""

import collections
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm import objectives, state
from ptm.data.batch import Document, keyed_rng
from ptm.fields import ConfigError
from ptm.objectives import denoising, prefix, span_corruption, ul2

KINDS = {kind: types.SimpleNamespace(kind=kind) for kind in ("decoder", "encoder", "encoder_decoder")}
PIECES = ["<pad>", "</s>", "<s>", "<mask>", "Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]


class Words(zoo.Vocabulary):
    """The words of the example in table 3 of the T5 paper, and sentinels <0>, <1>, ... at the end of the vocabulary."""

    vocab_size = len(PIECES) + 8
    pad_id, eos_id, bos_id, mask_id, cls_id, sep_id, unk_id = 0, 1, 2, 3, None, None, None
    sentinels = tuple(range(vocab_size - 1, vocab_size - 9, -1))
    special_ids = frozenset(range(4)) | frozenset(sentinels)
    token_bytes = np.where(np.isin(np.arange(vocab_size), list(special_ids)), 0, 3).astype(np.int32)

    def pieces(self, ids):
        return [PIECES[i] if i < len(PIECES) else f"<{self.vocab_size - 1 - i}>" for i in map(int, ids)]


class Numbers(zoo.Vocabulary):
    """Room for hundreds of sentinels above 1,000 pieces."""

    vocab_size = 2000
    sentinels = tuple(range(1999, 1399, -1))
    special_ids = frozenset(range(8)) | frozenset(sentinels)
    token_bytes = np.where(np.isin(np.arange(vocab_size), list(special_ids)), 0, 3).astype(np.int32)


SENTENCE = np.arange(4, len(PIECES), dtype=np.int32)


def build(config, *, kind="encoder_decoder", tokenizer=None, length=64, packing="default"):
    return objectives.make(config, tokenizer=tokenizer or Words(), length=length, packing=packing, model_config=KINDS[kind])


def make(objective, tokens=SENTENCE, *, key=(0, "doc", 0)):
    return list(objective.features(Document(str(key[1]), np.asarray(tokens, np.int32)), rng=keyed_rng(*key), draw=None))


def shown(objective, example):
    """(input, target) in words; of one row what is given and what is predicted."""
    words = Words().pieces
    if objective.paired:
        return " ".join(words(example["inputs_BI"])), " ".join(words(example["targets_BL"]))
    return " ".join(words(example["tokens_BL"])), " ".join(words(example["targets_BL"][example["weights_BL"] > 0]))


# --- golden examples ---

WHOLE = "Thank you for inviting me to your party last week . </s>"
GOLDEN = {  # one word of bert_style is replaced at random
    "prefix_lm": ("Thank you for inviting me to your party last </s>", "week . </s>"),
    "bert_style": ("Thank you for inviting <mask> party your party last <mask> . </s>", WHOLE),
    "mass_style": ("Thank you for inviting <mask> <mask> your party last <mask> . </s>", WHOLE),
    "deshuffling": ("me to week for party last . inviting you Thank your </s>", WHOLE),
    "iid_spans": ("Thank you for inviting <0> your party last <1> . </s>", "<0> me to <1> week </s>"),
    "drop_tokens": ("Thank you for inviting your party last . </s>", "me to week </s>"),
    "replace_spans": ("Thank you for inviting me to your party <0> </s>", "<0> last week . </s>"),
}


def golden(variant):
    objective = build(denoising.Config(variant=variant, rate=0.3, random_share=0.3, input_length=16), length=16)
    (example,) = make(objective, key=(2, "doc", 0))
    assert shown(objective, example) == GOLDEN[variant]
    np.testing.assert_array_equal(example["tokens_BL"], [Words.pad_id, *example["targets_BL"][:-1]])
    assert example["weights_BL"].tolist() == [1] * len(example["targets_BL"])


@pytest.mark.parametrize("variant", denoising.VARIANTS)
def test_golden(variant):
    golden(variant)


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_golden(kind):
    """One row has the text's ends, two rows an end each; the last token of the prefix predicts the first word of the rest."""
    objective = build(prefix.Config(share=0.5), kind=kind)
    (example,) = make(objective)
    assert objective.heads == (("mlm",) if kind == "encoder" else ("lm",))
    if kind == "encoder_decoder":
        assert shown(objective, example) == ("Thank you for inviting me to </s>", "your party last week . </s>")
    else:
        assert shown(objective, example) == ("<s> Thank you for inviting me to your party last week .", "your party last week . </s>")
        assert example["prefix_BL"].tolist() == [1] * 7 + [0] * 5 and example["weights_BL"].tolist() == [0] * 6 + [1] * 6
        assert objective.mask == "prefix" and objective.packing == "first_fit"
        (plain,) = make(build(prefix.Config(share=0.5, boundaries=False), kind=kind))
        assert " ".join(Words().pieces([*plain["tokens_BL"], plain["targets_BL"][-1]])) == WHOLE.removesuffix(" </s>")


def test_one_row_of_a_decoder_golden():
    """Between input and target stands an end, but for a text that goes on."""
    for variant, expected in (
        ("drop_tokens", ("Thank you for inviting your party last . </s> me to week", "me to week </s>")),
        ("prefix_lm", ("Thank you for inviting me to your party last week .", "week . </s>")),
    ):
        objective = build(denoising.Config(variant=variant, rate=0.3), kind="decoder")
        (example,) = make(objective, key=(2, "doc", 0))
        assert shown(objective, example) == expected


UL2_GOLDEN = {  # <5> stands for R, <6> for S, <7> for X; by seed
    "encoder_decoder": {
        0: ("<7> Thank you for inviting <0> party <1> </s>", "<0> me to your <1> last week . </s>"),
        1: ("<5> Thank you for inviting me to your party last <0> </s>", "<0> week . </s>"),
        4: ("<6> Thank you for inviting me to your party </s>", "last week . </s>"),
    },
    "decoder": {
        0: ("<7> Thank you for inviting <0> party <1> </s> <0> me to your <1> last week .", "<0> me to your <1> last week . </s>"),
        1: ("<5> Thank you for inviting me to your party last <0> </s> <0> week .", "<0> week . </s>"),
        4: ("<6> Thank you for inviting me to your party last week .", "last week . </s>"),
    },
}


@pytest.mark.parametrize("kind", UL2_GOLDEN)
def test_ul2_golden(kind):
    length = 16 if kind == "encoder_decoder" else 24
    objective = build(ul2.Config(mean_spans=(3.0, 3.0), rates=(0.15, 0.5), weights=(0.4, 0.3), input_length=16), kind=kind, length=length)
    whole = build(denoising.Config(input_length=16), kind=kind)
    for seed, expected in UL2_GOLDEN[kind].items():
        (example,) = make(objective, key=(seed, "doc", 0))
        assert shown(whole, example) == expected
        assert set(example["part_BL"].tolist()) == {"5": {0}, "7": {1}, "6": {2}}[expected[0][1]]


# --- what becomes of a text ---


def whole_text(variant, inputs, targets, sentinels):
    """The text that an input and its target stand for, both without their ends; for deshuffling and the masks after checking what the input kept."""
    if variant == "prefix_lm":
        return [*inputs, *targets]
    if variant == "deshuffling":
        assert sorted(inputs) == sorted(targets)
        return targets
    if variant in ("bert_style", "mass_style"):
        assert len(inputs) == len(targets)
        return targets
    spans, current = {}, None
    for token in targets:
        current = token if token in sentinels else current
        spans.setdefault(current, []).append(token)
    assert list(spans) == list(sentinels[: len(spans)]) == [t for t in inputs if t in sentinels], "sentinels come in order, the same on both sides"
    assert all(len(span) > 1 for span in spans.values()), "no span is empty"
    return [t for token in inputs for t in (spans[token][1:] if token in spans else [token])]


def halves(objective, example):
    """(input, target) of an example without mode and ends."""
    if objective.paired:
        return example["inputs_BI"].tolist()[:-1], example["targets_BL"].tolist()[:-1]
    row = [*example["tokens_BL"].tolist(), int(example["targets_BL"][-1])]
    first = int(np.flatnonzero(example["weights_BL"])[0]) + 1
    assert first == example["prefix_BL"].sum()
    separated = objective.config.variant != "prefix_lm"
    assert not separated or row[first - 1] == objective.tokenizer.eos_id
    return row[: first - separated], row[first:-1]


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), rate=st.floats(0.01, 0.95), mean_span=st.floats(1.0, 40.0))
def test_input_and_target_fit_their_rows_and_hold_the_text(kind, data, seed, rate, mean_span):
    variant = data.draw(st.sampled_from(list(denoising.VARIANTS)))
    sizes = data.draw(st.tuples(st.integers(16, 300), st.integers(16, 300)))
    share = data.draw(st.one_of(st.none(), st.floats(0.0, 1.0)))
    config = denoising.Config(variant=variant, rate=rate, mean_span=mean_span, input_length=sizes[0], prefix_share=share)
    objective = build(config, kind=kind, tokenizer=Numbers(), length=sizes[1])
    tokens = np.random.default_rng(seed).permutation(np.arange(8, 1300))[: data.draw(st.sampled_from([2, 3, objective.raw_length // 2, objective.raw_length]))]
    if len(tokens) < 2:
        return
    (example,) = make(objective, tokens, key=(seed,) * 3)
    assert all(len(value) <= objective.lengths[name[-1]] for name, value in example.items())
    inputs, targets = halves(objective, example)
    if variant == "drop_tokens":
        assert sorted([*inputs, *targets]) == sorted(tokens)
        for part in (inputs, targets):
            assert part == [t for t in tokens if t in set(part)], "both keep the order"
        assert len(targets) == config.noise(len(tokens))
    else:
        assert whole_text(variant, inputs, targets, Numbers.sentinels) == tokens.tolist()
    assert kind == "decoder" or config.noise(len(tokens)) == (np.array(inputs) == Numbers.mask_id).sum() or variant != "mass_style"


@pytest.mark.parametrize("variant", ["bert_style", "mass_style", "deshuffling", "drop_tokens", "replace_spans", "prefix_lm"])
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder"])
def test_raw_length_is_the_longest_that_fits(kind, variant):
    """One token more would not; i.i.d. spans keep room for the most runs."""
    objective = build(denoising.Config(variant=variant, input_length=100, prefix_share=0.7), kind=kind, tokenizer=Numbers(), length=80)
    limits = (100, 80) if kind == "encoder_decoder" else (None, 80)
    for tokens, fits in ((objective.raw_length, True), (objective.raw_length + 1, False)):
        (example,) = make(objective, np.arange(8, 8 + tokens))
        assert (len(example["targets_BL"]) <= limits[1] and (kind == "decoder" or len(example["inputs_BI"]) <= limits[0])) == fits


@pytest.mark.parametrize("variant", ["iid_spans", "drop_tokens", "mass_style", "bert_style"])
def test_rate_of_tokens_chosen_one_by_one(variant):
    """Exactly the rate of each piece; every place equally often; runs as long as chance makes them."""
    length, rate, count = 200, 0.15, 400
    objective = build(denoising.Config(variant=variant, rate=rate, random_share=0.1), tokenizer=Numbers(), length=256, packing="none")
    objective.raw_length = None
    tokens, places, runs, kept, masked = np.arange(8, 208), np.zeros(length), [], 0, 0
    for seed in range(count):
        inputs, _ = objective.pair(tokens, keyed_rng(seed))
        if variant in ("iid_spans", "drop_tokens"):
            chosen = ~np.isin(tokens, inputs)
        else:
            chosen, masked = inputs != tokens, masked + (inputs == Numbers.mask_id).sum()
            kept += 30 - chosen.sum()
        assert chosen.sum() == 30 or variant == "bert_style" and chosen.sum() > 27
        places += chosen
        runs.append((chosen & ~np.r_[False, chosen[:-1]]).sum())
    np.testing.assert_allclose(places, count * rate, atol=5 * (count * rate * (1 - rate)) ** 0.5)
    assert np.mean(runs) == pytest.approx(30 * 171 / 200, rel=0.02)
    if variant == "bert_style":
        assert masked / (30 * count) == pytest.approx(0.9, abs=5 * (0.09 / (30 * count)) ** 0.5) and kept < 30
    if variant == "mass_style":
        assert masked == 30 * count


@pytest.mark.parametrize(("rate", "mean_span"), [(0.15, 3.0), (0.5, 8.0), (0.15, 64.0)])
def test_mean_length_of_spans(rate, mean_span):
    objective = build(denoising.Config(rate=rate, mean_span=mean_span, input_length=600), tokenizer=Numbers(), length=600)
    inputs, targets = objective.pair(np.arange(8, 520), keyed_rng(0))
    spans = np.isin(inputs, Numbers.sentinels).sum()
    corrupted = len(targets) - spans
    assert corrupted == round(512 * rate) and corrupted / spans == pytest.approx(mean_span, rel=0.25 if mean_span == 64 else 0.03)


@pytest.mark.parametrize("config", [prefix.Config(), denoising.Config(variant="prefix_lm")])
def test_splits_are_equally_likely(config):
    objective, counts = build(config), collections.Counter()
    for seed in range(2000):
        inputs, targets = objective.pair(SENTENCE, keyed_rng(seed))
        counts[len(inputs)] += 1
        assert [*inputs, *targets] == SENTENCE.tolist()
    assert set(counts) == set(range(1, len(SENTENCE))) and all(abs(count - 200) < 5 * 180**0.5 for count in counts.values())


def test_ul2_denoisers_and_their_shares():
    """Table 1 of the paper; the pieces of a long text are drawn by weight, each as long as its denoiser can use, and together they are the text."""
    config = ul2.Config(input_length=64)
    assert [(mode, weight) for mode, weight, _ in config.denoisers()] == [("r", 0.165)] * 2 + [("x", 0.0825)] * 4 + [("s", 0.34)]
    objective = build(config, tokenizer=Numbers(), length=64)
    examples = make(objective, np.random.default_rng(0).integers(8, 1300, 200_000))
    modes = dict(zip(ul2.MODES, Numbers.sentinels[-3:]))
    found = collections.Counter(int(example["inputs_BI"][0]) for example in examples)
    for mode, share in (("r", 0.33), ("x", 0.33), ("s", 0.34)):
        assert abs(found[modes[mode]] / len(examples) - share) < 5 * (share * (1 - share) / len(examples)) ** 0.5
    text = []
    for example in examples:
        assert len(example["inputs_BI"]) <= 64 and len(example["targets_BL"]) <= 64
        inputs, targets = example["inputs_BI"].tolist(), example["targets_BL"].tolist()
        variant = "prefix_lm" if inputs[0] == modes["s"] else "replace_spans"
        text += whole_text(variant, inputs[1:-1], targets[:-1], Numbers.sentinels)
    np.testing.assert_array_equal(text, np.random.default_rng(0).integers(8, 1300, 200_000)[: len(text)])
    assert len(text) > 199_900


def test_ul2_mode_tokens_are_pieces_where_the_vocabulary_has_them():
    class Modes(Words):
        def pieces(self, ids):
            return [{5: "[NLU]", 6: "[NLG]", 7: "[S2S]"}.get(i, piece) for i, piece in zip(map(int, ids), super().pieces(ids))]

    assert ul2.mode_tokens(Modes()) == ({"r": 5, "x": 6, "s": 7}, 0)
    assert ul2.mode_tokens(Words()) == (dict(zip("rsx", Words.sentinels[-3:])), 3)
    unmarked = build(ul2.Config(mode_tokens=False, mean_spans=(), rates=(), weights=()))
    assert Words().pieces(make(unmarked)[0]["inputs_BI"])[0] == "Thank"


def flat(examples):
    return [{name: value.tolist() for name, value in example.items()} for example in examples]


CONFIGS = {
    **{variant: denoising.Config(variant=variant, input_length=60) for variant in denoising.VARIANTS},
    "prefix": prefix.Config(input_length=60),
    "ul2": ul2.Config(input_length=60, mean_spans=(3.0, 8.0), rates=(0.15, 0.5), weights=(1.0, 1.0), prefix_share=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_pure_in_seed_id_and_visit(name):
    objective = build(CONFIGS[name], tokenizer=Numbers(), length=60)
    tokens = np.arange(8, 58)
    first = flat(make(objective, tokens, key=(0, "a", 0)))
    assert flat(make(objective, tokens, key=(0, "a", 0))) == first
    assert all(flat(make(objective, tokens, key=key)) != first for key in ((1, "a", 0), (0, "b", 0), (0, "a", 1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_without_two_parts_give_nothing(name):
    assert not make(build(CONFIGS[name], tokenizer=Numbers()), [9]) and not make(build(CONFIGS[name], tokenizer=Numbers()), [])


@pytest.mark.parametrize(
    ("make_it", "parts"),
    [
        (lambda: build(denoising.Config(), packing="concat"), ["data.packing=concat", "default, first_fit, none"]),
        (lambda: build(ul2.Config(), tokenizer=Numbers(), packing="window"), ["data.packing=window"]),
        (lambda: build(denoising.Config(variant="iid_spans")), ["needs a tokenizer with pad, eos and", "--config.tokenizer.sentinels="]),
        (lambda: build(ul2.Config(input_length=32, rates=(0.3,), mean_spans=(1.0,), weights=(1.0,))), ["objective denoising", "sentinels"]),
        (lambda: build(denoising.Config(input_length=4), length=2), ["no text fits objective.input_length=4 and data.length=2"]),
        (lambda: build(denoising.Config(), length=3, kind="decoder"), ["no text fits data.length=3; make it longer"]),
        (lambda: prefix.Config(counted="all").check("objective"), ["objective.counted=all", "would predict tokens that are seen", "mask=causal"]),
        (lambda: ul2.Config(rates=(0.1,)).check("objective"), ["objective.rates has 1", "objective.mean_spans has 6"]),
        (lambda: ul2.Config(rates=(0.1,) * 5 + (1.0,)).check("objective"), ["rate=1.0 leaves nothing to predict from"]),
        (lambda: ul2.Config(weights=(0.0,) * 6, prefix_weight=0.0).check("objective"), ["leave no denoiser"]),
    ],
)  # fmt: skip
def test_refused(make_it, parts):
    with pytest.raises(ConfigError) as error:
        make_it()
    assert all(part in str(error.value) for part in parts), str(error.value)


# --- what the model sees ---

MODELS = [("gpt", "prefix"), ("gpt", "ul2"), ("bert", "prefix"), ("t5", "denoising"), ("t5", "ul2")]
ONE_ROW = [(family, name) for family, name in MODELS if family != "t5"]


@functools.cache
def states(family, name):
    """A compiled function from a batch to its hidden states."""
    objective = zoo.objective(name, family)
    made, params = zoo.model(family, heads=objective.heads), zoo.params(family, heads=objective.heads)
    return zoo.jit(lambda batch: made.hidden(params, batch, mask=objective.mask).hidden_BLD)


@pytest.mark.parametrize(("family", "name"), ONE_ROW)
def test_no_prediction_sees_its_target(family, name):
    """Another token in the place of a target changes no state that predicts it or that comes before; one in the prefix changes the whole prefix."""
    batch = zoo.batch(name, family)
    before = np.asarray(states(family, name)(batch))
    tokens, weights, segments, given = (np.asarray(batch[field]) for field in ("tokens_BL", "weights_BL", "segments_BL", "prefix_BL"))

    def changed(row, place):
        return batch | {"tokens_BL": jnp.asarray(tokens).at[row, place].set(9 if tokens[row, place] == 8 else 8)}

    rows = np.flatnonzero(weights.sum(axis=1) > 1)
    for row in rows:
        predicts = np.flatnonzero(weights[row])
        for place in predicts[predicts + 1 < (segments[row] > 0).sum()]:
            if segments[row, place + 1] != segments[row, place]:
                continue
            after = np.asarray(states(family, name)(changed(row, place + 1)))
            same = (segments[row] != segments[row, place]) | (np.arange(zoo.LENGTH) <= place)
            np.testing.assert_array_equal(after[row, same], before[row, same])
            assert (after[row, place + 1] != before[row, place + 1]).any()
    row = rows[0]
    prefix_places = np.flatnonzero(given[row] * (segments[row] == 1))
    after = np.asarray(states(family, name)(changed(row, prefix_places[-1])))
    assert (after[row, prefix_places] != before[row, prefix_places]).any(axis=-1).all(), "the prefix sees itself whole"


def test_a_row_that_counts_its_input_is_causal():
    objective = build(prefix.Config(mask="causal", counted="all"), kind="decoder")
    (example,) = make(objective)
    assert objective.mask == "causal" and "prefix_BL" not in example and example["weights_BL"].all()


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize(("family", "name"), MODELS)
def test_microbatches_give_the_gradient_of_the_whole_batch(family, name, microbatches):
    batch = zoo.batch(name, family)
    assert 0 in np.asarray(batch["weights_BL"]).sum(axis=1)
    step, params = zoo.gradients(family, name, microbatches=microbatches)
    loss, grads = step(params, batch)
    expected_loss, expected_grads = zoo.reference(family, name)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected_grads)


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_loss_is_unchanged_by_padding(family, name):
    objective, made = zoo.objective(name, family), zoo.model(family, heads=zoo.objective(name, family).heads)
    batch = zoo.batch(name, family, extra_rows=2, extra_length=8)
    totals = zoo.jit(lambda p, b: objective.loss(made, p, b, rng=None, carry=None, train=False)[0])(zoo.params(family, heads=objective.heads), batch)
    np.testing.assert_allclose(state.weighted_sum(objective, totals, objective.weights(batch)), zoo.reference(family, name)[0], rtol=1e-6)


# --- mutations: the tests above see a fault ---


def test_a_lost_span_is_seen(monkeypatch):
    original = span_corruption.replace
    monkeypatch.setattr(span_corruption, "replace", lambda *args: (original(*args)[0], original(*args)[1][:-1]))
    with pytest.raises(AssertionError):
        golden("replace_spans")


def test_a_prefix_that_is_too_long_is_seen(monkeypatch):
    """Its last place would show the first word that it predicts."""
    batch = zoo.batch("prefix", "gpt")
    given = np.asarray(batch["prefix_BL"])
    longer = np.maximum(given, np.roll(given, 1, axis=1) * (np.asarray(batch["segments_BL"]) > 0))
    monkeypatch.setattr(zoo, "batch", lambda *_: batch | {"prefix_BL": jnp.asarray(longer)})
    with pytest.raises(AssertionError):
        test_no_prediction_sees_its_target("gpt", "prefix")
