"""Random access to the records of text, jsonl, csv, tsv, array_record, tfds and python_docs sources.

A source keeps byte offsets in memory, never text. Every record has a stable id, '<file name>:<line>' where it comes from a file.
"""

import csv
import functools
import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from ptm import fields
from ptm.config import Data
from ptm.data import offsets, python_docs
from ptm.fields import ConfigError

MEGABYTE = 1 << 20


class BadRecord(Exception):
    """A record that cannot be used; the message is the reason."""


class Source:
    """`len(source)` records, each with an id and the fields that `columns` (field -> column) asks for."""

    def __init__(self, name: str, *, columns: Mapping[str, str], known: tuple[str, ...] | None):
        """`known` are the columns that every record has, or None where each record names its own."""
        self.name, self.columns = name, dict(columns)
        for field, column in self.columns.items():
            if known is not None and column not in known:
                raise ConfigError(
                    f"data.columns maps {field} to column '{column}', which {name} does not have; it has: {', '.join(known)}.{fields.nearest(column, known)}"
                )

    def __len__(self) -> int:
        raise NotImplementedError

    def id(self, index: int) -> str:
        """The stable name of a record."""
        raise NotImplementedError

    def raw(self, index: int) -> Mapping[str, Any]:
        """All columns of a record; raises BadRecord."""
        raise NotImplementedError

    def digests(self) -> list[tuple[str, int, str]]:
        """(name, bytes, sha256 of the first and last megabyte) of everything that records come from."""
        raise NotImplementedError

    def read(self, index: int) -> dict[str, Any]:
        """The mapped fields of a record, `text` a string that is not blank; raises BadRecord with the reason."""
        raw = self.raw(index)
        record = {}
        for field, column in self.columns.items():
            if column not in raw:
                raise BadRecord(f"no column '{column}'")
            record[field] = _plain(raw[column])
        text = record["text"]
        if not isinstance(text, str):
            raise BadRecord(f"column '{self.columns['text']}' is {type(text).__name__}, not text")
        if not text or text.isspace():
            raise BadRecord("empty text")
        return record


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return _decode(value)
    return value.item() if isinstance(value, np.generic) else value


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start} is 0x{content[error.start]:02x})") from None


def _object(content: bytes) -> dict[str, Any]:
    text = _decode(content)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadRecord(f"broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"JSON {type(value).__name__}, not an object")
    return value


def _paths(pattern: str, kind: str) -> tuple[str, ...]:
    """The files of a glob, sorted; raises ConfigError if there is none."""
    paths = tuple(sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)))
    if not paths:
        raise ConfigError(
            f"data source {kind}:{pattern} matches no file (working directory {os.getcwd()}); give an existing file or a glob such as {kind}:corpus/*."
        )
    return paths


def _names(paths: tuple[str, ...]) -> list[str]:
    """Base names where they differ, otherwise paths below the common folder."""
    bases = [os.path.basename(path) for path in paths]
    if len(set(bases)) == len(bases):
        return bases
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [os.path.relpath(os.path.abspath(path), root).replace(os.sep, "/") for path in paths]


def _digest(name: str, path: str) -> tuple[str, int, str]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(MEGABYTE))
        file.seek(max(MEGABYTE, size - MEGABYTE))
        digest.update(file.read(MEGABYTE))
    return name, size, digest.hexdigest()


class RangeSource(Source):
    """Records that are byte ranges of files; `parse` makes the columns of one from (its bytes, the number of its file)."""

    def __init__(
        self, name: str, *, paths: tuple[str, ...], index: Callable[[str], offsets.Ranges], parse: Callable[[bytes, int], Mapping[str, Any]], **keys: Any
    ):
        super().__init__(name, **keys)
        self.paths, self.names, self._parse = paths, _names(paths), parse
        self._files = offsets.Files(paths, index=index)

    def __len__(self) -> int:
        return len(self._files)

    def id(self, index: int) -> str:
        file, line = self._files.where(index)
        return f"{self.names[file]}:{line}"

    def raw(self, index: int) -> Mapping[str, Any]:
        content, file = self._files.read(index)
        return self._parse(content, file)

    def digests(self) -> list[tuple[str, int, str]]:
        return [_digest(name, path) for name, path in zip(self.names, self.paths)]


