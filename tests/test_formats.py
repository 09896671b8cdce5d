"""Formats of sources, what data.columns makes of their records, and files that are compressed or in archives."""

import bz2
import concurrent.futures
import dataclasses
import gzip
import json
import os
import pathlib
import sys
import zipfile
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm import config, fields
from ptm.config import Data
from ptm.data import documents, files, pipeline, sources
from ptm.data.batch import Field
from ptm.data.loader import Loader
from ptm.data.records import BadRecord, Columns
from ptm.fields import ConfigError


class Chars:
    def encode(self, text):
        return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int32)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "ptm" / "files"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(*specs, split="train", **keys):
    """({id: fields}, bad records) of the sources."""
    corpus = documents.Corpus(Data(source=specs, **{"holdout": 0.0, **keys}), split=split)
    places = [(source, n) for source, size in enumerate(corpus.sizes) for n in range(size)]
    found = {corpus.id(*place): corpus.record(*place) for place in places}
    return {name: {"text": record[0], **record[1]} for name, record in found.items() if record}, corpus.describe_bad()


# ---- columns ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """Stands for the Config of a model or an objective."""

    name: ClassVar[str] = "named"


ROW = {"s": "a film", "label": "1", "n": 3, "x": 2.5, "flag": True, "words": ["a", "b"], "nested": {"deep": [{"text": "t"}]}, "none": None, "a.b": "dot"}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("s", "a film"),
        ("words", ["a", "b"]),
        ("nested.deep.0.text", "t"),
        ("a.b", "dot"),
        ("none", None),
        ("sst2: {s}", "sst2: a film"),
        ("{s} is {label|0=bad|1=good}, {n}/{x}", "a film is good, 3/2.5"),
        ("{flag|true=yes|false=no}{label|1=}", "yes"),
        ("{nested.deep.0.text} = {{{s}}}", "t = {a film}"),
        (" spaced = out ", "spaced = out"),
    ],
)
def test_columns_and_templates(entry, value):
    row = ROW | {"spaced = out": "spaced = out"}
    assert Columns(("text=s", f"field={entry}")).read(row) == {"text": "a film", "field": value}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gone", "no column 'gone'"),
        ("nested.deep.1.text", "no '1' in column 'nested.deep.1.text'"),
        ("{gone} {s}", "no column 'gone'"),
        ("{label|0=bad|2=good}", "column 'label' is '1', which data.columns does not translate; it knows: 0, 2"),
        ("{words}", "column 'words' is list, and a template takes text and numbers"),
        ("{none}", "column 'none' is null"),
    ],
)
def test_what_a_record_lacks_is_told(entry, message):
    with pytest.raises(BadRecord, match=message):
        Columns(("text=s", f"field={entry}")).read(ROW)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("text=a {s",), "brace at character 3 of 'a {s'.*close it, or double it"),
        (("text=s} b",), "brace at character 2"),
        (("text={}",), "brace at character 1"),
        (("text={s|0}",), "not of the form {COLUMN}"),
        (("text={ |0=1}",), "not of the form {COLUMN}"),
        (("text",), "not of the form FIELD=COLUMN"),
        (("text=",), "not of the form FIELD=COLUMN"),
        (("text=s", "text=t"), "maps the field 'text' twice"),
        (("text=s", "1:a=s", "1:a=t"), "'a' twice for source 1"),
        (("1:text=s",), "'text' of source 0"),
    ],
)
def test_entries_that_cannot_be_meant(entries, message):
    with pytest.raises(ConfigError, match=message):
        Columns(entries)


