"""Formats whose records are ranges of lines: text, jsonl, csv, tsv, conll, and line-aligned parallel text."""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ptm.data import files, offsets
from ptm.data.files import File
from ptm.data.records import BadRecord, Columns, Source, decode
from ptm.fields import ConfigError

NO_HEADER = " If its first row is no header, give its columns as numbers from 0."
DOCUMENT_MARK = b"-DOCSTART-"


class RangeSource(Source):
    """Records that are byte ranges of files; `parse` makes the columns of one from (its bytes, the number of its file)."""

    def __init__(
        self, name: str, *, found: Sequence[File], index: Callable[[str], offsets.Ranges], parse: Callable[[bytes, int], Mapping[str, Any]], **keys: Any
    ):
        super().__init__(name, **keys)
        self._found, self._names, self._parse = found, files.names(found), parse
        self._ranges = offsets.Files(tuple(file.path for file in found), index=index)

    def __len__(self) -> int:
        return len(self._ranges)

    def id(self, index: int) -> str:
        file, line = self._ranges.where(index)
        return f"{self._names[file]}:{line}"

    def raw(self, index: int) -> Mapping[str, Any]:
        content, file = self._ranges.read(index)
        return self._parse(content, file)

    def digests(self) -> list[tuple[str, int, str]]:
        return files.digests(self._found)


def text(name: str, path: str, columns: Columns, document: str) -> Source:
    """Lines, paragraphs or files, as `data.document` says; the column is `text`."""
    index = {"line": offsets.lines, "paragraph": offsets.paragraphs, "file": offsets.whole}[document]
    strip = b"" if document == "file" else b"\r\n"
    return RangeSource(
        name, found=files.find(path, "text"), index=index, parse=lambda content, _: {"text": content.rstrip(strip)}, columns=columns, known=("text",)
    )


def json_object(content: bytes) -> dict[str, Any]:
    """A JSON object; raises BadRecord."""
    try:
        value = json.loads(decode(content))
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"JSON {type(value).__name__}, not an object")
    return value


def jsonl(name: str, path: str, columns: Columns, document: str) -> Source:
    """A JSON object a line, whose keys are the columns."""
    found = files.find(path, "jsonl")
    return RangeSource(name, found=found, index=offsets.lines, parse=lambda content, _: json_object(content), columns=columns, known=None)


def csv_cells(content: bytes) -> list[str]:
    """The cells of a csv row; raises BadRecord."""
    behind = ["\n", "another row"]
    rows = csv.reader(itertools.chain(io.StringIO(decode(content).rstrip("\r\n"), newline=""), behind))
    try:
        cells = next(rows)
        if next(rows, None) is None:
            raise BadRecord("broken CSV (a quote is not closed)")
    except csv.Error as error:
        raise BadRecord(f"broken CSV ({error})") from None
    return cells


def tsv_cells(content: bytes) -> list[str]:
    """The cells of a row with tabs, in which quotes are plain characters; raises BadRecord."""
    return decode(content).rstrip("\r\n").split("\t")


def table(kind: str, index: Callable[[str], offsets.Ranges], cells: Callable[[bytes], list[str]]) -> Callable[..., Source]:
    """Opener of a format with rows of cells; columns given as numbers from 0 mean that its files have no header row."""

    def opener(name: str, path: str, columns: Columns, document: str) -> Source:
        found = files.find(path, kind)
        if all(column.isdecimal() for column in columns.names):
            return RangeSource(name, found=found, index=index, parse=numbered, columns=columns, known=None)
        headers = [_header(file, index, cells) for file in found]

        def named(content: bytes, file: int) -> Mapping[str, Any]:
            row = cells(content)
            if len(row) != len(headers[file]):
                raise BadRecord(f"{len(row)} cells, but the header has {len(headers[file])}")
            return dict(zip(headers[file], row))

        known = tuple(column for column in headers[0] if all(column in header for header in headers))
        return RangeSource(name, found=found, index=body, parse=named, columns=columns, known=known, hint=NO_HEADER)

    def numbered(content: bytes, file: int) -> Mapping[str, Any]:
        return {str(number): cell for number, cell in enumerate(cells(content))}

    def body(path: str) -> offsets.Ranges:
        starts, lengths, lines = index(path)
        return starts[1:], lengths[1:], lines[1:]

    opener.__doc__ = f"Rows of {kind} files, whose first row names the columns; columns given as numbers from 0 mean that there is no such row."
    return opener


def _header(file: File, index: Callable[[str], offsets.Ranges], cells: Callable[[bytes], list[str]]) -> list[str]:
    starts, lengths, _ = index(file.path)
    if not len(starts):
        raise ConfigError(f"data source file {file.place} is empty; its first row must name the columns.")
    with open(file.path, "rb") as opened:
        opened.seek(int(starts[0]))
        content = opened.read(int(lengths[0]))
    try:
        return cells(content)
    except BadRecord as error:
        raise ConfigError(f"the header row of {file.place} cannot be read: {error}.") from None


