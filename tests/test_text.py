"""Tokenizers: ids equal to the reference implementations', exact round trips, training that repeats, saving, and errors that help.

`data/text/goldens.json` holds ids by transformers 5.23.0 (BERT, GPT-2, RoBERTa) and by the Python tokenizers of transformers 4.57.6
(ALBERT, XLNet, T5 with 100 extra ids), which follow the models' own published code; no special tokens added. The published vocabularies
themselves are read from the folder that PTM_DATA names.
"""

import json
import os
import pathlib
import pickle
import pydoc_data.topics
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptm import text
from ptm.fields import ConfigError
from ptm.text import boundaries

GOLDENS = json.loads((pathlib.Path(__file__).parent / "data/text/goldens.json").read_text(encoding="utf-8"))
CORPUS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:20]] + ["A tab\tstands here.\n"]
SAMPLE = "Hello  world, it's 9,000 naïve\tcafés.\n\n中文测试。 x ▁ 😀\u2028</s><pad>[MASK] end "
ROLES = ("pad", "bos", "eos", "unk", "mask", "cls", "sep")
# golden: kind, path under PTM_DATA/vocab, lowercase, sentinels
PUBLISHED = {
    "bert_uncased": ("wordpiece", "bert_uncased", True, 0),
    "bert_chinese": ("wordpiece", "bert_chinese/vocab.txt", True, 0),
    "gpt2": ("bpe", "gpt2", False, 0),
    "roberta": ("bpe", "roberta/vocab.json", False, 0),
    "albert": ("sentencepiece", "albert", False, 0),
    "xlnet": ("sentencepiece", "xlnet/spiece.model", False, 0),
    "t5": ("sentencepiece", "sentencepiece_1k/test_sentencepiece.model", False, 100),
}
TRAINED = {
    "unigram": {"kind": "sentencepiece", "vocab_size": 700, "algorithm": "unigram"},
    "sp_bpe": {"kind": "sentencepiece", "vocab_size": 700, "algorithm": "bpe"},
    "wordpiece": {"kind": "wordpiece", "vocab_size": 500, "lowercase": True},
    "bpe": {"kind": "bpe", "vocab_size": 700},
    "chars": {"kind": "chars", "specials": True},
    "bytes": {"kind": "bytes"},
}
LOSSLESS = ("unigram", "sp_bpe", "bpe", "bytes")
PARTS = (" ", "  ", "\t", "\n", "\r\n", "▁", "a", "the", "<", "</s>", "<pad>", "中", "é", "😀", "\0", "\u2028", "<0x41>")
ANY_TEXT = st.lists(st.sampled_from(PARTS), max_size=15).map("".join) | st.text(max_size=30)


def published(name: str) -> text.Tokenizer:
    if "PTM_DATA" not in os.environ:
        pytest.skip("set PTM_DATA to the folder of real data: published vocabularies are not part of the repository")
    kind, path, lowercase, sentinels = PUBLISHED[name]
    return text.make(kind, path=os.path.join(os.environ["PTM_DATA"], "vocab", path), lowercase=lowercase, sentinels=sentinels)


def train(name: str, **changes) -> text.Tokenizer:
    options = TRAINED[name] | {"texts": iter(CORPUS)} | changes
    return text.make(options.pop("kind"), **options)


@pytest.fixture(scope="module")
def trained() -> dict[str, text.Tokenizer]:
    return {name: train(name, sentinels=3) for name in TRAINED}


def specials_of(tokenizer: text.Tokenizer) -> list[int | None]:
    return [getattr(tokenizer, role + "_id") for role in ROLES]


