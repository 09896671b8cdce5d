"""NSP, SOP and the input formats of RoBERTa: readable golden examples, round trips of sentences, labels, rows, and the loss of pairs."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm import state, text
from ptm.config import Data
from ptm.data.batch import Document, keyed_rng
from ptm.data.loader import Loader
from ptm.data.pack import Cursor, Layout, make_packer
from ptm.fields import ConfigError
from ptm.nn.stack import Output
from ptm.objectives import pairs

ENCODER = types.SimpleNamespace(kind="encoder")
WORDS = ["dog", "ran", "it", "was", "fast", "the", "cat", "slept", "she", "warm", "rain", "fell", "road", "wet", "a", "bus", "came", "we", "got", "in"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
STORY = "The dog ran. It was fast. The cat slept. She was warm."
OTHER = "Rain fell. The road was wet. A bus came. We got in."
FORMATS = [(task, format) for format in pairs.PAIRED for task in ("nsp", "sop", "none")] + [("none", "full_sentences"), ("none", "doc_sentences")]


class Numbered(zoo.Vocabulary):
    """Token 10000 d + 100 n + k is the k-th of sentence n = 1, 2, ... of document d: where a token comes from can be read off it."""

    vocab_size = 50_000
    token_bytes = np.ones(50_000, np.int32)

    def sentence_starts(self, ids):
        return np.asarray(ids) % 100 == 0


def numbered(document: int, sizes: list[int]) -> Document:
    tokens = np.concatenate([10_000 * document + 100 * (n + 1) + np.arange(size) for n, size in enumerate(sizes)])
    return Document(f"d{document}", tokens.astype(np.int32))


OTHERS = [numbered(d, [3, 5, 2, 4] * 5) for d in (1, 2, 3)]


def any_other(rng):
    return OTHERS[rng.integers(len(OTHERS))]


@functools.cache
def build(*, length, packing="default", **options):
    return pairs.Pairs(pairs.Config(**options), tokenizer=Numbered(), length=length, packing=packing, model_config=ENCODER)


def make(objective, doc, *, seed=0, visit=0, draw=any_other):
    return list(objective.features(doc, rng=keyed_rng(seed, doc.id, visit), draw=draw))


def parts(example, vocabulary=Numbered):
    """The texts of a framed example, its frame checked."""
    ids, ends = example["targets_BL"], np.flatnonzero(example["targets_BL"] == vocabulary.sep_id)
    assert ids[0] == vocabulary.cls_id and ends[-1] == len(ids) - 1
    return [ids[start + 1 : end] for start, end in zip([0, *ends], ends)]


# --- golden examples ---


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A WordPiece vocabulary of the words of two stories."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return text.make("wordpiece", path=str(path), lowercase=True)


# What the model reads (segments and types by their frames), what it must say at the chosen places, the label.
GOLDEN = {
    ("nsp", "segment_pair", 1): [  # sentences that made room for a random B are used again
        ("[CLS] the dog ran . [SEP] road was wet . [MASK] bus came . we got [MASK] . [SEP]", "a in", 1),
        ("[CLS] it [MASK] fast . the cat slept [MASK] [SEP] we got in . [SEP]", "was .", 1),
        ("[CLS] she was warm cat [SEP] road was wet . a bus came . we got in [MASK] [SEP]", ". .", 1),
    ],
    ("nsp", "segment_pair", 2): [("[CLS] the dog ran . it was [MASK] . [SEP] the cat [MASK] . she was warm . [SEP]", "fast slept", 0)],
    ("sop", "segment_pair", 0): [("[CLS] the cat slept . she was [MASK] . [SEP] the ran ran . it was fast . [SEP]", "warm dog", 1)],
    ("nsp", "sentence_pair", 2): [
        ("[CLS] the dog ran . [SEP] [MASK] road was wet . [SEP]", "the", 1),
        ("[CLS] it was fast . [SEP] the cat slept [MASK] [SEP]", ".", 0),
        ("[CLS] she was warm . [SEP] a bus [MASK] . [SEP]", "came", 1),
    ],
    ("none", "segment_pair", 1): [("[CLS] the dog ran . [SEP] it was [MASK] . the cat slept [MASK] she was warm . [SEP]", "fast .", None)],
}


@pytest.mark.parametrize(("task", "format", "seed"), list(GOLDEN))
def test_golden_pairs(words, task, format, seed):
    objective = pairs.Pairs(pairs.Config(task=task, format=format, short_prob=0.0), tokenizer=words, length=19, packing="default", model_config=ENCODER)
    doc, other = Document("story", words.encode(STORY)), Document("other", words.encode(OTHER))
    found = []
    for example in make(objective, doc, seed=seed, draw=lambda rng: other):
        said = words.pieces(example["targets_BL"][example["weights_BL"] > 0])
        found.append((" ".join(words.pieces(example["tokens_BL"])), " ".join(said), example["pair_label_B"].item() if task != "none" else None))
        ends = np.flatnonzero(example["targets_BL"] == words.sep_id)
        assert example["types_BL"].tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0])
    assert found == GOLDEN[task, format, seed]


# Documents of 4 + 4, 3 + 5 and 4 tokens in rows of 16: what stands in a row, its segments and positions.
SENTENCES_GOLDEN = {
    "full_sentences": [
        ("[CLS] the dog ran . it was fast . [SEP] we got in . [SEP]", [1] * 15, list(range(15))),
        ("[CLS] rain fell . the road was wet . [SEP]", [1] * 10, list(range(10))),
    ],
    "doc_sentences": [
        ("[CLS] the dog ran . it was fast . [SEP] [CLS] we got in . [SEP]", [1] * 10 + [2] * 6, [*range(10), *range(6)]),
        ("[CLS] rain fell . the road was wet . [SEP]", [1] * 10, list(range(10))),
    ],
}


def packed(objective, docs, *, bins=4):
    """The finished rows of documents, in the packing that the objective wants."""
    layout = Layout(objective)
    packer = make_packer(objective.packing, layout=layout, cursor=Cursor(lambda n: iter(make(objective, docs[n])), count=len(docs)), bins=bins)
    rows = []
    while (row := packer.next_row()) is not None:
        rows.append(objective.finish(row.arrays))
    return rows


@pytest.mark.parametrize("format", list(SENTENCES_GOLDEN))
def test_golden_rows_of_sentences(words, format):
    objective = pairs.Pairs(pairs.Config(task="none", format=format), tokenizer=words, length=16, packing="default", model_config=ENCODER)
    stories = ("The dog ran. It was fast.", "Rain fell. The road was wet.", "We got in.")
    rows = packed(objective, [Document(story, words.encode(story)) for story in stories])
    assert "types_BL" not in rows[0] and objective.heads == ("mlm",)
    found = []
    for row in rows:
        real = row["segments_BL"] > 0
        found.append((" ".join(words.pieces(row["targets_BL"][real])), row["segments_BL"][real].tolist(), row["positions_BL"][real].tolist()))
    assert found == SENTENCES_GOLDEN[format]


# --- sentences are kept ---

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=40)
ROWS = st.integers(5, 64)


def check_order(objective, doc, given):
    """The texts come in the order of the document; nothing between them is lost but what a pair was cut by to fill its row: never of its shorter text."""
    place = {token: n for n, token in enumerate(doc.tokens_L.tolist())}
    at, lossy = 0, False
    for example, used in given:
        longest = max(map(len, parts(example)))
        for part in used:
            full = len(example["targets_BL"]) == objective.lengths["L"] and len(part) >= longest - 1
            indices = [place[token] for token in part.tolist()]
            assert indices == list(range(indices[0], indices[0] + len(part))), "a text is consecutive"
            assert indices[0] == at or indices[0] > at and (full or lossy), "no token is lost or used twice"
            at, lossy = indices[-1] + 1, full
    assert at == len(place) or lossy


@settings(max_examples=120, deadline=None)
@given(sizes=SIZES, length=ROWS, seed=st.integers(0, 99), task=st.sampled_from(["none", "sop"]), format=st.sampled_from(pairs.PAIRED))
def test_every_sentence_is_used_once(sizes, length, seed, task, format):
    """Also under sop, where swapped pairs are swapped back; without a partner a sentence stands alone and has no label."""
    objective, doc = build(length=length, task=task, format=format), numbered(0, sizes)
    used = []
    for example in make(objective, doc, seed=seed, draw=None):
        texts = parts(example)
        if task == "sop":
            assert (example["pair_label_B"] == pairs.NO_PAIR) == (len(texts) == 1)
            texts = texts[::-1] if example["pair_label_B"] == 1 else texts
        used.append((example, texts))
    check_order(objective, doc, used)
    alone = [example for example, texts in used if len(texts) == 1]
    assert task == "none" and format == "segment_pair" or len(alone) <= 1 and all(example is used[-1][0] for example in alone)


@settings(max_examples=120, deadline=None)
@given(sizes=SIZES, length=ROWS, seed=st.integers(0, 99), format=st.sampled_from(pairs.PAIRED))
def test_label_0_follows_and_label_1_is_of_another_document(sizes, length, seed, format):
    """A, and B where it follows, are the document; all others come from one other document, in consecutive sentences."""
    objective, doc = build(length=length, task="nsp", format=format), numbered(0, sizes)
    used = []
    for example in make(objective, doc, seed=seed):
        a, b = parts(example)
        assert example["pair_label_B"] in (0, 1)
        if example["pair_label_B"] == 1:
            (other,) = {token // 10_000 for token in b.tolist()}
            whole = OTHERS[other - 1].tokens_L.tolist()
            start = whole.index(b[0])
            assert b.tolist() == whole[start : start + len(b)]
            assert len(example["targets_BL"]) == length or b[0] % 100 == 0 or length < 13, "B begins a sentence, or was cut"
        used.append((example, [a] if example["pair_label_B"] == 1 else [a, b]))
    check_order(objective, doc, used)


def test_pairs_of_sentences_that_fill_their_rows_lose_nothing():
    """Sentences of 4 tokens, 16 a row: the texts joined are the document."""
    doc = numbered(0, [4] * 23)
    for seed in range(20):
        examples = make(build(length=19, task="none", short_prob=0.0), doc, seed=seed)
        assert [len(example["targets_BL"]) for example in examples] == [19] * 5 + [15]
        np.testing.assert_array_equal(np.concatenate([part for example in examples for part in parts(example)]), doc.tokens_L)
    splits = {len(parts(make(build(length=19, task="none", short_prob=0.0), doc, seed=seed)[0])[0]) for seed in range(60)}
    assert splits == {4, 8, 12}, "A ends after any sentence but the last"


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, length=st.integers(3, 64), format=st.sampled_from(["full_sentences", "doc_sentences"]))
def test_rows_of_sentences_reassemble(sizes, length, format):
    """All sentences once, none torn but those longer than a row; full rows hold several documents, doc rows keep them apart."""
    objective = build(length=length, task="none", format=format)
    docs = [numbered(d, sizes[d::5]) for d in range(5) if sizes[d::5]]
    rows = packed(objective, docs)
    found = []
    for row in rows:
        count = int((row["segments_BL"] > 0).sum())
        assert not row["targets_BL"][count:].any() and not row["weights_BL"][count:].any() and not row["positions_BL"][count:].any()
        segments = row["segments_BL"][:count]
        if format == "full_sentences":
            assert (segments == 1).all() and row["positions_BL"][:count].tolist() == list(range(count))
            framed = [{"targets_BL": row["targets_BL"][:count]}]
        else:
            framed = [{"targets_BL": row["targets_BL"][:count][segments == n]} for n in range(1, segments.max() + 1)]
            assert all(len(parts(example)) == 1 for example in framed)
        for example in framed:
            for part in parts(example):
                assert len(set((part // 10_000).tolist())) == 1, "one document between two separators"
                assert (part[0] % 100) % (length - 2) == 0, "begins where a sentence does, or a piece of one that is longer than a row"
                found += part.tolist()
    assert sorted(found) == sorted(np.concatenate([doc.tokens_L for doc in docs]).tolist())


def test_full_rows_cross_documents():
    docs = [numbered(d, [5, 6]) for d in range(5)]
    rows = packed(build(length=32, task="none", format="full_sentences"), docs)
    assert [len(parts({"targets_BL": row["targets_BL"][row["segments_BL"] > 0]})) for row in rows] == [2, 2, 1]
    assert len(packed(build(length=32, task="none", format="doc_sentences", packing="none"), docs)) == 5


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, length=ROWS, seed=st.integers(0, 99), task_format=st.sampled_from(FORMATS), unit=st.sampled_from(["token", "whole_word", "span", "ngram"]))
def test_examples_keep_to_the_row_and_to_their_frames(sizes, length, seed, task_format, unit):
    task, format = task_format
    objective = build(length=length, task=task, format=format, unit=unit, rate=0.3)
    for example in make(objective, numbered(0, sizes), seed=seed):
        assert example.keys() == objective.fields.keys()
        assert 0 < len(example["targets_BL"]) <= length
        texts = parts(example)
        assert len(texts) <= (2 if format in pairs.PAIRED else 1) and all(len(part) for part in texts)
        special = np.isin(example["targets_BL"], [Numbered.cls_id, Numbered.sep_id])
        assert special.sum() == len(texts) + 1 and not example["weights_BL"][special].any() and example["weights_BL"].sum() >= 1
        unchosen = example["weights_BL"] == 0
        np.testing.assert_array_equal(example["tokens_BL"][unchosen], example["targets_BL"][unchosen])
        if format in pairs.PAIRED:
            assert example["types_BL"].tolist() == [0] * (len(texts[0]) + 2) + [1] * sum(len(part) + 1 for part in texts[1:])


# --- shares ---


def share_is(hits, share, count):
    return abs(hits - share * count) < 5 * (share * (1 - share) * count) ** 0.5


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize(("task", "format"), FORMATS[:2] + FORMATS[3:5])
def test_share_of_label_1(task, format, share):
    """Of documents with sentences enough; the other document is never the same one, and each is as likely."""
    objective, doc, count = build(length=24, task=task, format=format, random_prob=share, short_prob=0.0), numbered(0, [6] * 4), 600
    drawn = [*OTHERS, doc]
    first = [make(objective, doc, seed=seed, draw=lambda rng: drawn[rng.integers(4)])[0] for seed in range(count)]
    labels = np.array([example["pair_label_B"] for example in first])
    assert set(labels.tolist()) == {0, 1} and share_is(labels.sum(), share, count)
    if task == "nsp":
        sources = [parts(example)[1][0] // 10_000 for example in first if example["pair_label_B"] == 1]
        assert all(share_is(sources.count(n), 1 / 3, len(sources)) for n in (1, 2, 3))


def test_share_and_lengths_of_short_targets():
    """Sentences of one token: the first pair has as many tokens as the target."""
    doc = numbered(0, [1] * 80)
    for share in (0.0, 0.4, 1.0):
        sizes = np.array([sum(map(len, parts(make(build(length=23, task="none", short_prob=share), doc, seed=seed)[0]))) for seed in range(400)])
        assert sizes.min() >= 2 and sizes.max() == 20
        assert share_is((sizes < 20).sum(), share * 18 / 19, 400) if share else (sizes == 20).all()
    counts = np.bincount(sizes, minlength=21)[2:]
    assert all(share_is(count, 1 / 19, 400) for count in counts), "each length from 2 to the whole room is as likely"


def test_a_pair_that_is_too_long_loses_tokens_of_the_longer_text_at_both_ends():
    a, b = (pairs.Segment(np.arange(size), np.ones(size, bool)) for size in (12, 4))
    fronts = []
    for seed in range(300):
        cut_a, cut_b = pairs.truncated(a, b, room=10, rng=keyed_rng(seed))
        assert (len(cut_a.tokens_L), len(cut_b.tokens_L)) == (6, 4)
        fronts.append(cut_a.tokens_L[0])
        np.testing.assert_array_equal(cut_a.tokens_L, np.arange(fronts[-1], fronts[-1] + 6))
    np.testing.assert_allclose(np.bincount(fronts, minlength=7) / 300, np.array([1, 6, 15, 20, 15, 6, 1]) / 64, atol=0.08)
    for sizes, room, kept in [((9, 9), 7, (4, 3)), ((2, 9), 7, (2, 5)), ((9, 3), 7, (4, 3)), ((3, 3), 7, (3, 3)), ((5, 0), 4, (4, 0))]:
        made = pairs.truncated(*(pairs.Segment(np.arange(n), np.ones(n, bool)) for n in sizes), room=room, rng=keyed_rng(0))
        assert tuple(len(part.tokens_L) for part in made) == kept


def test_masking_rate_of_pairs():
    for task, format in FORMATS:
        objective = build(length=40, task=task, format=format, rate=0.2)
        examples = [example for seed in range(60) for example in make(objective, numbered(0, [7] * 20), seed=seed)]
        rates = [example["weights_BL"].sum() / sum(map(len, parts(example))) for example in examples]
        assert np.mean(rates) == pytest.approx(0.2, abs=0.01)


# --- documents that have too few sentences, or are long ---


@pytest.mark.parametrize(("task", "labels"), [("nsp", [1, 1]), ("sop", [-1]), ("none", None)])
def test_documents_of_one_sentence_are_not_lost(task, labels):
    examples = make(build(length=40, task=task), numbered(0, [5]))
    assert len(examples) == 1 and parts(examples[0])[0].tolist() == [100, 101, 102, 103, 104]
    assert labels is None or examples[0]["pair_label_B"] == labels[0]
    assert len(parts(examples[0])) == (2 if task == "nsp" else 1)
    assert examples[0]["weights_BL"].sum() >= 1


def test_text_without_sentences_is_cut_to_pairs():
    doc = Document("flat", np.arange(101, 200, dtype=np.int32))
    examples = make(build(length=23, task="sop", short_prob=0.0), doc)
    assert [sum(map(len, parts(example))) for example in examples] == [20, 20, 20, 20, 19]
    assert all(example["pair_label_B"] in (0, 1) for example in examples)


def test_a_corpus_of_one_document_and_an_empty_document():
    """The random segment then comes from the document itself; its parts count as the same document."""
    doc = numbered(0, [4] * 9)
    for example in make(build(length=24), doc, draw=lambda rng: doc):
        assert all((part < 10_000).all() for part in parts(example))
    asked = []
    part = Document("d0#7", doc.tokens_L)
    make(build(length=24, random_prob=1.0), part, draw=lambda rng: asked.append(0) or Document("d0#3", OTHERS[0].tokens_L))
    assert len(asked) % pairs.TRIES == 0
    assert make(build(length=24), Document("empty", np.zeros(0, np.int32))) == []


def test_random_segments_of_long_documents_come_from_all_of_it():
    """Only a window is looked at; a random segment begins with a sentence, from the first to the last."""
    long = numbered(4, [5] * 95)
    objective = build(length=16, random_prob=1.0, format="sentence_pair")
    assert len(long.tokens_L) > 2 * pairs.WINDOW * 16
    starts = [b[0] for seed in range(800) for _, b in map(parts, make(objective, numbered(0, [6]), seed=seed, draw=lambda rng: long))]
    sentences = np.array(starts) % 10_000
    assert (sentences % 100 == 0).all()
    assert len(set(sentences.tolist())) > 85 and sentences.min() <= 300 and sentences.max() >= 9300


# --- randomness ---


def flat(examples):
    return [{name: value.tolist() for name, value in example.items()} for example in examples]


@pytest.mark.parametrize(("task", "format"), FORMATS)
def test_features_are_pure_in_seed_id_and_visit(task, format):
    objective, doc = build(length=30, task=task, format=format), numbered(0, [7] * 12)
    first = flat(make(objective, doc))
    assert flat(make(objective, doc)) == first
    assert flat(make(objective, doc, seed=1)) != first
    assert flat(make(objective, doc, visit=1)) != first
    assert flat(make(objective, Document("other", doc.tokens_L))) != first


@pytest.mark.parametrize(("visits", "different"), [(1, 1), (2, 2), (None, 4)])
def test_visits_through_the_loader(tmp_path, words, visits, different):
    """Pairs are static, of n copies (BERT's way), or new in each epoch; random segments come from the split."""
    (tmp_path / "stories.txt").write_text(f"{STORY}\n{OTHER}\n")
    objective = pairs.Pairs(pairs.Config(visits=visits), tokenizer=words, length=24, packing="default", model_config=ENCODER)
    data = Data(source=(f"text:{tmp_path}/stories.txt",), holdout=0.0, shuffle=False, prefetch=0)
    loader = Loader(data, featurizer=objective, tokenizer=words, seed=0, batch_size=1, streams=1)
    epochs = []
    while len(epochs) < 5:
        batch = next(loader)
        row = {name: batch[name][0].tolist() for name in ("tokens_BL", "types_BL", "pair_label_B")}
        begins = words.decode(batch["targets_BL"][0]).startswith("the dog ran")
        epochs += [[]] if begins else []
        epochs[-1].append(row)
    loader.close()
    assert len({str(epoch) for epoch in epochs[:4]}) == different


# --- the loss ---


class Table:
    """Token logits are the token's row of a table, pair logits the row of the first token plus the sum of the row's types: known by hand."""

    module = types.SimpleNamespace(context=types.SimpleNamespace(loss_chunk=1000, layout=None))

    def hidden(self, params, batch, *, mask, head, train, rng):
        assert (mask, head) == ("full", "mlm")
        return Output(hidden_BLD=params["table"][batch["tokens_BL"]] + jnp.sum(batch["types_BL"], axis=1)[:, None, None])

    def logits(self, params, hidden, *, head):
        assert hidden.ndim == (2 if head == "pair" else 3)
        return hidden @ params["pair"] if head == "pair" else hidden


def test_pair_loss_by_hand():
    """Cross entropy and hits of the real pairs alone, in float64; the tokens' terms as in mlm; weights of the batch alone."""
    objective = zoo.objective("pairs", "bert", pair_coefficient=0.5, z_loss=0.1, task="sop")
    batch = zoo.batch("pairs", "bert", pair_coefficient=0.5, z_loss=0.1, task="sop")
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in {"table": (zoo.VOCAB, zoo.VOCAB), "pair": (zoo.VOCAB, 2)}.items()}
    totals, aux, carry = zoo.jit(functools.partial(objective.loss, Table(), rng=None, carry=None, train=True))(params, batch)
    assert carry is None and set(totals) == set(objective.coefficients) == {"tokens", "z", "pair"} and objective.coefficients["pair"] == 0.5

    nll, hits, count = 0.0, 0, 0
    for row in range(8):
        label = int(batch["pair_label_B"][row])
        if label < 0:
            continue
        hidden = np.float64(params["table"])[int(batch["tokens_BL"][row, 0])] + float(batch["types_BL"][row].sum())
        logits = hidden @ np.float64(params["pair"])
        nll, hits, count = nll + np.log(np.exp(logits).sum()) - logits[label], hits + (logits.argmax() == label), count + 1
    assert count == 5 == int(batch["segments_BL"].any(axis=1).sum()) - 2, "a row of one sentence counts no more than padding"
    assert len(set(batch["pair_label_B"].tolist())) == 3
    np.testing.assert_allclose(totals["pair"], nll, rtol=1e-5)
    np.testing.assert_allclose(aux.ratios["pair_accuracy"], [hits, count])
    weights = objective.weights(batch)
    assert (float(weights["pair"]), float(weights["tokens"])) == (count, float(batch["weights_BL"].sum()))
    assert set(aux.ratios) == {"accuracy", "bits_per_byte", "pair_accuracy", "dropped_share"}
    assert float(totals["tokens"]) > 0