class ArrayRecordSource(Source):
    """Records of array_record files: JSON objects if one of a file's first records is one, else UTF-8 text (column 'text')."""

    def __init__(self, name: str, *, paths: tuple[str, ...], columns: Mapping[str, str]):
        self.paths, self.names = paths, _names(paths)
        self._readers = [grain.sources.ArrayRecordDataSource([path]) for path in paths]
        self._first = np.cumsum([0, *map(len, self._readers)])
        self._json = [any(_is_object(reader[i]) for i in range(min(8, len(reader)))) for reader in self._readers]
        super().__init__(name, columns=columns, known=None if any(self._json) else ("text",))

    def __len__(self) -> int:
        return int(self._first[-1])

    def _where(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, index - int(self._first[file])

    def id(self, index: int) -> str:
        file, number = self._where(index)
        return f"{self.names[file]}:{number + 1}"

    def raw(self, index: int) -> Mapping[str, Any]:
        file, number = self._where(index)
        content = self._readers[file][number]
        return _object(content) if self._json[file] else {"text": content}

    def digests(self) -> list[tuple[str, int, str]]:
        return [_digest(name, path) for name, path in zip(self.names, self.paths)]


def _is_object(content: bytes) -> bool:
    try:
        _object(content)
    except BadRecord:
        return False
    return True


class TfdsSource(Source):
    """A split of a tensorflow-datasets data set stored as array_record."""

    def __init__(self, name: str, *, builder: Any, split: str, columns: Mapping[str, str]):
        super().__init__(name, columns=columns, known=tuple(sorted(builder.info.features)))
        self._prefix = f"{builder.info.name}/{split}"
        self._paths = [str(path) for path in builder.info.splits[split].filepaths]
        try:
            self._rows = builder.as_data_source(split=split)
        except (NotImplementedError, ValueError, ImportError) as error:
            raise ConfigError(f"data source {name} cannot be read without TensorFlow ({error}); prepare it with file_format='array_record'.") from error

    def __len__(self) -> int:
        return len(self._rows)

    def id(self, index: int) -> str:
        return f"{self._prefix}:{index + 1}"

    def raw(self, index: int) -> Mapping[str, Any]:
        return self._rows[index]

    def digests(self) -> list[tuple[str, int, str]]:
        return [_digest(os.path.basename(path), path) for path in self._paths]


class PythonDocsSource(Source):
    """The documentation that this Python carries: language topics and the docstrings of the standard library."""

    def __init__(self, name: str, *, columns: Mapping[str, str]):
        super().__init__(name, columns=columns, known=("text",))
        self._documents = python_docs.documents()

    def __len__(self) -> int:
        return len(self._documents)

    def id(self, index: int) -> str:
        return self._documents[index][0]

    def raw(self, index: int) -> Mapping[str, Any]:
        return {"text": self._documents[index][1]}

    def digests(self) -> list[tuple[str, int, str]]:
        return [(name, len(text), hashlib.sha256(text.encode()).hexdigest()) for name, text in self._documents]


def _text(name: str, path: str, columns: Mapping[str, str], document: str) -> Source:
    index = {"line": offsets.lines, "paragraph": offsets.paragraphs, "file": offsets.whole}[document]
    strip = b"" if document == "file" else b"\r\n"
    return RangeSource(
        name, paths=_paths(path, "text"), index=index, parse=lambda content, _: {"text": content.rstrip(strip)}, columns=columns, known=("text",)
    )


def _jsonl(name: str, path: str, columns: Mapping[str, str], document: str) -> Source:
    return RangeSource(name, paths=_paths(path, "jsonl"), index=offsets.lines, parse=lambda content, _: _object(content), columns=columns, known=None)


def _csv_cells(content: bytes) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(_decode(content), newline="")))
    except csv.Error as error:
        raise BadRecord(f"broken CSV ({error})") from None


def _tsv_cells(content: bytes) -> list[str]:
    return _decode(content).rstrip("\r\n").split("\t")


def _table(kind: str, index: Callable[[str], offsets.Ranges], cells: Callable[[bytes], list[str]]) -> Callable[..., Source]:
    """Opener of a format with rows of cells; columns given as numbers from 0 mean that its files have no header row."""

    def opener(name: str, path: str, columns: Mapping[str, str], document: str) -> Source:
        paths = _paths(path, kind)
        if all(column.isdecimal() for column in columns.values()):
            return RangeSource(name, paths=paths, index=index, parse=numbered, columns=columns, known=None)
        headers = [_header(path, index, cells) for path in paths]

        def named(content: bytes, file: int) -> Mapping[str, Any]:
            row = cells(content)
            if len(row) != len(headers[file]):
                raise BadRecord(f"{len(row)} cells, but the header has {len(headers[file])}")
            return dict(zip(headers[file], row))

        known = tuple(column for column in headers[0] if all(column in header for header in headers))
        return RangeSource(name, paths=paths, index=body, parse=named, columns=columns, known=known)

    def numbered(content: bytes, file: int) -> Mapping[str, Any]:
        return {str(number): cell for number, cell in enumerate(cells(content))}

    def body(path: str) -> offsets.Ranges:
        starts, lengths, lines = index(path)
        return starts[1:], lengths[1:], lines[1:]

    return opener