def test_entries_are_per_source_and_validation_takes_those_of_its_number(tmp_path):
    a, b = write(tmp_path / "a.jsonl", '{"s": "one", "y": 0}\n'), write(tmp_path / "b.jsonl", '{"q": "two", "y": "w", "c": "ctx"}\n')
    specs, keys = (f"jsonl:{a}", f"jsonl:{b}"), {"columns": ("text=x: {s}", "label={y|0=no}", "1:text=q", "1:label=y", "1:context=c")}
    expected = {"0/a.jsonl:1": {"text": "x: one", "label": "no"}, "1/b.jsonl:1": {"text": "two", "label": "w", "context": "ctx"}}
    assert read(*specs, **keys) == (expected, [])
    assert read(*specs, split="validation", validation_source=specs, **keys) == (expected, [])
    corpus = documents.Corpus(Data(source=specs, holdout=0.0, **keys), split="train", tokenizer=Chars())
    first, second = (corpus.document(source, 0) for source in (0, 1))
    assert [(found.source, found.id) for found in (first, second)] == [(0, "0/a.jsonl:1"), (1, "1/b.jsonl:1")]
    assert [piece.source for piece in documents.cut(second, size=2, mark="#")] == [1, 1]
    with pytest.raises(ConfigError, match="entry for source 2; there are 2"):
        fields.check(Data(source=specs, columns=("text=s", "2:text=s")), "data")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab,\"' ()[]={}|:"), max_size=8), max_size=4))
def test_templates_survive_the_command_line(items):
    annotation = tuple[str, ...]
    assert fields.parse(fields.unparse(tuple(items)), annotation, "data.columns") == tuple(items)


def test_a_template_with_commas_is_an_override():
    cfg = config.base(objective=Named(), model=Named())
    registries = {kind: {"named": Named} for kind in ("model", "objective", "eval")}
    config.override(cfg, "data.columns", 'label=y,"text=a, b: {s}"', registries)
    assert cfg.data.columns == ("label=y", "text=a, b: {s}")