def marked(tokenizer: text.Tokenizer, string: str) -> str:
    """The text of a string's tokens with | before each word start."""
    ids = tokenizer.encode(string)
    pieces = [piece.replace("▁", " ").replace("<0x09>", "\t") for piece in tokenizer.pieces(ids)]
    return "".join("|" * bool(start) + piece for piece, start in zip(pieces, tokenizer.word_starts(ids), strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_equal_the_reference(name):
    tokenizer = published(name)
    assert len(GOLDENS[name]) >= 20
    for string, ids in GOLDENS[name]:
        got = tokenizer.encode(string)
        assert got.dtype == np.int32 and got.tolist() == ids, string


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [
        ("bert_uncased", 30522, [0, None, None, 100, 103, 101, 102]),
        ("bert_chinese", 21128, [0, None, None, 100, 103, 101, 102]),
        ("gpt2", 50257, [None, None, 50256, None, None, None, None]),
        ("roberta", 50265, [1, 0, 2, 3, 50264, 0, 2]),
        ("albert", 30000, [0, None, None, 1, 4, 2, 3]),
        ("xlnet", 32000, [5, 1, 2, 0, 6, 3, 4]),
        ("t5", 1100, [None, 1, 2, 0, None, None, None]),
    ],
)
def test_special_ids_of_published_vocabularies(name, vocab_size, expected):
    tokenizer = published(name)
    assert (tokenizer.vocab_size, specials_of(tokenizer)) == (vocab_size, expected)
    assert tokenizer.sentinels == (tuple(range(1099, 999, -1)) if name == "t5" else ())
    assert not tokenizer.special_ids - {tokenizer.unk_id} & set(tokenizer.encode("<s> </s> [MASK] <mask> [CLS] <cls> <|endoftext|> <extra_id_0>").tolist())


def test_word_starts_of_published_vocabularies():
    assert marked(published("bert_chinese"), "Unhappily, 中文 ok") == "|u##n##ha##pp##ily|,|中|文|ok"
    assert marked(published("gpt2"), "Unhappily,\nI  go 中文a") == "|Unhappily,|\n|I| | go| |中|\\xe6\\x96\\x87|a"
    assert marked(published("albert"), "Unhappily, it") == "| unhappily,| it"


def sentences(tokenizer: text.Tokenizer, ids: np.ndarray) -> list[str]:
    """The decoded sentences of ids."""
    starts = tokenizer.sentence_starts(ids)
    assert starts.dtype == bool and len(starts) == len(ids)
    return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(starts)[1:])]


STORY = 'Mr. Lee went to the U.S. in 1999. He paid $3.14! "Really?" she asked. "Yes." (So he did.) I left...\n\nNew lines\nof one width.\nThen 1. First.'
STORIES = {  # sentences of STORY, of text with small letters alone, and of Chinese
    "gpt2": [
        [
            "Mr. Lee went to the U.S. in 1999.",
            " He paid $3.14!",
            ' "Really?" she asked.',
            ' "Yes."',
            " (So he did.)",
            " I left...\n\n",
            "New lines\nof one width.\n",
            "Then 1.",
            " First.",
        ],
        ["see it.", " is it so?\n", "yes"],
        ["他走了。", "“真的吗？”", "他说。\n", "GPT来了！"],
    ],
    # Spaces and lines are lost: quotes open and close by turns, lines end no sentence, and after a quote nothing tells that a sentence goes on.
    "bert_chinese": [
        [
            "mr. lee went to the u. s. in 1999.",
            "he paid $ 3. 14!",
            '" really? "',
            "she asked.",
            '" yes. "',
            "( so he did. )",
            "i left...",
            "new lines of one width.",
            "then 1.",
            "first.",
        ],
        ["see it.", "is it so?", "yes"],
        ["他走了。", "[UNK]真的吗？", "[UNK]他说。", "gpt来了！"],
    ],
    "xlnet": [
        [
            "Mr. Lee went to the U.S. in 1999.",
            "He paid $3.14! ",
            '"Really?" she asked. ',
            '"Yes." ',
            "(So he did.)",
            "I left...",
            "New lines of one width.",
            "Then 1.",
            "First.",
        ],
        ["see it.", "is it so?", "yes"],
        None,
    ],
}


@pytest.mark.parametrize("name", STORIES)
def test_sentences_of_published_vocabularies(name):
    tokenizer = published(name)
    for string, expected in zip((STORY, "see it. is it so?\nyes", "他走了。“真的吗？”他说。\nGPT来了！"), STORIES[name], strict=True):
        if expected is not None:
            assert sentences(tokenizer, tokenizer.encode(string)) == expected