def _sentences(path: str) -> offsets.Ranges:
    """Runs of lines that are not blank, less the marks of documents that they begin with."""
    ranges = []
    with open(path, "rb") as file:
        for start, length, line in zip(*(column.tolist() for column in offsets.paragraphs(path))):
            file.seek(start)
            content = file.read(length)
            while content.startswith(DOCUMENT_MARK):
                _, _, content = content.partition(b"\n")
                line += 1
            if content:
                ranges.append((start + length - len(content), len(content), line))
    starts, lengths, lines = np.array(ranges, np.int64).reshape(-1, 3).T
    return starts, lengths, lines.astype(np.uint32)


def _words_and_tags(content: bytes, _: int) -> dict[str, Any]:
    """Columns of a sentence: the first cell of each line is the word, the last the tag; where no line has a second cell there are words alone."""
    rows = []
    for line in decode(content).rstrip("\r\n").split("\n"):
        cells = line.rstrip("\r").split("\t") if "\t" in line else [cell for cell in line.rstrip("\r").split(" ") if cell]
        if cells[0] != DOCUMENT_MARK.decode():
            rows.append(cells)
    words = [cells[0] for cells in rows]
    if "" in words:
        raise BadRecord(f"line {words.index('') + 1} of the sentence has no word")
    if all(len(cells) == 1 for cells in rows):
        return {"text": " ".join(words), "words": words}
    if alone := next((cells[0] for cells in rows if len(cells) == 1 or not cells[-1]), None):
        raise BadRecord(f"the word '{alone}' has no tag")
    return {"text": " ".join(words), "words": words, "tags": [cells[-1].strip() for cells in rows]}


def conll(name: str, path: str, columns: Columns, document: str) -> Source:
    """Sentences with a word and its tag a line, cells between tabs or spaces, and a blank line behind each (Tjong Kim Sang and De Meulder 2003)."""
    known = ("text", "words", "tags")
    return RangeSource(name, found=files.find(path, "conll"), index=_sentences, parse=_words_and_tags, columns=columns, known=known)


class ParallelSource(Source):
    """Line-aligned files, a column each: `found[word]` are the files of a column, in the same order for all."""

    def __init__(self, name: str, *, found: Mapping[str, Sequence[File]], columns: Columns):
        super().__init__(name, columns=columns, known=tuple(found))
        self._found = found
        self._names = files.names(next(iter(found.values())))
        ranges: dict[str, offsets.Ranges] = {}
        for together in zip(*found.values()):
            ranges |= _aligned(together)
        self._read = {word: offsets.Files(tuple(file.path for file in column), index=ranges.__getitem__) for word, column in found.items()}

    def __len__(self) -> int:
        return len(next(iter(self._read.values())))

    def id(self, index: int) -> str:
        file, line = next(iter(self._read.values())).where(index)
        return f"{self._names[file]}:{line}"

    def raw(self, index: int) -> Mapping[str, Any]:
        row = {word: decode(lines.read(index)[0]).rstrip("\r\n") for word, lines in self._read.items() if word in self.columns.names}
        for word, line in row.items():
            if not line or line.isspace():
                raise BadRecord(f"the line is empty in '{word}'")
        return row

    def digests(self) -> list[tuple[str, int, str]]:
        return [entry for column in self._found.values() for entry in files.digests(column)]


def _aligned(together: Sequence[File]) -> dict[str, offsets.Ranges]:
    """By path, the lines of files that belong together, without those that are blank in all. Raises ConfigError where one has more lines."""
    bounds, filled = zip(*(offsets.all_lines(file.path) for file in together))
    if len(set(map(len, filled))) > 1:
        counts = " and ".join(f"{file.place} has {len(lines):,} lines" for file, lines in zip(together, filled))
        raise ConfigError(f"{counts}: parallel text needs the same number, line by line a translation of the other.")
    where = np.flatnonzero(np.any(filled, axis=0))
    return {file.path: (at[where], at[where + 1] - at[where], (where + 1).astype(np.uint32)) for file, at in zip(together, bounds)}


def languages(path: str) -> dict[str, str]:
    """{word: pattern} of a path with words in braces, such as train.{en,de}.gz. Raises ConfigError for another form."""
    match = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", path)
    words = [word.strip() for word in match[2].split(",")] if match else []
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        raise ConfigError(
            f"data source parallel:{path} does not name its files; write the words that differ, which become columns, in braces: train.{{en,de}}."
        )
    return {word: match[1] + word + match[3] for word in words}


def parallel(name: str, path: str, columns: Columns, document: str) -> Source:
    """Line-aligned files PATH.{en,de}; the words in braces are the columns."""
    found = {word: files.find(pattern, "parallel") for word, pattern in languages(path).items()}
    if len(set(map(len, found.values()))) > 1:
        counts = ", ".join(f"{len(column)} of '{word}'" for word, column in found.items())
        raise ConfigError(f"data source {name} matches different numbers of files: {counts}; every column needs the same files.")
    return ParallelSource(name, found=found, columns=columns)
