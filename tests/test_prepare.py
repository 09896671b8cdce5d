"""The rules of `ptm prepare`: what they find, and that it is the same in whatever order documents come."""

import random
import unicodedata

import numpy as np
import planted
import pytest

from ptm import fields
from ptm.fields import ConfigError
from ptm.prepare import contamination, filters, reading, sketch, stages, summary, trial, words
from ptm.prepare import options as options_lib
from ptm.prepare.stages import Document, Key


def made(**given: str) -> options_lib.Options:
    return options_lib.parse({"source": "text:none", "output": "none", **given})[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return planted.plant(tmp_path_factory.mktemp("planted"))


# What was planted is found, and nothing else.


@pytest.mark.parametrize(
    ("kind", "given", "before"),
    [
        ("exact", {"exact": "true"}, {}),
        ("near", {"near": "true", "exact": "true"}, {"exact": "true"}),
        ("contaminated", {"evals": None}, {}),
        ("filtered", dict.fromkeys(["min_characters", "min_letters", "max_duplicate_lines", "max_top_ngrams"]), {}),
    ],
)
def test_precision_and_recall(corpus, tmp_path, kind, given, before):
    off = {**planted.RULES_OFF, "evals": ""}

    def kept(on):
        defaults = {f.name: fields.unparse(f.default) for f in options_lib.dataclasses.fields(options_lib.Options)}
        return planted.kept(corpus.options(tmp_path, **off | {key: corpus.evals if key == "evals" else value or defaults[key] for key, value in on.items()}))

    found = kept(before) - kept(given)
    wanted = corpus.ids[kind]
    precision, recall = len(found & wanted) / len(found), len(found & wanted) / len(wanted)
    assert (precision, recall) == (1.0, 1.0), found ^ wanted


def test_all_rules_together(corpus, tmp_path):
    options = corpus.options(tmp_path)
    records, counts = trial.prepare(trial.documents(options), options, trial.index(options))
    assert {record["id"] for _, _, record in records} == corpus.ids["original"] | corpus.ids["decoy"]
    removed = {rule: len(corpus.ids[kind]) for rule, kind in (("bad", "broken"), ("exact", "exact"), ("near", "near"), ("contaminated:exam", "contaminated"))}
    assert {rule: counts[f"removed/{rule}"] for rule in removed} == removed
    assert (
        counts["read/documents"]
        == sum(map(len, corpus.ids.values()))
        == sum(n for key, n in counts.items() if key.startswith(("removed/", "train/doc", "validation/doc")))
    )


def test_no_order_but_that_of_keys(corpus, tmp_path):
    options = corpus.options(tmp_path)
    read, index = list(trial.documents(options)), trial.index(options)
    wanted = trial.prepare(read, options, index)
    for seed in range(3):
        random.Random(seed).shuffle(read)
        assert trial.prepare(read, options, index) == wanted


def test_files_that_are_cut_are_the_files(corpus, tmp_path):
    options = corpus.options(tmp_path)
    whole = reading.units(options)
    cut = [part for unit in whole for part in reading.cut(unit, options, size=1000)]
    assert len(cut) > len(whole) + 20
    assert [document for unit in cut for document in reading.documents(unit, options)] == list(trial.documents(options))


# The rule of duplicates.


def test_the_smallest_key_stays():
    options = made(near="false", **dict.fromkeys(("min_characters", "min_letters"), "None"))
    keys = [Key(0, 10, 2), Key(0, 9, 10), Key(1, 0, 1), Key(0, 9, 9)]
    records, _ = trial.prepare([Document(key, "".join(map(str, key)), "the same") for key in keys], options, None)
    assert [key for key, _, _ in records] == [Key(0, 9, 9)]


def test_near_duplicates_of_what_goes_go_too():
    """c goes for its likeness to b, which goes for its likeness to a; c is not like a."""
    sets = {"a": np.arange(0, 100), "b": np.arange(8, 108), "c": np.arange(16, 116)}
    assert sketch.jaccard(sets["a"], sets["c"]) < 0.8 <= sketch.jaccard(sets["a"], sets["b"])
    assert sketch.duplicates("abc", sets.__getitem__, threshold=0.8) == ["b", "c"]
    assert sketch.duplicates("ac", sets.__getitem__, threshold=0.8) == []
    assert sketch.duplicates("abc", sets.__getitem__, threshold=0.8, known=lambda member: member == "b") == ["c"]


def test_jaccard_is_that_of_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (np.unique(rng.integers(0, 60, rng.integers(0, 60))).astype(np.uint64) for _ in range(2))
        union = len({*one.tolist(), *other.tolist()})
        exact = len({*one.tolist()} & {*other.tolist()}) / union if union else 0.0
        assert sketch.jaccard(one, other) == exact
        for threshold in (0.1, exact, 0.9):
            assert sketch.similar(one, other, threshold) == (exact >= threshold)


def test_bands_find_what_is_similar_and_are_the_same_everywhere():
    options, text = made(), planted.Words(1)
    near, far = 0, 0
    for _ in range(100):
        one = text.text(120)
        key = sketch.bands(sketch.shingles(one, options), options)
        near += bool((key == sketch.bands(sketch.shingles(text.changed(one, 0.05), options), options)).any())
        far += bool((key == sketch.bands(sketch.shingles(text.text(120), options), options)).any())
    assert (near, far) == (100, 0)
    # What another machine finds for the same text: a change of these numbers is a change of every corpus.
    assert sketch.bands(sketch.shingles("one two three four five six", options), options)[:2].tolist() == [3941942464052735562, 8388295678868905931]
    assert not len(sketch.bands(sketch.shingles("...", options), options))


def test_words_of_scripts_with_and_without_spaces():
    assert words.words("Zwei Wörter, 3 天氣好 สวย") == ("zwei", "wörter", "3", "天", "氣", "好", "ส", "ว", "ย")
    assert [words.script(text) for text in ("abc 天", "天气 a", "これは日本語", "Привет", "12 ..", "שלום")] == [
        "latin",
        "han",
        "kana",
        "cyrillic",
        "none",
        "hebrew",
    ]
    hashes_W = words.hashes("a b c a b c")
    grams = words.ngrams(hashes_W, 3)
    assert grams[0] == grams[3] and len({*grams.tolist()}) == 3 and not len(words.ngrams(hashes_W, 7))
    assert (words.ngrams(hashes_W[1:], 3) == grams[1:]).all(), "a run is hashed by itself"
    assert words.ngrams(words.hashes("c b a"), 3)[0] != grams[0], "and in its order"


# Filters.

FIFTH = " ".join(f"a b {''.join(chr(0x4E00 + 8 * n + k) for k in range(8))}" for n in range(5))  # 50 words of one character, a fifth of them in `a b`


@pytest.mark.parametrize(
    ("rule", "value", "goes", "stays"),
    [
        ("min_characters", "10", "123456789", "1234567890"),
        ("max_characters", "10", "12345678901", "1234567890"),
        ("min_letters", "0.5", "ab 123", "abc 123"),
        ("min_letters", "0.9", "...", "हिन्दी में"),
        ("min_word_length", "3", "a an it of", "the cat sat"),
        ("max_word_length", "10", "abcdefghijklmnop", "天气很好天气很好天气很好天气很好"),
        ("max_symbols", "0.1", "word " * 50 + "# " * 6, "word " * 50 + "# " * 5),
        ("max_symbols", "0.1", "word " * 50 + "…... " * 3, "word ..."),
        ("max_duplicate_lines", "0.3", "a\nb\na", "a\nb\nc\na"),
        ("max_duplicate_line_characters", "0.2", "long line\nlong line\nb\nc\nd\ne", "other lines\nb\nb\nc"),
        ("max_top_ngrams", "0.2,0.18", "one two " * 25, " ".join(f"w{n}" for n in range(50))),
        ("max_top_ngrams", "1.0,0.18", "one two three " * 25, "one two " * 24),
        ("max_top_ngrams", "0.2", f"{FIFTH} a b", FIFTH),
        ("scripts", "han", "mostly latin 天", "天气很好 a"),
        ("scripts", "latin,cyrillic", "天气很好", "Привет and hello"),
    ],
)
def test_a_filter(rule, value, goes, stays):
    options = made(**{key: "None" for key in filters.FILTERS if key not in (rule, "scripts")}, **{rule: value})
    assert filters.verdict(goes, options) == rule
    assert filters.verdict(stays, options) is None


def test_every_filter_has_an_option_that_switches_it_off():
    options = made(**{key: "" if key == "scripts" else "None" for key in filters.FILTERS})
    assert filters.verdict("", options) is filters.verdict("a a a\n" * 100, options) is None


# Evaluation sets.


def test_the_share_of_an_example_decides():
    text = planted.Words(2)
    example, other = text.text(40), text.text(40)
    index = contamination.build({"long": [example, other], "short": ["three words only"], "more": [text.text(13)]}, ngram=13)
    assert index.too_short() == {"long": 0, "short": 1, "more": 0}
    around = text.text(300)
    half = " ".join(example.split()[:27])  # 15 of 28 runs
    assert index.found(f"{around} {example.upper()}, {around}", 0.5) == "long"
    assert index.found(f"{around} {half} {around}", 0.5) == "long"
    assert index.found(f"{around} {half} {around}", 0.6) is None
    assert index.found(" ".join(example.split()[:12]), 0.0) is None
    quarters = [" ".join(part.split()[:20]) for part in (example, other)]  # 8 of 28 runs of each: no half of one
    assert index.found(" ".join(quarters), 0.5) is None


def test_exactly_the_share_is_enough():
    text = planted.Words(4)
    example = text.text(32)  # 20 runs
    index = contamination.build({"exam": [example]}, ngram=13)
    ten, nine = (" ".join(example.split()[:count]) for count in (22, 21))
    assert index.found(ten, 0.5) == "exam" and index.found(nine, 0.5) is None and index.found(nine, 0.0) == "exam"


def test_runs_that_examples_share_count_for_each():
    text = planted.Words(5)
    shared, one, other = text.text(20), text.text(20), text.text(20)
    index = contamination.build({"one": [f"{shared} {one}"], "other": [f"{shared} {other}"]}, ngram=13)
    assert [index.found(f"{shared} {end}", 1.0) for end in (one, other)] == ["one", "other"]
    assert index.found(shared, 1.0) is None


# Records.


def test_splits_follow_the_text_and_the_seed():
    text = planted.Words(3)
    texts = [text.text(5) for _ in range(2000)]

    def held_out(**given: str) -> set[str]:
        options = made(**given)
        return {t for t in texts if stages.split(t, options) == "validation"}

    held = {seed: held_out(validation="0.1", seed=str(seed)) for seed in (0, 1)}
    assert 150 < len(held[0]) < 250 and 150 < len(held[1]) < 250 and len(held[0] & held[1]) < 50
    assert not held_out(validation="0")
    assert held[0] <= held_out(validation="0.2"), "a larger share keeps what was held out"


def test_shards_are_even():
    counts = np.bincount([stages.shard(f"file:{n}", 4) for n in range(4000)])
    assert len(counts) == 4 and counts.min() > 900
    assert [stages.shards(size, made(shard_bytes="10")) for size in (0, 1, 10, 11, 100)] == [1, 1, 1, 2, 10]


def test_records_have_what_is_asked_for():
    assert stages.finish("a:1", "text", made()) == {"id": "a:1", "text": "text"}
    record = stages.finish("a:1", "text", made(tokenizer="bytes", keep_ids="false"))
    assert [*record] == ["text", "tokens"] and record["tokens"].dtype == np.uint16
    assert stages.tokenizer("bytes").decode(record["tokens"]) == "text"


def test_text_is_normalised():
    assert stages.normalise("e\u0301\r\nﬁ\r", made()) == "é\nﬁ\n"
    assert stages.normalise("ﬁ", made(unicode="NFKC")) == "fi"
    assert stages.normalise(unicodedata.normalize("NFD", "é"), made(unicode="none")) == "e\u0301"


def test_counts_have_no_order():
    parts = [summary.of_kept("天气 a", "train", 3), summary.of_removed("near"), summary.of_read(Document(Key(0, 0, 1), "x", "é"), None)]
    assert summary.total(parts) == summary.total(reversed(parts)) == summary.total([summary.total(parts[:2]), parts[2]])
    assert summary.total(parts)["train/tokens"] == 3 and summary.total(parts)["read/bytes"] == 2


# What is refused.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": ""}, "needs --source="),
        ({"output": ""}, "needs --output="),
        ({"name": "../up"}, "--name='../up'"),
        ({"name": "a/b"}, "allowed: a lower-case letter"),
        ({"version": "1.0"}, "three numbers"),
        ({"version": "../../x"}, "three numbers"),
        ({"evals": "jsonl:x"}, "NAME=FORMAT:PATH"),
        ({"evals": "a=text:x,a=text:y"}, "a name of its own"),
        ({"validation": "0.7"}, "0.0 to 0.5"),
        ({"unicode": "NFX"}, "allowed: none, NFC, NFKC"),
        ({"scripts": "latn"}, "Did you mean 'latin'"),
        ({"near_bands": "many"}, "cannot be read"),
        ({"columns": "text"}, "FIELD=COLUMN"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ConfigError) as error:
        made(**given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("corpus.txt", "FORMAT:PATH"), ("txt:corpus", "Did you mean 'text'"), ("text:/nowhere/*.txt", "matches no file"), ("text:nope://x/*", "store")],
)
def test_wrong_sources(spec, message):
    with pytest.raises(ConfigError) as error:
        reading.units(made(source=spec))
    assert message in str(error.value)


def test_a_vocabulary_needs_its_path():
    with pytest.raises(ConfigError, match="bpe:PATH"):
        stages.tokenizer("bpe")