def test_a_column_that_no_first_record_has_stops_at_once(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", '{"body": "x", "title": "t"}\n' * 300)
    with pytest.raises(ConfigError, match="data.columns maps text to column 'text', which jsonl:.* does not have; it has: body, title"):
        read(f"jsonl:{path}")
    with pytest.raises(ConfigError, match="it has: 0, 1. Name the one that is meant, text=COLUMN.$"):
        read("tsv:" + write(tmp_path / "a.tsv", "a\tb\n"), columns=("text=2",))
    with pytest.raises(ConfigError, match="it has: a, b. .*If its first row is no header, give its columns as numbers"):
        read("tsv:" + write(tmp_path / "b.tsv", "a\tb\nc\td\n"), columns=("text=word",))
    assert not caplog.records
    sparse = write(tmp_path / "b.jsonl", '{broken\n{"body": "x"}\n{"body": "x", "text": "good"}\n')
    found, bad = read(f"jsonl:{sparse}")
    assert list(found) == ["b.jsonl:3"] and len(bad) == 2  # one of the first records has it: the others are bad, and named


def test_a_plain_record_becomes_a_document_as_a_stored_one():
    data = Data(source=("text:x", "text:y"), columns=("text=q: {s}", "label=y", "1:text=2"))
    make = lambda record, **keys: documents.document_of(record, id="in:1", data=data, tokenizer=Chars(), **keys)  # noqa: E731
    found = make({"s": "hi", "y": 3})
    assert (found.id, found.source, found.columns, bytes(found.tokens_L.tolist()).decode()) == ("in:1", 0, {"label": 3}, "q: hi")
    assert make({"s": "hi"}, optional=("label",)).columns == {} and make({"s": "hi", "label": 4}).columns == {"label": 4}
    assert len(make({"text": "numbered", "y": 1}, source=1).tokens_L) == 8  # a column without a name of its own
    for record, message in (
        ({"s": "hi"}, "no column 'y'"),
        ({"y": 1}, "no column 's'"),
        ({"s": ["hi"], "y": 1}, "is list"),
        ({"s": "\ud800", "y": 1}, "not Unicode"),
    ):
        with pytest.raises(BadRecord, match=message):
            make(record)
    for text, message in ((" ", "empty text"), (3, "is int, not text")):
        with pytest.raises(BadRecord, match=message):
            make({"2": text, "y": 1}, source=1)


# ---- formats ----

CONLL = """-DOCSTART- -X- O O

EU NNP I-NP B-ORG
rejects VBZ I-VP O

-DOCSTART- -X- O O
German\u00a0x JJ I-NP B-MISC
. . O O
 \t
alone O
"""


def test_conll(tmp_path):
    columns = ("text=text", "words=words", "tags=tags")
    found, bad = read("conll:" + write(tmp_path / "a.conll", CONLL.replace("\n", "\r\n")), columns=columns)
    assert found == {
        "a.conll:3": {"text": "EU rejects", "words": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        "a.conll:7": {"text": "German\u00a0x .", "words": ["German\u00a0x", "."], "tags": ["B-MISC", "O"]},
        "a.conll:10": {"text": "alone", "words": ["alone"], "tags": ["O"]},
    }
    assert not bad
    tabs = write(tmp_path / "b.tsv", "New York\tB-LOC\n\tO\n\nMr\tO\nX\n\nKim\tB-PER\n\nno\n")
    found, bad = read(f"conll:{tabs}", columns=columns)
    assert found == {"b.tsv:7": {"text": "Kim", "words": ["Kim"], "tags": ["B-PER"]}}
    assert bad == ["b.tsv:1: line 2 of the sentence has no word", "b.tsv:4: the word 'X' has no tag", "b.tsv:9: no column 'tags'"]
    assert read(f"conll:{tabs}", columns=columns[:2])[0]["b.tsv:9"] == {"text": "no", "words": ["no"]}  # to be tagged
    with pytest.raises(ConfigError, match="holds no document"):
        read("conll:" + write(tmp_path / "c", "-DOCSTART- O\n\n"))


def squad_file(path, *questions, context="In Rome. Rome!", **keys):
    return "squad:" + write(path, json.dumps({"data": [{"paragraphs": [{"context": context, "qas": list(questions)}], **keys}]}))


def question(name, *answers, **keys):
    return {"id": name, "question": f"where {name}?", "answers": [{"text": text, "answer_start": start} for text, start in answers], **keys}


QA = ("text=question", "context=context", "answers=answers", "id=id", "no=is_impossible", "title=title")


def test_squad(tmp_path):
    questions = question("a", ("Rome", 3), ("Rome", 9)), question("b", ("rome", 3)), question("c", is_impossible=True)
    spec = squad_file(tmp_path / "q.json", *questions, title="T")
    found, bad = read(spec, columns=QA)
    both = [{"text": "Rome", "answer_start": 3}, {"text": "Rome", "answer_start": 9}]
    both = [{"text": "Rome", "answer_start": 3}, {"text": "Rome", "answer_start": 9}]
    assert found["q.json:a"] == {"text": "where a?", "context": "In Rome. Rome!", "answers": both, "id": "a", "no": False, "title": "T"}
    assert found["q.json:b"]["answers"] == [{"text": "rome", "answer_start": 3}] and not bad  # wrong, and the question can be asked all the same
    assert found["q.json:c"]["answers"] == [] and found["q.json:c"]["no"] is True
    written, bad = read(spec, columns=("text={context} {question}", "target={answers.0.text}"))  # as text to text
    assert written["q.json:b"] == {"text": "In Rome. Rome! where b?", "target": "rome"} and bad == ["q.json:c: no '0' in column 'answers.0.text'"]
    twice = read(squad_file(tmp_path / "d.json", question("a"), question("a"), {"id": "u", "question": "?"}), columns=QA[:2])
    assert list(twice[0]) == ["d.json:1", "d.json:2", "d.json:3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON"),
        ("[]", "not in SQuAD's format"),
        ('{"version": 2}', "not in SQuAD's format.*KeyError: 'data'"),
        ('{"data": [3]}', "not in SQuAD's format"),
    ],
)
def test_files_that_are_not_squads(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read("squad:" + write(tmp_path / "q.json", content), columns=QA)


def test_broken_questions_are_bad_records(tmp_path):
    spec = squad_file(
        tmp_path / "q.json", question("a"), {"id": "b"}, {"id": "c", "question": "c?", "answers": ["Rome"]}, {"id": "d", "question": 3, "answers": []}
    )
    found, bad = read(spec, columns=QA)
    assert list(found) == ["q.json:a"]
    assert [line.partition(": ")[2][:30] for line in bad] == ["no question", "an answer is Rome, not a text ", "column 'question' is int, not "]


def test_a_list_of_json_objects(tmp_path):
    found, bad = read("json:" + write(tmp_path / "a.json", '\ufeff[{"text": "one"}, 2, {"text": "three"}]'))
    assert found == {"a.json:1": {"text": "one"}, "a.json:3": {"text": "three"}} and bad == ["a.json:2: JSON int, not an object"]
    with pytest.raises(ConfigError, match="a list of objects"):
        read("json:" + write(tmp_path / "b.json", '{"text": "one"}'))


def test_parallel_text(tmp_path):
    write(tmp_path / "x.en", "one\ntwo\n\nfour\n\n"), write(tmp_path / "x.de", "\ufeffeins\r\n \r\ndrei\r\nvier\r\n\r\n")
    found, bad = read(f"parallel:{tmp_path}/x.{{en,de}}", columns=("text=en", "target=de: {de}"))
    assert found == {"x.en:1": {"text": "one", "target": "de: eins"}, "x.en:4": {"text": "four", "target": "de: vier"}}
    assert bad == ["x.en:2: the line is empty in 'de'", "x.en:3: the line is empty in 'en'"]
    assert list(read(f"parallel:{tmp_path}/x.{{de,en}}", columns=("text=de",))[0]) == ["x.de:1", "x.de:3", "x.de:4"]  # of one language what it has
    write(tmp_path / "x.fr", "un\n" * 1200)
    with pytest.raises(ConfigError, match=r"x.en has 5 lines and .*x.fr has 1,200 lines: parallel text needs the same number"):
        read(f"parallel:{tmp_path}/x.{{en,fr}}", columns=("text=en",))
    for path in ("x.en", "x.{en}", "x.{en,}", "{a,b}.{en,de}", "x.{en,en}"):
        with pytest.raises(ConfigError, match="write the words that differ"):
            read(f"parallel:{tmp_path}/{path}", columns=("text=en",))
    with pytest.raises(ConfigError, match="matches no file"):
        read(f"parallel:{tmp_path}/x.{{en,it}}", columns=("text=en",))
    with pytest.raises(ConfigError, match="it has: en, de"):
        read(f"parallel:{tmp_path}/x.{{en,de}}")
    write(tmp_path / "y.en", "more")
    with pytest.raises(ConfigError, match="different numbers of files: 2 of 'en', 1 of 'de'"):
        read(f"parallel:{tmp_path}/?.{{en,de}}", columns=("text=en",))


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet

    rows = [{"text": f"row {n}", "answers": [{"text": "x", "answer_start": n}], "label": n, "raw": b"abc", "unused": [n] * 5} for n in range(23)]
    for number, part in enumerate((rows[:10], rows[10:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), str(tmp_path / f"{number}.parquet"), row_group_size=4)
    monkeypatch.setattr("ptm.data.formats.stores.ROW_GROUP_BYTES", 300)  # one or two row groups
    columns = ("text=text", "answers=answers", "label={label}", "raw=raw", "start=answers.0.answer_start")
    spec = f"parquet:{tmp_path}/*.parquet"
    expected = [{"text": row["text"], "answers": row["answers"], "label": str(row["label"]), "raw": "abc", "start": n} for n, row in enumerate(rows)]
    found, bad = read(spec, columns=columns)
    assert list(found.values()) == expected and not bad and list(found)[9:11] == ["0.parquet:10", "1.parquet:1"]
    source = sources.open_source(spec, data=Data(source=(spec,), columns=columns))
    order = np.random.default_rng(0).permutation(23).tolist() * 2
    assert [source.read(n) for n in order] == [expected[n] for n in order] and len(source._kept) <= 2
    with pytest.raises(ConfigError, match="column 'body', which parquet:.* does not have; it has: text, answers, label, raw, unused"):
        read(spec, columns=("text=body",))
    with pytest.raises(ConfigError, match="is no parquet file"):
        read("parquet:" + write(tmp_path / "broken", "PAR1"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow, which is not installed; install it with: pip install 'ptm\[parquet\]'"):
        read(spec, columns=("text=label",))


# ---- compressed files and archives ----

LINES = "one\ntwo\n"


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return str(path)


def test_compressed_files_read_as_plain_ones(tmp_path, cache):
    contents = {"a.txt": LINES.encode(), "a.txt.gz": gzip.compress(LINES.encode()), "a.txt.bz2": bz2.compress(LINES.encode())}
    for name, content in contents.items():
        write(tmp_path / name, content)
        assert read(f"text:{tmp_path}/{name}") == ({"a.txt:1": {"text": "one"}, "a.txt:2": {"text": "two"}}, [])
    assert len(list(cache.iterdir())) == 2
    assert list(read(f"text:{tmp_path}/a.txt*")[0]) == [f"{name}:{n}" for name in sorted(contents) for n in (1, 2)]  # ids differ where both are read
    packed = archive(tmp_path / "p.zip", {"in/x.en.gz": gzip.compress(b"one\n"), "in/x.de": "eins\n", "in/.hidden": "h", "y.de": "z"})
    assert read(f"text:{packed}/in/x.en.gz")[0] == {"x.en:1": {"text": "one"}}
    assert list(read(f"text:{packed}/**")[0]) == ["x.de:1", "x.en:1", "y.de:1"] and list(read(f"text:{tmp_path}/p*.zip/*/*.de")[0]) == ["x.de:1"]
    write(tmp_path / "x.en.gz", gzip.compress(b"one\n")), write(tmp_path / "x.de.gz", gzip.compress(b"eins\n"))
    assert read(f"parallel:{tmp_path}/x.{{en,de}}.gz", columns=("text=en", "target=de"))[0] == {"x.en:1": {"text": "one", "target": "eins"}}


def test_a_changed_file_is_decompressed_again_and_an_unchanged_one_is_not(tmp_path, cache):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"old\n"))
    data = Data(source=(f"text:{path}",))
    before = pipeline.fingerprint(data)
    assert read(f"text:{path}")[0]["a.txt:1"] == {"text": "old"}
    (copy,) = cache.iterdir()
    stamp = copy.stat().st_mtime_ns
    assert files.find(path, "text")[0].path == str(copy) and copy.stat().st_mtime_ns == stamp
    write(tmp_path / "a.txt.gz", gzip.compress(b"new\n"))
    os.utime(path, ns=(1, 1))
    assert read(f"text:{path}")[0]["a.txt:1"] == {"text": "new"} and len(list(cache.iterdir())) == 2
    assert pipeline.fingerprint(data) != before
    both = Data(source=(f"text:{tmp_path}/*.txt*",))
    write(tmp_path / "b.txt", "one\n")
    before = pipeline.fingerprint(both)
    write(tmp_path / "b.txt", "two!\n")
    assert pipeline.fingerprint(both) != before
    packed = archive(tmp_path / "p.zip", {"a": "one", "b": "one"})
    of_a, of_b = (pipeline.fingerprint(Data(source=(f"text:{packed}/{name}",))) for name in "ab")
    archive(tmp_path / "p.zip", {"a": "one", "b": "two"})
    os.utime(packed, ns=(1, 1))
    assert of_a != of_b != pipeline.fingerprint(Data(source=(f"text:{packed}/b",)))


def test_several_may_decompress_at_once(tmp_path, cache):
    content = "".join(f"line {n}\n" for n in range(50_000)).encode()
    path = write(tmp_path / "a.gz", gzip.compress(content))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: files.find(path, "text")[0].path, range(6)))
    assert len(set(found)) == 1 and pathlib.Path(found[0]).read_bytes() == content and len(list(cache.iterdir())) == 1