def test_a_batch_without_a_task_has_no_pair_term():
    objective = zoo.objective("pairs", "bert", task="none")
    assert set(objective.coefficients) == set(objective.weights(zoo.batch("pairs", "bert", task="none"))) == {"tokens"}
    assert objective.heads == ("mlm",) and zoo.objective("pairs", "bert").heads == ("mlm", "pair")


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_gradient_of_the_whole_batch(microbatches):
    """Rows with and without pairs, one of padding: each term has a weight of its own."""
    batch = zoo.batch("pairs", "bert")
    assert {float(part) for part in jnp.sum((batch["pair_label_B"] >= 0).reshape(-1, 2), axis=1)} == {1.0, 2.0}
    step, params = zoo.gradients("bert", "pairs", microbatches=microbatches)
    loss, grads = step(params, batch)
    expected_loss, expected_grads = zoo.reference("bert", "pairs")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    zoo.assert_equal_gradients(grads, expected_grads)
    assert np.abs(grads["pair_head"]["kernel"]).max() > 1e-3 and np.abs(grads["type_embed"]["embedding"][1]).max() > 1e-4


def test_loss_is_unchanged_by_padding():
    objective = zoo.objective("pairs", "bert")
    made, params = zoo.model("bert", heads=objective.heads), zoo.params("bert", heads=objective.heads)
    batch = zoo.batch("pairs", "bert", extra_rows=2, extra_length=8)
    totals = zoo.jit(lambda p, b: objective.loss(made, p, b, rng=None, carry=None, train=False)[0])(params, batch)
    np.testing.assert_allclose(state.weighted_sum(objective, totals, objective.weights(batch)), zoo.reference("bert", "pairs")[0], rtol=1e-6)


