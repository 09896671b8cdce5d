"""Damaged records and files of every format: named, counted and skipped, the others read as ever; never a crash, a loop, or a loss that nobody is told of."""

import contextlib
import dataclasses
import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs
from array_record.python import array_record_module

from ptm import cli
from ptm.config import Data
from ptm.data import documents, pipeline, python_docs, records, sources
from ptm.data.batch import Field
from ptm.data.loader import Loader
from ptm.data.records import BadRecord
from ptm.fields import ConfigError

GOOD, PLACE = 6, 2  # records that are whole, and how many of them stand before the damaged one
LONG = 4000  # bytes of the longest record that is allowed here


class Chars:
    def encode(self, text):
        return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int32)


class Whole:
    """A row for each document."""

    def __init__(self):
        self.lengths, self.packing, self.raw_length, self.visits, self.max_segments = {"L": 64}, "none", None, None, None
        self.fields = {"tokens_BL": Field(is_tokens=True)}

    def features(self, doc, *, rng, draw):
        yield {"tokens_BL": doc.tokens_L[:64]}

    def finish(self, row):
        return row


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own, and a limit of records that is soon reached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(records, "LONGEST", LONG)
    return folder / "ptm"


# ---- the formats ----


@dataclasses.dataclass(frozen=True)
class Format:
    """How the records of a format are written, and what can become of one."""

    write: Callable[[Path, list], Path]  # into a folder, from what `good` and `damaged` hold
    good: Callable[[int], object]  # a record that is whole, whose text holds "number N"
    damaged: dict[str, object]
    columns: tuple[str, ...] = ("text=text",)
    refused: tuple[str, ...] = ()  # damages after which the file is none of its format


def file_of(name: str, *, before: bytes = b"", between: bytes = b"\n", after: bytes = b"\n") -> Callable[[Path, list], Path]:
    def write(folder: Path, parts: list) -> Path:
        (folder / name).write_bytes(before + between.join(parts) + after)
        return folder / name

    return write