def test_no_member_is_written_outside_the_cache(tmp_path, cache):
    outside = tmp_path / "deep" / "er"
    outside.mkdir(parents=True)
    path = archive(outside / "evil.zip", {"../../evil.txt": "evil\n", "/abs.txt": "evil\n", "ok.txt": "fine\n"})
    for pattern in ("**/*.txt", "../../evil.txt", "/abs.txt"):
        with pytest.raises(ConfigError, match="allowed: names below the archive"):
            read(f"text:{path}/{pattern}")
    assert read(f"text:{path}/ok.txt")[0].popitem()[1] == {"text": "fine"}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and cache not in p.parents) == ["evil.zip"]
    assert all(copy.parent == cache for copy in cache.rglob("*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: write(at / "a.gz", b"no gzip"), "a.gz cannot be decompressed .*Not a gzipped file"),
        (lambda at: write(at / "a.gz", gzip.compress(os.urandom(9999))[:-40]), "a.gz cannot be decompressed .*fetch it again"),
        (lambda at: write(at / "b.zip", b"PK no zip") + "/x", "b.zip cannot be read as a zip archive"),
        (lambda at: archive(at / "c.zip", {"x": "y"}) + "/z", "matches no file .*c.zip holds: x"),
        (lambda at: archive(at / "d.zip", {"x": "y"}), "is an archive; name what is to be read of it, as .*d.zip/MEMBER.*It holds: x"),
        (lambda at: write(at / "e.gz", gzip.compress(bytes(3_000_000))), "e.gz becomes more than 250 times larger"),
        (lambda at: archive(at / "f.zip", {"x": bytes(3_000_000)}) + "/x", "f.zip/x becomes more than 250 times larger"),
    ],
)
def test_what_cannot_be_decompressed(tmp_path, cache, monkeypatch, make, message):
    monkeypatch.setattr(files, "ALWAYS_ALLOWED", 0)
    with pytest.raises(ConfigError, match=message):
        read("text:" + make(tmp_path))
    assert not cache.exists() or not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", write(tmp_path / "file", "no folder"))
    with pytest.raises(ConfigError, match="name another place by XDG_CACHE_HOME"):
        read("text:" + write(tmp_path / "a.gz", gzip.compress(b"a")))