def _header(path: str, index: Callable[[str], offsets.Ranges], cells: Callable[[bytes], list[str]]) -> list[str]:
    starts, lengths, _ = index(path)
    if not len(starts):
        raise ConfigError(f"data source file {path} is empty; its first row must name the columns.")
    with open(path, "rb") as file:
        file.seek(int(starts[0]))
        content = file.read(int(lengths[0]))
    try:
        return cells(content)
    except BadRecord as error:
        raise ConfigError(f"the header row of {path} cannot be read: {error}.") from None


def _array_record(name: str, path: str, columns: Mapping[str, str], document: str) -> Source:
    return ArrayRecordSource(name, paths=_paths(path, "array_record"), columns=columns)


def _tfds(name: str, path: str, columns: Mapping[str, str], document: str) -> Source:
    import tensorflow_datasets as tfds  # a slow import, and only this format needs it

    path = os.path.expanduser(path).rstrip("/")
    place, _, split = path.rpartition("/")
    if not place or _is_prepared(path):
        place, split = path, "train"
    try:
        builder = tfds.builder_from_directory(place) if _is_prepared(place) else tfds.builder(place)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError, ImportError) as error:
        raise ConfigError(
            f"data source {name}: no data set '{place}' ({str(error).splitlines()[0]}); give NAME[/SPLIT] or the folder that holds dataset_info.json."
        ) from None
    if not builder.info.splits:
        raise ConfigError(
            f"data source {name} is not prepared in {builder.data_dir}; prepare it with tensorflow_datasets and file_format='array_record' first."
        )
    if split not in builder.info.splits:
        raise ConfigError(f"data source {name} has no split '{split}'; it has: {', '.join(sorted(builder.info.splits))}.")
    return TfdsSource(name, builder=builder, split=split, columns=columns)


def _is_prepared(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "dataset_info.json"))


def _python_docs(name: str, path: str, columns: Mapping[str, str], document: str) -> Source:
    if path:
        raise ConfigError(f"data source {name} takes no path; write python_docs:.")
    return PythonDocsSource(name, columns=columns)


SOURCES: dict[str, Callable[[str, str, Mapping[str, str], str], Source]] = {
    "text": _text,
    "jsonl": _jsonl,
    "csv": _table("csv", offsets.csv_rows, _csv_cells),
    "tsv": _table("tsv", offsets.lines, _tsv_cells),
    "array_record": _array_record,
    "tfds": _tfds,
    "python_docs": _python_docs,
}


def open_source(spec: str, *, data: Data) -> Source:
    """The source that FORMAT:PATH names, read as `data.columns` and `data.document` say. Raises ConfigError, also where it holds no record."""
    kind, colon, path = spec.partition(":")
    if not colon:
        raise ConfigError(f"data source '{spec}' is not of the form FORMAT:PATH; formats: {', '.join(SOURCES)}.")
    fields.lookup(SOURCES, kind, "format of data source")
    columns = tuple(tuple(entry.split("=")) for entry in data.columns)
    if "text" not in dict(columns):
        raise ConfigError(f"data.columns={data.columns} maps no column to the field 'text', which is what gets tokenized; add text=COLUMN.")
    stamps = tuple(
        (os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in sorted(glob.glob(os.path.expanduser(path), recursive=True))
    )
    return _opened(spec, columns, data.document, stamps)


@functools.lru_cache(maxsize=8)
def _opened(spec: str, columns: tuple[tuple[str, str], ...], document: str, stamps: tuple) -> Source:
    """Indexing a large source takes minutes, so that training, validation and fingerprints share it while its files (`stamps`) stay."""
    kind, _, path = spec.partition(":")
    source = SOURCES[kind](spec, path, dict(columns), document)
    if not len(source):
        raise ConfigError(f"data source {spec} holds no document; check the files and data.document={document}.")
    return source


def fingerprint(source: Source) -> str:
    """First 16 hex digits of the sha256 over the names, sizes, first and last megabytes of a source's files."""
    return hashlib.sha256(json.dumps(source.digests()).encode()).hexdigest()[:16]