def in_json(good: bytes) -> dict[str, bytes]:
    """What can become of a record in JSON."""
    text = re.search(rb'"[^"]*number 9[^"]*"', good)[0]
    return {
        "cut": good[: len(good) // 2],
        "not_utf8": good.replace(b"number", b"n\xffmber"),
        "no_unicode": good.replace(b"number", rb"n\ud800mber"),
        "zeros": bytes(40),
        "noise": bytes(range(128, 256)),
        "deep": good.replace(text, b"[" * 100_000 + b"]" * 100_000),
        "nested": good.replace(text, b"[" * 700 + b"]" * 700),  # less than the parser refuses
        "big_number": good.replace(text, b"1" * 5000),
        "too_long": good.replace(b"number", b"number " * LONG),
        "empty": b"{}",
        "list": b"[1, 2]",
        "number": b"5",
        "null": b"null",
        "text": b'"number"',
        "null_text": good.replace(text, b"null"),
        "number_text": good.replace(text, b"3"),
    }


def lines_of_json(good: Callable[[int], dict], *more: bytes, **keys) -> Format:
    def made(n: int) -> bytes:
        return json.dumps(good(n)).encode()

    others = {f"other_{n}": part for n, part in enumerate(more)}
    return Format(file_of("a.json"), made, in_json(made(9)) | others, **keys)


def tree_of_json(good: Callable[[int], object], *more: bytes, before: bytes = b"[", after: bytes = b"]", **keys) -> Format:
    def made(n: int) -> bytes:
        return json.dumps(good(n)).encode()

    others = {f"other_{n}": part for n, part in enumerate(more)}
    refused = ("cut", "not_utf8", "zeros", "noise", "deep", "big_number")
    return Format(file_of("a.json", before=before, between=b",\n", after=after), made, in_json(made(9)) | others, refused=refused, **keys)


def parallel(folder: Path, parts: list) -> Path:
    for word, lines in zip(("en", "de"), zip(*parts)):
        (folder / f"a.{word}").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "a.{en,de}"


def array_record(folder: Path, parts: list) -> Path:
    writer = array_record_module.ArrayRecordWriter(str(folder / "a.ar"), "group_size:1")
    for part in parts:
        writer.write(part)
    writer.close()
    return folder / "a.ar"


def parquet(folder: Path, parts: list, **options) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet as stored

    content, ends = b"".join(part or b"" for part in parts), np.cumsum([0, *(len(part or b"") for part in parts)]).astype(np.int32)
    there = np.packbits([part is not None for part in parts], bitorder="little")
    array = pyarrow.Array.from_buffers(pyarrow.string(), len(parts), [pyarrow.py_buffer(values) for values in (there.tobytes(), ends.tobytes(), content)])
    stored.write_table(pyarrow.table({"text": array}), folder / "a.parquet", row_group_size=3, **options)
    return folder / "a.parquet"


def text(n: int) -> bytes:
    return f"the text number {n} of some".encode()


def said(n: int) -> str:
    return text(n).decode()


NO_TEXT = {"not_utf8": b"n\xffmber", "too_long": b"number " * LONG}
TABLE = {name: part + b",1" for name, part in NO_TEXT.items()} | {"cut": b"number", "more": b"a,1,2", "empty": b",1"}
QUOTES = {"unclosed": b'"number 9, and,1', "unclosed_last": b'number,"1', "only_a_quote": b'"', "escaped": b'"number ""9,1', "cut_quoted": b'"number 9, an'}
FORMATS = {
    "text": Format(file_of("a.txt"), text, NO_TEXT | {"noise": bytes(range(128, 256))}),
    "jsonl": lines_of_json(lambda n: {"text": said(n)}, b'{"text": " "}', b'{"other": "x"}', b'{"text": ["a"]}', b'{"text": "a"} {"text": "b"}'),
    "json": tree_of_json(lambda n: {"text": said(n)}, b'{"text": " "}', b'{"other": "x"}'),
    "csv": Format(file_of("a.csv", before=b"text,n\n"), lambda n: b'"' + text(n) + b', quoted",1', TABLE | QUOTES),
    "csv_plain": Format(file_of("a.csv", before=b"text,n\n"), lambda n: text(n) + b",1", TABLE | QUOTES),
    "tsv": Format(file_of("a.tsv", before=b"text\tn\n"), lambda n: text(n) + b"\t1", {name: part.replace(b",", b"\t") for name, part in TABLE.items()}),
    "conll": Format(
        file_of("a.conll", between=b"\n\n"), lambda n: b"\n".join(word + b" O" for word in text(n).split()),
        {"no_tag": b"the O\nnumber", "no_word": b"\tO\nx\tO", "no_tags": b"number\n9", "not_utf8": b"n\xffmber O", "too_long": b"number O\n" * LONG},
        columns=("text=text", "words=words", "tags=tags"),
    ),
    "squad": tree_of_json(
        lambda n: {"id": f"q{n}", "question": said(n), "answers": [{"text": "a", "answer_start": 0}]},
        b'{"id": "x", "question": "q", "answers": 5}', b'{"id": "x", "question": "q", "answers": {"text": "a"}}', b'{"question": null}',
        before=b'{"data": [{"paragraphs": [{"context": "a context", "qas": [', after=b"]}]}]}", columns=("text=question", "context=context", "answers=answers"),
    ),
    "parallel": Format(
        parallel, lambda n: (text(n), text(n).upper()),
        {"not_utf8": (b"n\xff", b"n"), "not_utf8_there": (b"n", b"n\xff"), "blank": (b" ", b"n"), "blank_there": (b"n", b" "), "too_long": (b"n", b"n" * 2 * LONG)},
        columns=("text=en", "target=de"),
    ),
    "array_record": Format(array_record, text, NO_TEXT | {"empty": b"", "blank": b" "}),
    "array_record_json": Format(array_record, lambda n: json.dumps({"text": said(n)}).encode(), in_json(json.dumps({"text": said(9)}).encode()) | {"no_bytes": b""}),
    "parquet": Format(parquet, text, NO_TEXT | {"empty": b"", "null": None}),
    "chat": lines_of_json(
        lambda n: {"messages": [{"role": "user", "content": said(n)}, {"role": "assistant", "content": "yes"}]},
        b'{"messages": []}', b'{"messages": null}', b'{"messages": "text"}', b'{"messages": {"role": "user"}}', b'{"messages": [{"role": "user", "content": "a"}]}',
        columns=("text=text", "reply=reply"),
    ),
    "multirc": lines_of_json(
        lambda n: {"idx": n, "passage": {"text": said(n), "questions": [{"idx": 0, "question": "q", "answers": [{"idx": 0, "text": "a"}]}]}},
        b'{"idx": 0, "passage": 3}', b'{"idx": 0, "passage": {"text": "a", "questions": []}}',
    ),
    "record": lines_of_json(
        lambda n: {"passage": {"text": "context", "entities": [{"start": 0, "end": 2}]}, "qas": [{"idx": n, "query": said(n)}]}, b'{"passage": {}, "qas": [3]}'
    ),
    "wsc": lines_of_json(
        lambda n: {"idx": n, "text": said(n) + " it", "target": {"span1_text": "text", "span2_text": "it", "span2_index": 6}},
        b'{"idx": 0, "text": "a b", "target": {"span1_text": "a", "span2_text": "b", "span2_index": 9}}',
    ),
    "cluewsc": lines_of_json(
        lambda n: {"idx": n, "text": said(n), "target": {"span1_text": "text", "span2_text": "the", "span2_index": 0}},
        b'{"idx": 0, "text": "a b", "target": {"span1_text": "a", "span2_text": "b", "span2_index": 9}}',
    ),
    "csl": lines_of_json(lambda n: {"id": n, "abst": said(n), "keyword": ["a"]}, b'{"id": 0, "abst": "a", "keyword": 3}'),
    "chid": lines_of_json(lambda n: {"content": [f"number {n} #idiom{n}#"], "candidates": ["a", "b"]}, b'{"content": ["none"], "candidates": []}'),
    "c3": tree_of_json(lambda n: [[said(n)], [{"question": "q", "choice": ["a", "b"]}], f"c{n}"], b'[["a"], 5, "x"]', b'[["a"], [5], "x"]', b'[["a"], [{}]]'),
}  # fmt: skip
CASES = [(name, kind) for name, form in FORMATS.items() for kind in form.damaged]


def kind_of(name: str) -> str:
    return {"csv_plain": "csv", "array_record_json": "array_record"}[name] if name in ("csv_plain", "array_record_json") else name


def spec_of(name: str, folder: Path, parts: list) -> str:
    folder.mkdir()
    return f"{kind_of(name)}:{FORMATS[name].write(folder, parts)}"


def loader(name: str, spec: str, **keys) -> Loader:
    data = Data(source=(spec,), columns=FORMATS[name].columns, **{"holdout": 0.0, "prefetch": 0, "shuffle": False, **keys})
    return Loader(data, featurizer=Whole(), tokenizer=Chars(), seed=0, batch_size=1, streams=1)


def texts(data: Loader, count: int) -> list[str]:
    """Those of the next rows."""
    rows = [next(data) for _ in range(count)]
    return ["".join(map(chr, row["tokens_BL"][row["segments_BL"] > 0])) for row in rows]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_damaged_record_is_named_counted_and_skipped(name, kind, tmp_path, caplog):
    form = FORMATS[name]
    good, bad = [form.good(n) for n in range(GOOD)], form.damaged[kind]
    spec = spec_of(name, tmp_path / "damaged", [*good[:PLACE], bad, *good[PLACE:]])
    if kind in form.refused:
        with pytest.raises(ConfigError, match=r"a\.json is no JSON"):
            loader(name, spec)
        return
    damaged, whole = loader(name, spec), loader(name, spec_of(name, tmp_path / "whole", good))
    expected = texts(whole, GOOD)
    assert len(set(expected)) == GOOD and all(f"number {n}" in text for n, text in enumerate(expected))
    assert texts(damaged, 3 * GOOD) == expected * 3
    assert damaged.stats()["bad_records"] == 1 and len(damaged.bad_records()) == 1
    record, _, reason = damaged.bad_records()[0].partition(": ")
    assert record.startswith("a.") and len(reason) > 5
    assert [entry.message for entry in caplog.records] == [f"skipped {record}: {reason}"]

    # Shuffled, the others come in the order, and under the ids, that they would have with a record that is whole in its place.
    instead = loader(name, spec_of(name, tmp_path / "instead", [*good[:PLACE], form.good(8), *good[PLACE:]]), shuffle=True)
    shuffled = [text for text in texts(instead, 3 * (GOOD + 1)) if "number 8" not in text]
    assert texts(loader(name, spec, shuffle=True), 3 * GOOD) == shuffled != expected * 3
    ids = [[corpus.id(0, n) for n in range(GOOD + 1) if n != PLACE] for corpus in (damaged._corpus, instead._corpus)]
    assert ids[0] == ids[1] or name == "conll"  # where they are numbers of lines, and sentences differ in length

    # Alone, and beyond the cap, it is an error.
    with pytest.raises(ConfigError, match=r"more than data.max_bad_records=0 records cannot be read: a\..*Mend the source, or raise data.max_bad_records"):
        texts(loader(name, spec, max_bad_records=0), GOOD)
    for shuffle in (False, True) if name != "array_record_json" else ():  # records of which none is JSON are text
        with pytest.raises(ConfigError, match="no usable document|which .* does not have"):
            texts(loader(name, spec_of(name, tmp_path / f"alone-{shuffle}", [bad] * 5), shuffle=shuffle), 1)


def test_quotes_that_nothing_closes_take_no_other_row_along(tmp_path):
    """Of rows whose cells hold line ends too; the ids are still the lines that rows begin in."""
    rows = ["text,n", '"one\nmore, ""quoted""",1', '"lost,2', "two,3", '"three\nmore",4', '5" disk,5', 'four,"6', '"five",7', '"lost too']
    (tmp_path / "a.csv").write_text("\n".join(rows), newline="")
    data = loader("csv", f"csv:{tmp_path}/a.csv")
    assert texts(data, 5) == ['one\nmore, "quoted"', "two", "three\nmore", '5" disk', "five"]
    texts(data, 1)
    assert data.bad_records() == [f"a.csv:{line}: broken CSV (a quote is not closed)" for line in (4, 9, 11)]


# ---- whole files ----

SINGLE = [name for name in FORMATS if name != "parallel"]


@pytest.mark.parametrize("damage", ["empty", "missing", "folder", "noise", "half"])
@pytest.mark.parametrize("name", SINGLE)
def test_a_damaged_file_is_named(name, damage, tmp_path, caplog):
    """Beside one that is whole: it is refused, or its loss is told, with its name, and the other is read."""
    form = FORMATS[name]
    spec = spec_of(name, tmp_path / "x", [form.good(n) for n in range(GOOD)])
    path = Path(spec.partition(":")[2])
    content, other = path.read_bytes(), path.with_name("b" + path.suffix)
    if damage == "folder":
        other.mkdir()
    elif damage == "missing":
        other.symlink_to(tmp_path / "nowhere")
    else:
        other.write_bytes({"empty": b"", "noise": bytes(byte | 128 for byte in random.Random(0).randbytes(3000)), "half": content[: len(content) // 2]}[damage])
    try:
        data = loader(name, spec.replace("/a.", "/?."))
        found = texts(data, 2 * GOOD if damage != "half" else GOOD)
    except ConfigError as error:
        assert other.name in str(error)
    else:
        told = " ".join([*data.bad_records(), *(entry.message for entry in caplog.records)])
        assert found == texts(loader(name, spec), len(found))
        assert damage in ("missing", "folder", "half") or other.name in told
    if damage in ("folder", "missing"):
        with pytest.raises(ConfigError, match="matches no file"):
            loader(name, spec.replace("/a.", "/b."))


def test_files_of_parallel_text_stay_together(tmp_path):
    form = FORMATS["parallel"]
    spec = spec_of("parallel", tmp_path / "x", [form.good(n) for n in range(GOOD)])
    other = tmp_path / "x/a.de"
    for content in (b"", other.read_bytes()[:60], b"\n" * 99):
        other.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a.en has 6 lines and .*a.de has \d+ lines"):
            loader("parallel", spec)
    other.unlink()
    with pytest.raises(ConfigError, match="matches no file"):
        loader("parallel", spec)


@pytest.mark.parametrize("name", ["text", "jsonl", "csv", "array_record", "squad"])
def test_compressed_files_that_are_cut_or_changed_are_refused(name, tmp_path):
    form = FORMATS[name]
    spec = spec_of(name, tmp_path / "x", [form.good(n) for n in range(GOOD)])
    path = Path(spec.partition(":")[2])
    packed = gzip.compress(path.read_bytes())
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    for content in (packed[: len(packed) // 2], packed[:-4], bytes(flipped), b"", packed[:12]):
        path.with_name("b.gz").write_bytes(content)
        with pytest.raises(
            ConfigError, match=r"b\.gz cannot be decompressed|b\.gz is empty|holds no document|b\.gz is no" if not content else r"b\.gz cannot be decompressed"
        ):
            loader(name, f"{kind_of(name)}:{path.with_name('b.gz')}")


def test_a_copy_that_lost_its_end_is_made_again(tmp_path, cache):
    """Copies of compressed files in the user's cache folder, and the corpus that is kept there."""
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\ntwo\nthree\n"))
    expected = texts(loader("text", f"text:{tmp_path}/a.gz"), 3)
    for size in (0, 4):
        copy = next((cache / "files").iterdir())
        os.truncate(copy, size)
        sources._opened.cache_clear()  # as in another process
        assert texts(loader("text", f"text:{tmp_path}/a.gz"), 3) == expected == ["one", "two", "three"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "_extract", lambda: [("a", "one"), ("b", "two")])
        whole = python_docs.documents()
        kept = next(path for path in cache.iterdir() if path.is_file())
        content = kept.read_bytes()
        for damaged in (b"", content[:-20], content.replace(b"two", b"2wo"), content.replace(b'"id"', b'"di"'), b"5\n", b"\xff" * 90):
            kept.write_bytes(damaged)
            assert python_docs.documents() == whole == [("a", "one"), ("b", "two")]


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n".join(text(n) for n in range(GOOD)) + b"\n")
    data = loader("text", f"text:{path}")
    assert len(texts(data, 2)) == 2
    os.truncate(path, 3 * len(text(0)) - 5)
    found = texts(data, 2)  # from the third on there are pieces of records, or nothing
    assert found == [said(0), said(1)] and len(data.bad_records()) == 4 and all("it was cut off" in line for line in data.bad_records())


def test_a_row_group_that_is_damaged_costs_its_rows(tmp_path):
    """Of parquet files with checksums every changed byte of a page is found."""
    path = parquet(tmp_path, [text(n) for n in range(GOOD)], write_page_checksum=True, compression="none")
    content = path.read_bytes()
    for at in (content.index(b"number 1"), content.index(b"number 5")):
        path.write_bytes(content[:at] + b"X" + content[at + 1 :])
        data = loader("parquet", f"parquet:{path}")
        kept = range(3, 6) if at < content.index(b"number 3") else range(3)
        assert texts(data, 6) == [said(n) for n in kept] * 2
        assert [line.partition(": ")[2][:33] for line in data.bad_records()] == ["its row group cannot be read (cou"] * 3


def test_a_source_without_weight_is_no_reason_to_go_on_looking(tmp_path):
    """All records that are ever drawn are bad; that those of another source are not helps nothing."""
    (tmp_path / "bad.jsonl").write_text("{\n" * 20)
    (tmp_path / "good.jsonl").write_text('{"text": "one"}\n')
    for weights in ((1.0, 0.0), (1.0, 1e-12)):
        data = Data(source=(f"jsonl:{tmp_path}/bad.jsonl", f"jsonl:{tmp_path}/good.jsonl"), weights=weights, holdout=0.0, prefetch=0)
        with pytest.raises(ConfigError, match="no usable document"):
            next(Loader(data, featurizer=Whole(), tokenizer=Chars(), seed=0, batch_size=1, streams=1))


# ---- chance ----

LINES = ("text", "jsonl", "csv_plain", "csv", "tsv", "chat", "csl")  # a changed byte that is no line end touches one record


def changed(content: bytes, rng: random.Random) -> bytes:
    """A file after an accident."""
    at, size = rng.randrange(len(content)), rng.randint(1, 30)
    return [
        lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        lambda: content[:at],
        lambda: content[:at] + content[at + size :],
        lambda: content[:at] + rng.randbytes(size) + content[at:],
        lambda: content[:at] + bytes(size) + content[at + size :],
        lambda: content[:at] + content[at : at + size] * 3 + content[at + size :],
    ][rng.randrange(6)]()


@pytest.mark.parametrize("name", FORMATS)
def test_accidents_crash_nothing(name, tmp_path, rounds=25):
    """Whatever becomes of a file, its records are read, or bad, or the file is refused."""
    form, rng = FORMATS[name], random.Random(name)
    spec = spec_of(name, tmp_path / "x", [form.good(n) for n in range(GOOD)])
    path = Path(spec.partition(":")[2].replace("{en,de}", "de"))
    content, refused, bad = path.read_bytes(), 0, 0
    for number in range(rounds):
        path.write_bytes(changed(content, rng))
        os.utime(path, ns=(number, number))
        try:
            corpus = documents.Corpus(Data(source=(spec,), columns=form.columns, holdout=0.0), split="train", tokenizer=Chars())
            for n in range(corpus.sizes[0]):
                corpus.document(0, n)
            bad += bool(corpus.bad)
        except ConfigError:
            refused += 1
    assert rounds < 25 or refused + bad > 0


@pytest.mark.parametrize("name", LINES)
def test_a_changed_byte_touches_one_record(name, tmp_path, rounds=40):
    form, rng = FORMATS[name], random.Random(name)
    spec = spec_of(name, tmp_path / "x", [form.good(n) for n in range(GOOD)])
    path = Path(spec.partition(":")[2])
    content, expected = path.read_bytes(), texts(loader(name, spec), GOOD)
    body = content.index(b"\n") + 1 if name in ("csv", "csv_plain", "tsv") else 0  # behind the header
    for number in range(rounds):
        at = rng.choice([n for n in range(body, len(content)) if content[n] != 10])
        new = rng.choice([rng.randrange(256), ord('"'), ord(","), ord("\t"), ord("\\")])
        if new in (10, 13):
            continue
        path.write_bytes(content[:at] + bytes([new]) + content[at + 1 :])
        os.utime(path, ns=(number, number))
        corpus = documents.Corpus(Data(source=(spec,), columns=form.columns, holdout=0.0), split="train")
        found = [corpus.record(0, n) for n in range(corpus.sizes[0])]
        touched = content[body:at].count(b"\n")
        assert len(found) == GOOD
        assert [record and record[0] for n, record in enumerate(found) if n != touched] == [text for n, text in enumerate(expected) if n != touched], (at, new)


@pytest.mark.faults
def test_stores_find_every_changed_byte(tmp_path, record_property):
    """array_record keeps hashes: what is not as it was written is refused or bad, never another text."""
    form, rng = FORMATS["array_record"], random.Random(0)
    spec = spec_of("array_record", tmp_path / "x", [form.good(n) for n in range(GOOD)])
    path = Path(spec.partition(":")[2])
    content = path.read_bytes()
    filled = [at for at, byte in enumerate(content) if byte]  # the others are mostly padding
    for number in range(1000):
        at = rng.choice(filled)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        os.utime(path, ns=(number, number))
        with contextlib.suppress(ConfigError):
            corpus = documents.Corpus(Data(source=(spec,), holdout=0.0), split="train")
            found = [corpus.record(0, n) for n in range(corpus.sizes[0])]
            assert len(found) == GOOD and all(record is None or record[0] == said(n) for n, record in enumerate(found)), at
            assert len(corpus.bad) == found.count(None)
    record_property("fault", "5. changed bytes: array_record")
    record_property("tried", 1000)
    record_property("lost", 0)


@pytest.mark.faults
@pytest.mark.parametrize("name", FORMATS)
def test_many_accidents(name, tmp_path, record_property):
    test_accidents_crash_nothing(name, tmp_path, rounds=1000)
    tried = 1000
    if name in LINES:
        (tmp_path / "one").mkdir()
        test_a_changed_byte_touches_one_record(name, tmp_path / "one", rounds=1000)
        tried += 1000
    record_property("fault", f"5. accidents to files: {name}")
    record_property("tried", tried)
    record_property("lost", 0)


# ---- whole runs ----


def jsonl_of(path: Path, *, bad: tuple[bytes, ...] = ()) -> Path:
    """The lines of the corpus of tests/runs.py as JSON; before every 20th one a bad record."""
    lines = [json.dumps({"text": line}).encode() for line in runs.corpus(path.with_suffix(".txt")).read_text().splitlines()]
    for number, entry in enumerate(bad):
        lines.insert(20 * number + number, entry)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


BAD = (b"{", b'{"text": "n\xff"}', b'{"text": " "}', b'{"text": 5}', b"[" * 5000)


def options_of(path: Path, **changes):
    return runs.tiny("concat", text=path, data__source=(f"jsonl:{path}",), data__shuffle=False, data__streams=1, train__steps=12, **changes)


def test_a_run_past_bad_records_is_the_run_without_them(tmp_path, caplog):
    """The same batches, parameters and losses, read in order by one stream; the records are named once each and counted in metrics.jsonl."""
    seen = {}
    for name, bad in (("damaged", BAD), ("whole", ())):
        path = jsonl_of(tmp_path / f"{name}.jsonl", bad=bad)
        with runs.at_batch(0, runs.stop) as seen[name]:
            assert runs.run(options_of(path), tmp_path / name) == 0
    assert seen["damaged"] == seen["whole"]
    ours, theirs = (runs.leaves(tmp_path / name, 12) for name in seen)
    assert all(ours[path].tobytes() == theirs[path].tobytes() for path in theirs)
    rows = {name: [json.loads(line) for line in runs.metrics(tmp_path / name).splitlines()] for name in seen}
    assert [row["loss"] for row in rows["damaged"] if "loss" in row] == [row["loss"] for row in rows["whole"] if "loss" in row]
    assert rows["damaged"][-1]["validation/loss"] == rows["whole"][-1]["validation/loss"]
    counted = {name: [row["bad_records"] for row in found if "bad_records" in row][-1] for name, found in rows.items()}
    assert counted == {"damaged": len(BAD), "whole": 0}
    named = {entry.message.partition(": ")[0] for entry in caplog.records if entry.message.startswith("skipped")}
    assert named == {f"skipped damaged.jsonl:{21 * number + 1}" for number in range(len(BAD))}


def test_a_run_of_bad_records_alone_ends(tmp_path, capfd, caplog, monkeypatch):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"{\n" * 30)
    monkeypatch.setenv("PTM_TEST_TEXT", str(path))
    command = ["train", f"--config={runs.__file__}:concat", f"--config.data.source=jsonl:{path}"]
    for words, message in (
        ([], "30 documents in all, 30 of them bad"),
        (["--config.data.max_bad_records=3"], "more than data.max_bad_records=3 records cannot be read"),
        (["--config.tokenizer.kind=sentencepiece"], "no text"),
        (["--config.tokenizer.kind=wordpiece"], "no text"),
        (["--config.tokenizer.kind=chars"], "no text"),
    ):
        assert cli.main([*command, f"--workdir={tmp_path / 'run'}{len(words)}{message[:2]}", *words]) == 2, capfd.readouterr().err
        told = capfd.readouterr().err
        assert message in told and "Traceback" not in told and "bad.jsonl" in told
        assert caplog.records[0].message.startswith("skipped bad.jsonl:")
        caplog.clear()


@pytest.mark.faults
def test_damaged_data_sets_of_tfds(tmp_path, record_property):
    """A folder of tensorflow-datasets whose files are cut, changed, emptied or gone: read, bad, or refused."""
    import test_data

    made = subprocess.run([sys.executable, "-c", test_data.TFDS, str(tmp_path)], capture_output=True, text=True, check=True)
    folder, rng, tried = Path(made.stdout.strip().splitlines()[-1]), random.Random(0), 0
    for path in [path for path in sorted(folder.iterdir()) if path.is_file()]:
        content = path.read_bytes()
        for damaged in (None, b"", content[: len(content) // 2], *(changed(content, rng) for _ in range(20))):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            tried += 1
            sources._opened.cache_clear()
            with contextlib.suppress(ConfigError):
                source = sources.open_source(f"tfds:{folder}/train", data=Data(source=("tfds:x",), columns=("text=body",)))
                for n in range(len(source)):
                    with contextlib.suppress(BadRecord):
                        source.read(n)
                pipeline.sources.fingerprint(source)
            path.write_bytes(content)
    record_property("fault", "5. accidents to files: tfds")
    record_property("tried", tried)
    record_property("lost", 0)