# ---- weights, vocabularies, whole records ----


def test_temperature_flattens_the_sizes_of_the_sources(tmp_path):
    specs = tuple("text:" + write(tmp_path / f"{n}.txt", f"{n} text\n" * size) for n, size in enumerate((900, 100)))
    shares = {}
    for temperature in (1.0, 2.0, 1e6):
        weights = documents.Corpus(Data(source=specs, temperature=temperature, holdout=0.0), split="train").weights
        shares[temperature] = weights[0] / sum(weights)
    assert shares == pytest.approx({1.0: 0.9, 2.0: 0.75, 1e6: 0.5}, abs=1e-3)
    data = Data(source=specs, temperature=2.0, holdout=0.0, prefetch=0)
    drawn = Loader(data, featurizer=Whole(), tokenizer=Chars(), seed=0, batch_size=8, streams=8)
    first = np.concatenate([next(drawn)["tokens_BL"][:, 0] for _ in range(128)])
    assert np.mean(first == ord("0")) == pytest.approx(0.75, abs=0.01)
    texts = list(documents.training_texts(data, limit_bytes=240))
    assert [sum(len(text) for text in texts if text[0] == number) for number in "01"] == [180, 60]
    for keys, message in (({"temperature": 0.0}, "temperature=0.0 is not above 0"), ({"temperature": 2.0, "weights": (1.0, 1.0)}, "say the same in two ways")):
        with pytest.raises(ConfigError, match=message):
            fields.check(Data(source=specs, **keys), "data")