@pytest.mark.parametrize(
    ("marked_text", "keeps_spaces"),
    [
        ("One. |Two!  |Three?! |Four", True),
        ("At 3.14 a.m. he, Dr. J. Smith et al. came. |E.g. this", True),
        ('He said "Go!" and went. |“No.” |‘So.’ |[It is.] |End', True),
        ("The end... or not", True),  # goes on with a small letter
        ("all small. |as in chats. |ok", True),
        ("A line\ngoes on.\n|Another\n|Title\n\n|text\n\n|small again", True),
        ("a\r\n|b\u2028|c", True),
        ("1. no capitals", True),
        ("1. First 2. |Second", True),
        ("\n\nText. |More\n", True),
        ("你好。|他说：“走！”|真的？！|嗯", True),
        ("中文\n|中文（是。）|完。』|好", True),
        ("...", True),
        ("", True),
        (' " go . " |" no . " |3 . 14 . |( so . ) |he', False),
        (" 1999 . then u . s . a . e . g . mr . x ! ? ” |y", False),
        ("他走。|好！ ” |吗 ? |是", False),
    ],
)
def test_rules_of_sentences(marked_text, keeps_spaces):
    """A | stands before each sentence but the first."""
    string = marked_text.replace("|", "")
    marks = [at - n for n, at in enumerate(at for at, char in enumerate(marked_text) if char == "|")]
    assert boundaries.sentence_starts(string, keeps_spaces=keeps_spaces) == [0, *marks]


SENTENCE_PARTS = (*PARTS, ".", "!", "?", "。", "！", '"', "”", ")", "Go", "go", "7", "Mr")


@given(string=st.lists(st.sampled_from(SENTENCE_PARTS), max_size=25).map("".join))
@example(string=STORY)
@settings(max_examples=150, deadline=None)
def test_sentences_agree_between_lossless_kinds(trained, string):
    """A sentence begins at its first byte, or with the space before it, or after a piece that holds the end of the one before."""
    places = [len(string[:at].encode()) for at in boundaries.sentence_starts(string, keeps_spaces=True)]
    data = string.encode()
    for name in LOSSLESS:
        tokenizer = trained[name]
        ids = tokenizer.encode(string)
        assert "".join(tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(tokenizer.sentence_starts(ids)))) == string or name == "bytes"
        begins = (np.cumsum(tokenizer.token_bytes[ids]) - tokenizer.token_bytes[ids])[tokenizer.sentence_starts(ids)].tolist()
        assert begins[:1] == [0] * bool(string)
        if name == "bytes":
            assert begins == places[: len(begins)] and len(begins) == len(places) * bool(string)
        for begin in begins[1:]:
            assert any(data[begin:place].isspace() or begin >= place for place in places), "no sentence is torn"
        assert len(begins) <= len(places)


@pytest.mark.parametrize("name", TRAINED)
def test_sentences_around_special_ids(trained, name):
    """A piece without text is a word of a sentence; ids without any are no sentence."""
    tokenizer = trained[name]
    assert tokenizer.sentence_starts([]).tolist() == []
    ids = [*tokenizer.encode("the. "), tokenizer.unk_id, *tokenizer.encode(" class. ")]
    starts = np.flatnonzero(tokenizer.sentence_starts(np.array(ids)))
    assert starts.tolist() == [0, ids.index(tokenizer.unk_id)]


def test_decode_of_published_vocabularies():
    bert, t5, gpt2 = published("bert_uncased"), published("t5"), published("gpt2")
    ids = bert.encode("It's a café, isn't it?")
    assert bert.decode([bert.cls_id, *ids, bert.mask_id, bert.sep_id, bert.pad_id]) == "it's a cafe, isn't it? [MASK]"
    assert t5.decode([*t5.encode("the end"), t5.sentinels[0], t5.sentinels[99], t5.eos_id]) == "the end<extra_id_0><extra_id_99>"
    assert gpt2.decode([*gpt2.encode(SAMPLE), gpt2.eos_id]) == SAMPLE


@pytest.mark.parametrize("name", LOSSLESS)
@given(string=ANY_TEXT)
@example(string=SAMPLE)
@settings(max_examples=80, deadline=None)
def test_lossless_kinds_round_trip_and_count_bytes(trained, name, string):
    tokenizer = trained[name]
    ids = tokenizer.encode(string)
    assert tokenizer.decode(ids) == string
    assert tokenizer.token_bytes[ids].sum() == len(string.encode())
    assert not tokenizer.special_ids & set(ids.tolist())
    assert len(tokenizer.pieces(ids)) == len(tokenizer.word_starts(ids)) == len(ids)


