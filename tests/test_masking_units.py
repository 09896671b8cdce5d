"""Units of masking beyond tokens: n-grams (ALBERT), texts that no unit crosses, and Chinese words that come with a document."""

import itertools
import json
import logging
import os
import types

import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm import text
from ptm.config import Data
from ptm.data.batch import Document, keyed_rng
from ptm.data.documents import Corpus
from ptm.fields import ConfigError
from ptm.objectives import mlm

ENCODER = types.SimpleNamespace(kind="encoder")
ENGLISH = "Thank you for inviting me to your party last week."
ENGLISH_PIECES = ["thank", "you", "for", "invit", "##ing", "me", "to", "your", "part", "##y", "last", "week", "."]
CHINESE = "使用语言模型来预测下一个词的probability。"
CHINESE_WORDS = "使用 语言 模型 来 预测 下 一个 词 的 probability 。"
CHINESE_PIECES = [*"使用语言模型来预测下一个词的。", "pro", "##ba", "##bility", "##gas", "##庸", "##｜"]
# Shares of the lengths 1, 2, ... by the longest one.
NGRAMS = {3: np.array([6, 3, 2]) / 11, 5: np.array([60, 30, 20, 15, 12]) / 137}


def wordpiece(folder, pieces):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n", encoding="utf-8")
    return text.make("wordpiece", path=str(folder / "vocab.txt"), lowercase=True)


def build(tokenizer, *, length=64, **options):
    return mlm.MLM(mlm.Config(**options), tokenizer=tokenizer, length=length, packing="default", model_config=ENCODER)


def masked(objective, doc, *, seed):
    """What the model reads and what it must say at the chosen places."""
    (example,) = objective.features(doc, rng=keyed_rng(seed, doc.id, 0), draw=None)
    pieces = objective.tokenizer.pieces
    return " ".join(pieces(example["tokens_BL"])), " ".join(pieces(example["targets_BL"][example["weights_BL"] > 0]))


# --- n-grams ---


@pytest.mark.parametrize(
    ("seed", "read", "said"),
    [
        (1, "[CLS] thank you for [MASK] [MASK] me to your [MASK] [MASK] [MASK] week . [SEP]", "invit ##ing part ##y last"),
        (5, "[CLS] thank you for inviting me to [MASK] [MASK] [MASK] [MASK] [MASK] . [SEP]", "your part ##y last week"),
        (2, "[CLS] thank you for inviting [MASK] to [MASK] [MASK] [MASK] last week . [SEP]", "me your part ##y"),
    ],
)
def test_ngram_golden(tmp_path, seed, read, said):
    """A word and two words; three words; one word and two."""
    tokenizer = wordpiece(tmp_path, ENGLISH_PIECES)
    objective = build(tokenizer, unit="ngram", rate=0.35)
    assert masked(objective, Document("doc", tokenizer.encode(ENGLISH)), seed=seed) == (read.replace("inviting", "invit ##ing"), said)


@pytest.mark.parametrize("longest", list(NGRAMS))
def test_ngram_lengths_are_as_published(longest):
    """p(n) in proportion to 1/n (ALBERT, section 4.1), by choices that seldom meet."""
    config = mlm.Config(unit="ngram", rate=0.02, ngram_max=longest)
    lengths = []
    for seed in range(150):
        _, number = mlm.choose(2000, np.ones(2000, bool), config=config, rng=keyed_rng(seed))
        lengths += np.unique(number, return_counts=True)[1].tolist()
    shares = NGRAMS[longest]
    assert sum(shares) == pytest.approx(1) and max(lengths) == longest
    np.testing.assert_allclose(np.bincount(lengths, minlength=longest + 1)[1:] / len(lengths), shares, atol=0.035)


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_ngram_rate_is_exact_on_average(rate):
    length, counts = 101, []
    for doc in zoo.documents(800, length=length):
        starts = zoo.Vocabulary().word_starts(doc.tokens_L)
        counts.append(len(mlm.choose(length, starts, config=mlm.Config(unit="ngram", rate=rate), rng=keyed_rng(doc.id))[0]))
    assert abs(np.mean(counts) - rate * length) < 5 * np.std(counts) / len(counts) ** 0.5 < 0.6


def test_ngrams_are_of_whole_words_and_share_their_fate():
    """Replaced as one: all of an n-gram is masked, or random, or stays."""
    objective = build(zoo.Vocabulary(), length=300, unit="ngram", mask_share=0.5, random_share=0.0)
    for doc in zoo.documents(60, length=120):
        starts = zoo.Vocabulary().word_starts(doc.tokens_L)
        word = np.cumsum(starts)
        chosen, number = mlm.choose(120, starts, config=objective.config, rng=keyed_rng(0, doc.id, 0))
        assert set(np.flatnonzero(np.isin(word, word[chosen]))) == set(chosen)
        corrupted, _ = objective.corrupt(doc.tokens_L, starts, rng=keyed_rng(0, doc.id, 0))
        kept = corrupted == doc.tokens_L
        for n in set(number.tolist()):
            gram = chosen[number == n]
            assert len(set(kept[gram].tolist())) == 1
            assert (np.diff(gram) == 1).all() and len(set(word[gram].tolist())) <= 3


