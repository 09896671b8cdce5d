"""Where tokens stand in the text as it was given, for every kind of tokenizer and through all that normalisation does to it."""

import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ptm import text
from ptm.text import export

TRAINING = [
    "The café at No. 7 sold 1,000 naïve books, 2,500 cups and 42 “quoted” things; she said ''no'' ``twice``. Don't stop!",
    "北京是中国的首都，人口约2,189万。上海在东边。 日本語 한국어 Größe İstanbul ΟΔΟΣ ﬁne ＡＢＣ",
]
TEXTS = {
    "plain": "The books at No. 7.",
    "spaces": "  two  books\tat\n\nNo. 7 ",
    "accents": "naïve café",
    "apart": "nai\u0308ve cafe\u0301 e\u0301",
    "numbers": "1,000, 42, and 2,500,",
    "quotes": "she said ''no'' ``twice`` '''",
    "chinese": "北京是中国的首都，人口约2,189万。",
    "mixed": "北京 the café上海books",
    "wide": "ＡＢＣ ﬁne ①",
    "ligatures": "ﬁﬁ aﬁ 1½㎏",
    "case": "İSTANBUL ΟΔΟΣ GRÖSSE",
    "emoji": "🙂 books 👨\u200d👩\u200d👧 🙃",
    "invisible": "the\u200bcafé\u00a0at \ufeffno.\u0007",
    "underscore": "a▁b ▁",
    "rare": "ᏣᎳᎩ 한국어 각",
}  # fmt: skip


def published(kind: str, folder: str, **options):
    if "PTM_DATA" not in os.environ:
        pytest.skip("PTM_DATA is not set: no published vocabularies")
    return text.make(kind, path=os.path.join(os.environ["PTM_DATA"], "vocab", folder), **options)