@pytest.mark.parametrize("name", ["unigram", "bpe", "bytes", "chars"])
def test_word_starts_agree_between_lossless_kinds(trained, name):
    string = "The class  statement,\n\tor def:\nif x"
    spaced = "|The |class  |statement,\n\t|or |def:\n|if |x" if name in ("bytes", "chars") else "|The| class| | statement,|\n|\t|or| def:|\n|if| x"
    got = marked(trained[name], string)
    if name == "unigram":  # its pieces may hold punctuation and the line break after it
        got, spaced = got.replace("|\n", "\n"), spaced.replace("|\n", "\n")
    assert got == spaced


@pytest.mark.parametrize("name", ["unigram", "bpe", "bytes"])
def test_chinese_characters_are_words(trained, name):
    tokenizer = trained[name]
    ids = tokenizer.encode("a中文b c")
    ends = np.cumsum(tokenizer.token_bytes[ids])
    starts = {int(end - width) for end, width, start in zip(ends, tokenizer.token_bytes[ids], tokenizer.word_starts(ids), strict=True) if start}
    assert starts == {0, 1, 4, 7, 9 if name == "bytes" else 8}


@pytest.mark.parametrize("name", TRAINED)
def test_special_ids_bound_words_and_show(trained, name):
    tokenizer = trained[name]
    word = tokenizer.encode("statement")
    ids = [tokenizer.cls_id, *word, tokenizer.sentinels[1], *word[1:], tokenizer.sep_id, tokenizer.pad_id]
    expected = {0, 1, 1 + len(word), len(ids) - 2, len(ids) - 1} | ({2 + len(word)} if name != "wordpiece" and len(word) > 1 else set())
    assert set(np.flatnonzero(tokenizer.word_starts(ids)).tolist()) == expected
    assert tokenizer.decode([tokenizer.cls_id, *word, tokenizer.sentinels[1], tokenizer.pad_id]) == "statement<extra_id_1>"
    assert "mask" in tokenizer.decode([tokenizer.mask_id]).lower()
    assert (tokenizer.token_bytes[sorted(tokenizer.special_ids)] == 0).all()
    assert tokenizer.word_starts([]).shape == tokenizer.encode("").shape == (0,)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_layout(trained, name):
    tokenizer = trained[name]
    first = {"wordpiece": [0, None, None, 1, 4, 2, 3], "bytes": [0, 259, 1, 2, 260, 261, 262]}
    chars = len(set("".join(CORPUS)))
    first["chars"] = [chars, chars + 3, chars + 1, chars + 2, chars + 4, chars + 5, chars + 6]
    assert specials_of(tokenizer) == first.get(name, [0, 3, 1, 2, 4, 5, 6])
    trained_size = {"bytes": 263, "chars": chars + 7}.get(name, TRAINED[name].get("vocab_size"))
    assert tokenizer.vocab_size == trained_size + 3 == len(tokenizer.token_bytes)
    assert tokenizer.sentinels == (trained_size + 2, trained_size + 1, trained_size)
    assert tokenizer.special_ids == {i for i in specials_of(tokenizer) if i is not None} | set(tokenizer.sentinels)


def test_bytes_layout_and_chars_of_a_text():
    assert text.make("bytes").encode("aé").tolist() == [100, 198, 172]
    chars = text.make("chars", texts=["hello", "world"])
    assert (chars.vocab_size, chars.special_ids, chars.pad_id) == (7, frozenset(), None)
    assert chars.encode("dehlorw").tolist() == list(range(7))
    with pytest.raises(ConfigError, match=r"'z' \(U\+007A\)"):
        chars.encode("lazy"[2:])
    with_unk = text.make("chars", texts=["hello"], specials=True)
    assert with_unk.decode(with_unk.encode("hez")) == "he<unk>"