@settings(max_examples=100, deadline=None)
@given(length=st.integers(2, 60), data=st.data(), unit=st.sampled_from(["whole_word", "span", "ngram"]), seed=st.integers(0, 999))
def test_no_unit_crosses_a_break(length, data, unit, seed):
    """Also where the word goes on over it: two texts are two, whatever stands beside the cut."""
    cut = data.draw(st.integers(1, length - 1))
    starts = np.random.default_rng(seed).random(length) < 0.3
    chosen, number = mlm.choose(length, starts, config=mlm.Config(unit=unit, rate=0.5), rng=keyed_rng(seed), breaks=(cut,))
    assert len(chosen) and not set(number[chosen < cut].tolist()) & set(number[chosen >= cut].tolist())


# --- Chinese words ---


CHINESE_GOLDEN = {
    "whole_word": (5, "[CLS] 使 用 语 言 模 型 来 [MASK] [MASK] 下 [MASK] [MASK] [MASK] 的 pro ##ba ##bility 。 [SEP]", "预 测 一 个 词"),
    "ngram": (6, "[CLS] [MASK] [MASK] 语 言 模 型 来 预 测 下 [MASK] [MASK] [MASK] [MASK] pro ##ba ##bility 。 [SEP]", "使 用 一 个 词 的"),
}


@pytest.mark.parametrize("vocabulary", ["small", "published"])
@pytest.mark.parametrize("unit", list(CHINESE_GOLDEN))
def test_chinese_words_golden(tmp_path, vocabulary, unit):
    """The words of the column are masked as one, in BERT's vocabulary of single characters as in a small one."""
    if vocabulary == "published":
        if "PTM_DATA" not in os.environ:
            pytest.skip("set PTM_DATA to the folder of real data: published vocabularies are not part of the repository")
        tokenizer = text.make("wordpiece", path=os.path.join(os.environ["PTM_DATA"], "vocab/bert_chinese/vocab.txt"), lowercase=True)
    else:
        tokenizer = wordpiece(tmp_path, CHINESE_PIECES)
    objective, (seed, read, said) = build(tokenizer, unit=unit, rate=0.3), CHINESE_GOLDEN[unit]
    assert masked(objective, Document("zh", tokenizer.encode(CHINESE), {"words": CHINESE_WORDS}), seed=seed) == (read, said)


def grouped(tokenizer, string, words):
    """The pieces of a text with | before each word, by the words given; None where they do not fit."""
    ids = tokenizer.encode(string)
    starts = tokenizer.segmented_word_starts(ids, words=words.split())
    return None if starts is None else "".join("|" * bool(start) + piece for piece, start in zip(tokenizer.pieces(ids), starts, strict=True))


@pytest.mark.parametrize(
    ("string", "words", "expected"),
    [
        (CHINESE, CHINESE_WORDS, "|使用|语言|模型|来|预测|下|一个|词|的|pro##ba##bility|。"),
        ("使用 龘模型 。", "使用 龘模型 。", "|使用|[UNK]模型|。"),  # an unknown character in a word; spaces in the text that tokens do not keep
        ("龘龘语言龘", "龘龘语 言龘", "|[UNK][UNK]语|言[UNK]"),
        ("使用XYZ模型", "使用 XYZ 模型", "|使用|[UNK]|模型"),  # an unknown word of several letters
        ("使用XYZ模型", "使用 XYZ模型", "|使用|[UNK]模型"),
        ("PRO语言", "PRO 语言", "|pro|语言"),  # case
        ("ｐｒｏ语言", "pro 语言", "|[UNK]|语言"),  # what is known under another form is found behind what is not
        ("语言", "语言", "|语言"),
        ("", "", ""),
        ("模型pro", "模型pro", "|模型pro"),  # a word of both kinds
        ("probability", "pro bability", "|pro##ba##bility"),  # words without Chinese are the tokenizer's
        ("语言", "语 文", None),
        ("语言", "模型", None),
        ("语言模型", "语言", None),
        ("语言模型。", "使用 语言 模型 。 来", "|语言|模型|。"),  # a part of the text
        ("语言模型", "使用 语言 模型 来 语言 模型", None),  # a part that stands in it twice
        ("使用语言", "使用 语言 模型", "|使用|语言"),  # its beginning
    ],
)
def test_words_are_aligned_by_characters(tmp_path, string, words, expected):
    assert grouped(wordpiece(tmp_path, CHINESE_PIECES), string, words) == expected


