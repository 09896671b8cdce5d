"""What `ptm prepare` reads: the records of `data.source`, whole or cut, plain or compressed, from this machine or from a store."""

import gzip
import json
import lzma
import zipfile

import fsspec
import pytest

from ptm.config import Data
from ptm.data import files, records, sources
from ptm.fields import ConfigError
from ptm.prepare import options as options_lib
from ptm.prepare import reading, stages
from ptm.prepare.options import Options

LINES = "\ufefffirst\r\n\n \t\nse cond\n\n\nthird and\nits next line\r\n\nlast 天".encode()


def made(source: str, **given: str) -> Options:
    return options_lib.parse({"source": source, "output": "none", **given})[0]


def read(source: str, **given: str) -> list[tuple[str, str | None]]:
    """(id, text) of all documents."""
    options = made(source, **given)
    return [(document.id, document.text) for unit in reading.units(options) for document in reading.documents(unit, options)]


def of_data(source: str, **given: str) -> list[tuple[str, str | None]]:
    """The same as a run reads them."""
    data = Data(source=(source,), document=given.get("document", "line"), columns=(given["columns"],) if "columns" in given else ("text=text",))
    opened = sources.open_source(source, data=data)

    def text(number: int) -> str | None:
        try:
            return opened.read(number)["text"]
        except records.BadRecord:
            return None

    return [(opened.id(number), text(number)) for number in range(len(opened))]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_bytes(LINES)
    (tmp_path / "x.txt").write_bytes(b"one\n\xff\ntwo")
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n\n{"text": " "}\n{"text": 3}\nno\n{"body": "x"}\n' + json.dumps({"text": "two\n"}))
    (tmp_path / "x.csv").write_text('text,n\n"a ""b""\nc",1\nd,2\n')
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "given"),
    [
        *(("text:{}/**/x.txt", {"document": document}) for document in ("line", "paragraph", "file")),
        ("jsonl:{}/x.jsonl", {}),
        ("csv:{}/x.csv", {}),
        ("csv:{}/x.csv", {"columns": "text={n}: {text}"}),
        ("python_docs:", {}),
    ],
)
def test_it_reads_what_a_run_reads(folder, spec, given):
    spec = spec.format(folder)
    assert read(spec, **given) == of_data(spec, **given)


def test_what_cannot_be_used_is_told_apart(folder):
    options = made(f"jsonl:{folder}/x.jsonl")
    problems = {document.id: stages.judge(document, options, None).rule for document in reading.documents(reading.units(options)[0], options)}
    assert problems["x.jsonl:3"] == stages.EMPTY
    assert [id for id, rule in problems.items() if rule == stages.BAD] == ["x.jsonl:4", "x.jsonl:5", "x.jsonl:6"]


@pytest.mark.parametrize("size", range(1, 70, 3))
def test_files_are_cut_between_lines(folder, size):
    options = made(f"text:{folder}/a/x.txt")
    (unit,) = reading.units(options)
    parts = reading.cut(unit, options, size=size)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]] and (parts[0].start, parts[-1].stop or len(LINES)) == (0, len(LINES))
    assert [d for part in parts for d in reading.documents(part, options)] == list(reading.documents(unit, options))
    assert size > 50 or len(parts) > 1


@pytest.mark.parametrize("document", ["paragraph", "file"])
def test_other_documents_are_not_cut(folder, document):
    options = made(f"text:{folder}/a/x.txt", document=document)
    assert reading.cut(reading.units(options)[0], options, size=5) == reading.units(options)


def test_compressed_and_archived(folder):
    plain = read(f"text:{folder}/a/x.txt")
    (folder / "x.txt.gz").write_bytes(gzip.compress(LINES))
    (folder / "x.txt.xz").write_bytes(lzma.compress(LINES))
    with zipfile.ZipFile(folder / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/x.txt", LINES)
    for path in ("x.txt.gz", "x.txt.xz", "b.zip/in/x.txt", "b.zip/**/*.txt"):
        assert read(f"text:{folder}/{path}") == plain, path


@pytest.mark.parametrize("path", ["x.txt", "*.txt.gz", "x.csv"])
def test_stores(folder, path):
    (folder / "x.txt.gz").write_bytes(gzip.compress(LINES))
    store = fsspec.filesystem("memory")
    for found in folder.glob(path):
        store.pipe(f"/corpus/{found.name}", found.read_bytes())
    kind = "csv" if path.endswith("csv") else "text"
    try:
        here, there = (made(f"{kind}:{place}/{path}") for place in (folder, "memory://corpus"))
        assert read(there.source[0]) == read(here.source[0]) != []
        fingerprints = [entry["fingerprint"] for options in (here, there) for entry in reading.fingerprints(options)]
        assert fingerprints[0] == fingerprints[1]
    finally:
        store.rm("/corpus", recursive=True)
    with pytest.raises(ConfigError, match="matches no file"):
        reading.units(there)


def test_fingerprints_are_those_of_a_run(folder):
    spec = f"text:{folder}/**/x.txt"
    assert reading.fingerprints(made(spec))[0]["fingerprint"] == sources.fingerprint(sources.open_source(spec, data=Data(source=(spec,))))


def test_damaged_and_made_to_fill_disks(folder, monkeypatch):
    content = gzip.compress(LINES * 1000)
    (folder / "cut.gz").write_bytes(content[:-20])
    with pytest.raises(ConfigError, match="cut.gz cannot be read"):
        read(f"text:{folder}/cut.gz")
    (folder / "bomb.gz").write_bytes(gzip.compress(b"a line\n" * 100_000))
    monkeypatch.setattr(files, "ALWAYS_ALLOWED", 1000)
    with pytest.raises(ConfigError, match="250 times larger"):
        read(f"text:{folder}/bomb.gz")


def test_a_line_that_is_too_long_is_a_bad_record(folder, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 20)
    (folder / "long.txt").write_bytes(b"short\n" + b"x" * 50 + b"\n" + b"y" * 20 + b"\n" + b"z" * 200)
    found = read(f"text:{folder}/long.txt")
    assert found == [("long.txt:1", "short"), ("long.txt:2", None), ("long.txt:3", "y" * 20), ("long.txt:4", None)]


def test_sets_that_cannot_be_read_in_full_are_refused(folder):
    options = made("text:none", evals=f"exam=jsonl:{folder}/x.jsonl")
    with pytest.raises(ConfigError, match=r"x.jsonl:4: column 'text' is int.*--eval_columns"):
        list(reading.eval_texts(0, options))