def test_a_vocabulary_is_trained_on_all_texts_of_a_record(tmp_path):
    write(tmp_path / "x.en", "one\ntwo\n"), write(tmp_path / "x.de", "eins\nzwei\n")
    data = Data(source=(f"parallel:{tmp_path}/x.{{en,de}}",), columns=("text=en", "target=de", "other=de"), holdout=0.0)
    assert sorted(documents.training_texts(data, limit_bytes=99, fields=("text", "target", "context"))) == ["eins", "one", "two", "zwei"]
    assert sum(map(len, documents.training_texts(data, limit_bytes=9, fields=("text", "target")))) == 9
    assert set(config.Tokenizer().train_fields) == {"text", "pair", "context", "target"}


class Whole:
    """A row for each piece of a document, cut at the end of the row."""

    def __init__(self):
        self.lengths, self.packing, self.raw_length, self.visits, self.max_segments = {"L": 16}, "none", None, None, None
        self.fields = {"tokens_BL": Field(is_tokens=True), "size_B": Field()}

    def features(self, doc, *, rng, draw):
        yield {"tokens_BL": doc.tokens_L[:16], "size_B": np.int32(len(draw(rng).tokens_L))}

    def finish(self, row):
        return row


class Task(Whole):
    columns = ("label",)


def test_the_records_of_a_task_are_never_cut(tmp_path):
    path = write(tmp_path / "a.txt", "0123456789" * 10 + "\n")

    def rows(featurizer, **keys):
        data = Data(source=("text:x",), validation_source=(f"text:{path}",), **{"max_record_tokens": 20, **keys})
        batches = pipeline.validation_batches(data, featurizer=featurizer, tokenizer=Chars(), seed=0, batch_size=8)
        return [batch["size_B"][(batch["segments_BL"] > 0).any(axis=1)].tolist() for batch in batches]

    assert rows(Whole()) == [[20] * 5] and rows(Task()) == [[100]]
    data = Data(source=(f"text:{path}",), holdout_by="tail", holdout=0.1)
    with pytest.raises(ConfigError, match="holdout_by=tail cuts every text in two, and Task reads records whole"):
        Loader(data, featurizer=Task(), tokenizer=Chars(), seed=0, batch_size=2, streams=2)