CHINESE_WORD = st.text(alphabet="语言模型使用。，", min_size=1, max_size=4)
LATIN_WORD = st.text(alphabet="abécXY1", min_size=1, max_size=5)
MIXED_WORD = st.text(alphabet="语言b，Y", min_size=1, max_size=4)


@pytest.fixture(scope="module")
def kinds():
    corpus = ["语言模型使用。，" * 3, "abc XY 1 é the 语言模型 bert abc " * 20, "使用模型，语言。"]
    return {
        "bytes": text.make("bytes"),
        "bpe": text.make("bpe", texts=corpus, vocab_size=300),
        "unigram": text.make("sentencepiece", texts=corpus, vocab_size=285),
        "chars": text.make("chars", texts=["语言模型使用。，abécXY1 "]),
    }


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.tuples(CHINESE_WORD | LATIN_WORD | MIXED_WORD, st.sampled_from(["", " ", "  "])), min_size=1, max_size=12),
    kind=st.sampled_from(["bytes", "bpe", "unigram", "chars"]),
)
def test_words_are_aligned_in_every_kind(kinds, words, kind):
    """Against the offsets in the text: a token begins inside of a word where its first visible character is not the first one of a Chinese word."""
    tokenizer, string = kinds[kind], "".join(word + space for word, space in words)
    inside, at = set(), 0
    for word, space in words:
        offsets = list(itertools.accumulate([len(char.encode()) for char in word], initial=at))
        inside |= {offset for offset in offsets[1:-1] if set(word) & set("语言模型使用。，")}
        at = offsets[-1] + len(space)
    ids = tokenizer.encode(string)
    data, ends = string.encode(), np.cumsum(tokenizer.token_bytes[ids])
    expected = []
    for start, end, natural in zip(np.r_[0, ends[:-1]], ends, tokenizer.word_starts(ids), strict=True):
        visible = start + len(data[start:end]) - len(data[start:end].lstrip(b" "))
        expected.append(bool(natural) and visible not in inside)
    assert tokenizer.segmented_word_starts(ids, words=[word for word, _ in words]).tolist() == expected


def test_a_column_that_does_not_fit_falls_back_to_characters(tmp_path, caplog):
    """With one warning that names the document; the corruption is that of the document without the column."""
    tokenizer = wordpiece(tmp_path, CHINESE_PIECES)
    objective, ids = build(tokenizer, unit="whole_word"), tokenizer.encode("语言模型")
    assert objective.word_starts(Document("fits", ids, {"words": ["语言", "模型"]})).tolist() == [True, False, True, False]
    with caplog.at_level(logging.WARNING):
        for name in ("first", "second"):
            assert objective.word_starts(Document(name, ids, {"words": "别的 文字"})).tolist() == [True] * 4
    assert len(caplog.records) == 1 and "first" in caplog.text and "does not hold the words" in caplog.text
    assert objective.word_starts(Document("none", ids)).tolist() == [True] * 4


@pytest.mark.parametrize("column", [7, ["语言", 3], None, {"a": 1}])
def test_a_column_that_is_no_list_of_words_is_refused(tmp_path, column):
    tokenizer = wordpiece(tmp_path, CHINESE_PIECES)
    with pytest.raises(ConfigError, match="column 'words' of bad.*allowed: a list of words, or words with spaces between"):
        build(tokenizer, unit="span").word_starts(Document("bad", tokenizer.encode("语言"), {"words": column}))
    build(tokenizer, unit="token").word_starts(Document("bad", tokenizer.encode("语言"), {"words": column}))


@pytest.mark.parametrize("tail", [False, True])
def test_words_come_from_a_column_of_the_source(tmp_path, tail):
    """Also where the end of each document is held out: both splits find their part in the words."""
    tokenizer = wordpiece(tmp_path, CHINESE_PIECES)
    records = [{"body": "语言模型来预测下一个词。", "cut": "语言 模型 来 预测 下 一个 词 。"}, {"body": "使用模型。", "cut": ["使用", "模型", "。"]}]
    (tmp_path / "zh.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    options = {"holdout_by": "tail", "holdout": 0.5} if tail else {"holdout": 0.0}
    data = Data(source=(f"jsonl:{tmp_path}/zh.jsonl",), columns=("text=body", "words=cut"), **options)
    objective, found = build(tokenizer, unit="whole_word"), []
    for split in ("train", "validation") if tail else ("train",):
        corpus = Corpus(data, split=split, tokenizer=tokenizer)
        for n in range(2):
            doc = corpus.document(0, n)
            pieces, starts = tokenizer.pieces(doc.tokens_L), objective.word_starts(doc)
            found.append("".join("|" * bool(start) + piece for piece, start in zip(pieces, starts, strict=True)))
    whole = ["|语言|模型|来|预测|下|一个|词|。", "|使用|模型|。"]
    assert found == (["|语言|模型|来|预", "|使用", "|测|下|一个|词|。", "|模型|。"] if tail else whole)