def test_a_batch_of_padding_gives_zero_and_no_nan():
    objective = zoo.objective("pairs", "bert")
    empty = zoo.stack([objective.finish(zoo.row([], objective.lengths, objective.fields)) for _ in range(8)])
    loss, grads = zoo.plain_gradients("bert", "pairs")[0](zoo.params("bert", heads=objective.heads), empty)
    assert float(loss) == 0.0 and all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_a_model_of_one_task_is_evaluated_on_the_other():
    """Same heads, same fields, same meaning of the labels: a step compiled for one takes the batches of the other."""
    nsp, sop = (zoo.objective("pairs", "bert", task=task) for task in ("nsp", "sop"))
    assert nsp.heads == sop.heads and nsp.coefficients == sop.coefficients
    batches = [zoo.batch("pairs", "bert", task=task) for task in ("nsp", "sop")]
    assert jax.tree.map(jnp.shape, batches[0]) == jax.tree.map(jnp.shape, batches[1])
    losses = [zoo.plain_gradients("bert", "pairs")[0](zoo.params("bert", heads=nsp.heads), batch)[0] for batch in batches]
    assert np.isfinite(losses).all() and losses[0] != losses[1]


# --- what is refused ---


@pytest.mark.parametrize(("task", "format"), [("nsp", "full_sentences"), ("sop", "doc_sentences")])
def test_formats_without_pairs_have_no_task(task, format):
    with pytest.raises(ConfigError, match=f"objective.task={task} needs pairs.*objective.task=none or objective.format=segment_pair or sentence_pair"):
        pairs.Config(task=task, format=format).check("objective")