def unigram_file() -> bytes:
    """A tokenizer.json with byte pieces, NFKC and a space put before the text, as exported sentencepiece models have them."""
    words = ("▁the", "▁caf", "é", "▁", "books", "B", "C", "A")
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *((piece, -2.0) for piece in words)]
    pipeline = Pipeline(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    pipeline.normalizer = normalizers.NFKC()
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    pipeline.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return pipeline.to_str().encode()


MAKE = {
    "bytes": lambda folder: text.make("bytes"),
    "chars": lambda folder: text.make("chars", texts=TRAINING, specials=True),
    "wordpiece": lambda folder: text.make("wordpiece", texts=TRAINING * 4, vocab_size=175, lowercase=True),
    "wordpiece_cased": lambda folder: text.make("wordpiece", texts=TRAINING * 4, vocab_size=175),
    "bpe": lambda folder: text.make("bpe", texts=TRAINING * 4, vocab_size=290),
    "bpe_file": lambda folder: _from_file(folder, export.library_files(text.make("bytes"))["tokenizer.json"]),
    "unigram_file": lambda folder: _from_file(folder, unigram_file()),
    "unigram": lambda folder: text.make("sentencepiece", texts=TRAINING * 4, vocab_size=350),
    "unigram_lower": lambda folder: text.make("sentencepiece", texts=TRAINING * 4, vocab_size=350, lowercase=True),
    "extended": lambda folder: text.make("wordpiece", texts=TRAINING * 4, vocab_size=175, lowercase=True).extended(["café at", "首都"]),
    "bert_uncased": lambda folder: published("wordpiece", "bert_uncased", lowercase=True),
    "bert_chinese": lambda folder: published("wordpiece", "bert_chinese", lowercase=True),
    "gpt2": lambda folder: published("bpe", "gpt2"),
    "albert": lambda folder: published("sentencepiece", "albert"),
    "xlnet": lambda folder: published("sentencepiece", "xlnet"),
    "t5": lambda folder: published("sentencepiece", "sentencepiece_1k/test_sentencepiece.model"),
    "t5_bpe": lambda folder: published("sentencepiece", "sentencepiece_1k/test_sentencepiece_bpe.model"),
}
SPELLS = ("bytes", "chars", "bpe", "bpe_file", "unigram", "gpt2")  # kinds whose tokens are the text, as it is


def _from_file(folder, content: bytes):
    (folder / "tokenizer.json").write_bytes(content)
    return text.make("file", path=str(folder))


@pytest.fixture(scope="module", params=list(MAKE))
def made(request, tmp_path_factory):
    """(name, tokenizer) of a kind."""
    return request.param, MAKE[request.param](tmp_path_factory.mktemp(request.param))


def bare(content: str) -> str:
    """What of a text all normalisations leave: no case, accent, width, space, invisible character or quote (for these see the golden example)."""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", content).lower().replace("ς", "σ"))
    return "".join(c for c in parts if unicodedata.category(c)[0] not in "MCZ" and c not in "▁`'\"")


def check(name: str, tokenizer, content: str) -> None:
    ids, starts, ends = tokenizer.encode_with_offsets(content)
    assert ids.dtype == starts.dtype == ends.dtype == np.int32 and len(ids) == len(starts) == len(ends)
    np.testing.assert_array_equal(ids, tokenizer.encode(content))
    assert np.all(starts >= 0) and np.all(ends <= len(content)) and np.all(starts <= ends)
    assert np.all(np.diff(starts) >= 0) and np.all(np.diff(ends) >= 0)
    pieces = [tokenizer.decode([i]) for i in ids]
    for n, (i, start, end, piece) in enumerate(zip(ids, starts, ends, pieces)):
        where = content[start:end]
        if i == tokenizer.unk_id:
            assert where, "an unknown piece stands for something"
        elif "\ufffd" in piece:  # a part of a character
            assert where and any(ord(c) >= 128 for c in where)
        else:
            spelled = bare(piece.removeprefix("##"))
            # A token that shares a character with its neighbours, as the parts of a ligature do, has the whole of it.
            shares = n and starts[n] < ends[n - 1] or n + 1 < len(ids) and starts[n + 1] < end
            assert spelled == bare(where) or shares and spelled in bare(where), (name, content, piece, where)
    if name in SPELLS:
        whole = [content[start:end] for start, end in zip(starts, ends)]
        assert "".join(part for n, part in enumerate(whole) if not n or starts[n] >= ends[n - 1]) == content or "�" in "".join(pieces)
    # What no token has is nothing to a reader.
    covered = np.zeros(len(content), bool)
    for start, end in zip(starts, ends):
        covered[start:end] = True
    assert not bare("".join(c for c, known in zip(content, covered) if not known)), (name, content)


@pytest.mark.parametrize("content", list(TEXTS.values()), ids=list(TEXTS))
def test_offsets_give_the_text_of_every_token(made, content):
    check(*made, content)


@settings(max_examples=40, deadline=None)
@given(content=st.text(st.sampled_from("aBé e\u0301\u0308ßİΣς1,.'`\"中文，ﬁＡ①🙂\u200d\t\n\u00a0\u200b▁한"), max_size=24))
def test_offsets_of_any_text(made, content):
    check(*made, content)


GOLDEN = {
    "wordpiece": ("Naïve  CAFE\u0301!", ["naive|Naïve", "cafe|CAFE\u0301", "!|!"]),
    "chinese": ("北京 is İt", ["北|北", "京|京", "is|is", "it|İt"]),
    "bytes": ("é!", ["\\xc3|é", "\\xa9|é", "!|!"]),
    "albert": ("She  SAID ''no'' 7,", ["▁she|She", "▁said|  SAID", "▁| ", "\"|''", "no|no", "\"|''", "▁7| 7", ",|,"]),
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_offsets(name, tmp_path):
    if name == "albert":
        tokenizer = MAKE["albert"](tmp_path)
    elif name == "bytes":
        tokenizer = MAKE["bytes"](tmp_path)
    else:
        (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "naive", "cafe", "!", "北", "京", "is", "it"]) + "\n")
        tokenizer = text.make("wordpiece", path=str(tmp_path), lowercase=True)
    content, expected = GOLDEN[name]
    ids, starts, ends = tokenizer.encode_with_offsets(content)
    assert [f"{piece}|{content[start:end]}" for piece, start, end in zip(tokenizer.pieces(ids), starts, ends)] == expected