def test_chars_of_tinyshakespeare():
    if "PTM_DATA" not in os.environ:
        pytest.skip("set PTM_DATA to the folder of real data")
    corpus = (pathlib.Path(os.environ["PTM_DATA"]) / "lm/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    assert text.make("chars", texts=[corpus]).vocab_size == 65


def test_wordpiece_that_was_trained(trained):
    tokenizer = trained["wordpiece"]
    ids = tokenizer.encode("The Statement, the class")
    assert tokenizer.decode(ids) == "the statement, the class"
    assert tokenizer.token_bytes[ids].sum() == len(" the statement , the class")
    assert tokenizer.unk_id not in ids


def test_training_repeats_in_another_process(trained):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_text as t; print(*[t.train(name, sentinels=3).fingerprint for name in t.TRAINED])"
    command = [sys.executable, "-c", code, str(pathlib.Path(__file__).parent)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(pathlib.Path(text.__file__).parents[2])}
    )
    fingerprints = done.stdout.split()
    assert fingerprints == [tokenizer.fingerprint for tokenizer in trained.values()]
    assert len(set(fingerprints)) == len(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_save_and_load(trained, name, tmp_path):
    tokenizer = trained[name]
    tokenizer.save(str(tmp_path / "t"))
    for again in (text.load(str(tmp_path / "t")), text.make(tokenizer.kind, path=str(tmp_path / "t")), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.fingerprint, again.vocab_size, again.sentinels, specials_of(again)) == (
            tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.sentinels, specials_of(tokenizer),
        )  # fmt: skip
        assert again.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    assert train(name, sentinels=2).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("name", ["unigram", "sp_bpe", "wordpiece", "bpe"])
def test_a_vocabulary_size_that_does_not_fit_the_text_names_the_one_that_does(name):
    with pytest.raises(ConfigError, match="at most") as error:
        train(name, texts=CORPUS[:1], vocab_size=30_000)
    largest = int(str(error.value).split("at most ")[1].split(".")[0])
    assert train(name, texts=CORPUS[:1], vocab_size=largest).vocab_size == largest
    with pytest.raises(ConfigError, match="too small") as error:
        train(name, texts=CORPUS[:1], vocab_size=50)
    smallest = int(str(error.value).split("need ")[1].split(".")[0])
    assert train(name, texts=CORPUS[:1], vocab_size=smallest).vocab_size == smallest
    with pytest.raises(ConfigError, match="no text"):
        train(name, texts=[""])


def test_bpe_text_that_spells_a_special_piece_never_gives_its_id():
    tokenizer = text.make("bpe", texts=["</s> <pad>"] * 100, vocab_size=267)
    ids = tokenizer.encode("</s> <pad></s>")
    assert not tokenizer.special_ids & set(ids.tolist()) and tokenizer.decode(ids) == "</s> <pad></s>"


def test_lowercase_sentencepiece():
    tokenizer = train("sp_bpe", lowercase=True)
    assert tokenizer.decode(tokenizer.encode("The Class")) == "the class"


def library_file(model: object, folder: pathlib.Path, **parts) -> text.Tokenizer:
    pipeline = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(pipeline, name, part)
    pipeline.add_special_tokens(["<pad>", "<mask>", "<extra_id_0>"])
    pipeline.save(str(folder / "tokenizer.json"))
    return text.make("file", path=str(folder))


def test_library_files(tmp_path):
    pre = tokenizers.pre_tokenizers
    words = library_file(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"), tmp_path, pre_tokenizer=pre.Whitespace())
    ids = words.encode("a <mask> b")
    assert words.unk_id in ids and words.mask_id not in ids and words.decode(ids) == "a [UNK] [UNK] [UNK] b"
    assert (words.word_starts(ids).all(), words.sentinels, words.token_bytes[:3].tolist()) == (True, (5,), [2, 2, 0])

    alphabet = {char: i for i, char in enumerate(sorted(pre.ByteLevel.alphabet()))}
    spelled = library_file(tokenizers.models.BPE(alphabet, []), tmp_path, pre_tokenizer=pre.ByteLevel(add_prefix_space=False))
    ids = spelled.encode(SAMPLE)
    assert spelled.decode(ids) == SAMPLE and spelled.token_bytes[ids].sum() == len(SAMPLE.encode()) and not spelled.special_ids & set(ids.tolist())

    scores = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0)]
    pieces = library_file(tokenizers.models.Unigram(scores, unk_id=0), tmp_path, pre_tokenizer=pre.Metaspace())
    ids = pieces.encode("ab bb")
    assert (pieces.decode(ids), pieces.word_starts(ids).tolist(), pieces.mask_id) == ("ab bb", [True, False, True, False, False], 5)
    pieces.save(str(tmp_path / "saved"))
    assert text.load(str(tmp_path / "saved")).fingerprint == pieces.fingerprint

    with pytest.raises(ConfigError, match="cannot tell how"):
        library_file(tokenizers.models.BPE({"a": 0, "b": 1}, []), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sentencpiece"}, "Did you mean 'sentencepiece'"),
        ({"kind": "bpe"}, "vocab.json, merges.txt"),
        ({"kind": "file", "texts": CORPUS}, "cannot be trained"),
        ({"kind": "bytes", "path": "somewhere"}, "no vocabulary"),
        ({"kind": "bpe", "path": "nowhere"}, "no file or folder 'nowhere'.*vocab.json and merges.txt"),
        ({"kind": "bpe", "texts": CORPUS, "lowercase": True}, "does not apply.*sentencepiece, wordpiece"),
        ({"kind": "sentencepiece", "texts": CORPUS, "algorithm": "wordpiece"}, "unigram, bpe"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        text.make(**arguments)


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("sentencepiece", {"spiece.model": b"nonsense"}, "cannot be read"),
        ("sentencepiece", {"other.model": b""}, "holds no spiece.model.*other.model"),
        ("wordpiece", {"vocab.txt": b"[UNK]\na\na\n"}, "'a' twice"),
        ("wordpiece", {"vocab.txt": b"a\nb\n"}, r"\[UNK\]"),
        ("wordpiece", {"vocab.txt": b"[UNK]\nword\n##s\n"}, "lowercase=true"),
        ("wordpiece", {"vocab.txt": b"\xff\xfe"}, "not UTF-8"),
        ("bpe", {"vocab.json": b"{", "merges.txt": b""}, "not JSON"),
        ("bpe", {"vocab.json": b'{"a": 1}', "merges.txt": b""}, "without gaps"),
        ("bpe", {"vocab.json": b'{"a": 0}', "merges.txt": b""}, "lacks 255"),
        ("bpe", {"vocab.json": b"{}"}, "holds no merges.txt"),
        ("chars", {"chars.json": b'["a", "<bad>"]'}, "'<bad>'"),
        ("chars", {"chars.json": b'["a", "a"]'}, "distinct"),
        ("file", {"tokenizer.json": b"{}"}, "not a file of the tokenizers library"),
    ],
)
def test_damaged_vocabularies(tmp_path, kind, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        text.make(kind, path=str(tmp_path))


def test_damaged_saves(trained, tmp_path):
    folder, meta = tmp_path / "t", tmp_path / "t" / "meta.json"
    with pytest.raises(ConfigError, match="no tokenizer in"):
        text.load(str(folder))
    trained["bpe"].save(str(folder))
    good = json.loads(meta.read_text())
    changes = [({"format": 2}, "format 2"), ({"more": 1}, "exactly the keys"), ({"options": {"lowercase": False, "sentinels": 4}}, "was changed")]
    for change, message in changes:
        meta.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match=message):
            text.load(str(folder))
    meta.write_text(json.dumps(good))
    with pytest.raises(ConfigError, match="kind 'bpe', not 'chars'"):
        text.make("chars", path=str(folder))
    with pytest.raises(ConfigError, match="has 3"):
        text.make("bpe", path=str(folder), sentinels=5)
    with open(folder / "merges.txt", "a") as file:
        file.write("a b\n")
    with pytest.raises(ConfigError, match="sha256 differs"):
        text.load(str(folder))
    (folder / "merges.txt").unlink()
    with pytest.raises(ConfigError, match="no merges.txt"):
        text.load(str(folder))


def test_ids_that_are_not_ids():
    tokenizer = text.make("bytes")
    for ids in ([-1], [263], [1.5], np.zeros((2, 2), np.int32)):
        with pytest.raises(ValueError, match="allowed"):
            tokenizer.decode(ids)