def test_the_checks_of_mlm_hold_here_too():
    with pytest.raises(ConfigError, match="objective.rate=0.0 leaves nothing to predict"):
        pairs.Config(rate=0.0).check("objective")
    for task, format in FORMATS:
        pairs.Config(task=task, format=format).check("objective")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 4}, "data.length=4 leaves no room for a pair.*5 or more"),
        ({"length": 16, "packing": "first_fit"}, "data.packing=first_fit does not go with objective.format=segment_pair; allowed: default, none"),
        ({"length": 16, "packing": "none", "task": "none", "format": "full_sentences"}, "data.packing=none.*allowed: default, first_fit"),
        ({"length": 16, "packing": "window", "task": "none", "format": "doc_sentences"}, "data.packing=window.*allowed: default, first_fit, none"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_what_tokenizer_and_model_must_have():
    class Bare(zoo.Vocabulary):
        sep_id = None

    with pytest.raises(ConfigError, match="cls and sep"):
        pairs.Pairs(pairs.Config(), tokenizer=Bare(), length=16, packing="default", model_config=ENCODER)
    one_type = types.SimpleNamespace(kind="encoder", num_types=1)
    with pytest.raises(ConfigError, match="model.num_types=1 cannot tell A from B"):
        pairs.Pairs(pairs.Config(), tokenizer=zoo.Vocabulary(), length=16, packing="default", model_config=one_type)
    pairs.Pairs(pairs.Config(task="none", format="full_sentences"), tokenizer=zoo.Vocabulary(), length=16, packing="default", model_config=one_type)


# --- mutations: the tests above see a fault ---


def test_a_pair_that_is_not_swapped_back_is_seen():
    objective, doc = build(length=24, task="sop", random_prob=1.0), numbered(0, [5] * 8)
    examples = make(objective, doc)
    check_order(objective, doc, [(example, parts(example)[::-1]) for example in examples])
    with pytest.raises(AssertionError):
        check_order(objective, doc, [(example, parts(example)) for example in examples])


def test_sentences_that_are_not_put_back_are_seen():
    objective, doc = build(length=24, task="nsp", format="sentence_pair", random_prob=1.0), numbered(0, [5] * 8)
    used = [(example, parts(example)[:1]) for example in make(objective, doc)]
    check_order(objective, doc, used)
    with pytest.raises(AssertionError):
        check_order(objective, doc, used[::2])