# ---- the real files ----

NLI, SPANS = ("text=sentence1", "pair=sentence2", "label=label"), ("text=question", "context=context", "answers=answers")
REAL = {
    "sst2": ("tsv:classify/sst2/alps_dev.tsv", ("text=sentence", "label=label"), 6735, 0),
    "stsb": ("tsv:classify/stsb/sts-train.csv", ("text=5", "pair=6", "label=4"), 5749, 0),
    "rte": ("tsv:classify/rte/train.tsv", NLI, 2127, 0),
    "chnsenticorp": ("tsv:classify/chnsenticorp/chnsenticorp.zip/train.tsv", ("text=text_a", "label=label"), 9600, 0),
    "wikigold": ("conll:tag/wikigold/wikigold.conll.txt", ("text=text", "words=words", "tags=tags"), 1696, 0),
    "cmrc2018": ("squad:qa/cmrc2018/cmrc2018_dev.json", SPANS, 3219, 0),
    "xquad": ("squad:qa/xquad/xquad.zh.json", SPANS, 1190, 0),
    "multi30k": ("parallel:seq2seq/multi30k/val.{en,de}.gz", ("text=en", "target=de"), 1014, 0),
    "aeslc": ("jsonl:seq2seq/aeslc/dev.jsonl", ("text=body", "target=subject"), 1921, 0),
    "blimp": ("jsonl:probe/blimp/BLiMP.zip/data/wh_*.jsonl", ("text=sentence_good",), 8000, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_read_whole(name):
    folder = os.environ.get("PTM_DATA")
    if not folder:
        pytest.skip("PTM_DATA is not set: no real data")
    spec, columns, count, bad = REAL[name]
    kind, _, path = spec.partition(":")
    found, faults = read(f"{kind}:{folder}/{path}", columns=columns)
    assert (len(found), len(faults)) == (count - bad, bad)
