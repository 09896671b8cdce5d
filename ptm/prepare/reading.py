"""From FORMAT:PATH to documents: units of work that many processes share, and what each of them reads, in the order of its lines.

Lines of text and of jsonl are streamed, decompressed on the way, from this machine or from any store that fsspec knows; large plain files are cut
into several units. Other formats are opened file by file as `data.source` opens them, those of stores from a copy that is removed afterwards.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from ptm.config import Data
from ptm.data import files, records, sources
from ptm.data.files import File
from ptm.data.formats.lines import json_object
from ptm.data.offsets import BYTE_ORDER_MARK
from ptm.data.records import BadRecord, Columns, EmptyText
from ptm.fields import ConfigError, lookup
from ptm.prepare.options import Options
from ptm.prepare.stages import EMPTY, Document, Key

UNIT_BYTES = 64 << 20
BLOCK = 1 << 20
STREAMED = ("text", "jsonl")
UNDIVIDED = ("tfds", "python_docs", "parallel")  # their path is no pattern of files that could be read one by one


class Unit(NamedTuple):
    """What one process reads at a time: a file of a source, or bytes `start` to `stop` of it, which begin with line number `line`.

    `path` is a path or a URL (of an undivided source, what follows its FORMAT:), `name` is what ids call the file.
    """

    source: int
    file: int
    path: str
    name: str
    start: int = 0
    stop: int | None = None
    line: int = 1


def units(options: Options) -> list[Unit]:
    """A unit for each file of each source, in the order of keys. Raises ConfigError for a format that is not known, and for a pattern that finds no file."""
    found = []
    for source, spec in enumerate(options.source):
        kind, path = _parts(spec)
        if kind in UNDIVIDED:
            found.append(Unit(source, 0, path, ""))
            continue
        held = _files(kind, path)
        found += [Unit(source, number, file.path, name) for number, (file, name) in enumerate(zip(held, files.names(held)))]
    return found


def cut(unit: Unit, options: Options, *, size: int = UNIT_BYTES) -> list[Unit]:
    """The unit in parts of about `size` bytes that begin and end with lines, where its format allows; else the unit itself. Reads the file once."""
    kind, _ = _parts(options.source[unit.source])
    lines = kind == "jsonl" or kind == "text" and options.document == "line"
    if not lines or _suffix(unit.path) in files.OPENERS or _size(unit.path) <= size:
        return [unit]
    found, start, first = [], 0, 1
    position, line = 0, 1
    with _opened(unit.path) as file:
        while block := file.read(BLOCK):
            while (at := max(start + size - position, 0)) < len(block) and (end := block.find(b"\n", at) + 1):
                after = line + block.count(b"\n", 0, end)
                found.append(unit._replace(start=start, stop=position + end, line=first))
                start, first = position + end, after
            position, line = position + len(block), line + block.count(b"\n")
    return [*found, unit._replace(start=start, stop=position, line=first)] if position > start else found


def size(unit: Unit) -> int:
    """About the bytes of text of a unit: compressed ones count four times; of an undivided source, and of files of stores, what a unit has at most."""
    if unit.stop is not None:
        return unit.stop - unit.start
    if not unit.name or _remote(unit.path):
        return UNIT_BYTES
    return os.path.getsize(unit.path) * (4 if _suffix(unit.path) in files.OPENERS else 1)


def documents(unit: Unit, options: Options) -> Iterator[Document]:
    """The documents of a unit in the order of their keys; what cannot be used is among them, without text. Raises ConfigError where nothing can be read."""
    kind, _ = _parts(options.source[unit.source])
    columns = Columns(options.columns, number=unit.source)
    raws = _streamed(unit, kind, options.document) if kind in STREAMED else _indexed(unit, kind, columns, options.document)
    for place, id, raw in raws:
        key = Key(unit.source, unit.file, place)
        named = f"{unit.source}/{id}" if len(options.source) > 1 else id
        try:
            yield Document(key, named, columns.read(raw())["text"])
        except EmptyText:
            yield Document(key, named, None, EMPTY)
        except BadRecord as reason:
            yield Document(key, named, None, str(reason))


def evals(options: Options) -> Options:
    """Options under which evaluation sets are the sources."""
    return dataclasses.replace(options, source=tuple(options.eval_sets().values()), columns=options.eval_columns)


def eval_texts(number: int, options: Options) -> Iterator[str]:
    """The texts of an evaluation set. Raises ConfigError, also for a record that cannot be read: a set that is known in part protects in part."""
    sets = evals(options)
    for unit in units(sets):
        for document in documents(unit, sets) if unit.source == number else ():
            if document.text is None and document.problem != EMPTY:
                raise ConfigError(
                    f"--evals: a record of {sets.source[number]} cannot be read, {document.id}: {document.problem}. Mend it, or map its text by --eval_columns."
                )
            yield document.text or ""


def fingerprints(options: Options) -> list[dict[str, str]]:
    """Of each source and its `fingerprint`: 16 hex digits over the names, sizes, first and last megabytes of its files."""
    found = []
    for number, spec in enumerate(options.source):
        kind, path = _parts(spec)
        if kind in UNDIVIDED:
            source = sources.open_source(spec, data=Data(source=options.source, columns=options.columns, document=options.document), number=number)
            digits = sources.fingerprint(source)
        else:
            held = _files(kind, path)
            digests = [(name, *_digest(file.origin)) for file, name in zip(held, files.names(held))]
            digits = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
        found.append({"source": spec, "fingerprint": digits})
    return found


def _parts(spec: str) -> tuple[str, str]:
    kind, colon, path = spec.partition(":")
    if not colon:
        raise ConfigError(f"--source={spec} is not of the form FORMAT:PATH; formats: {', '.join(sources.SOURCES)}.")
    lookup(sources.SOURCES, kind, "format of --source")
    return kind, path


def _remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def _files(kind: str, pattern: str) -> list[File]:
    if _remote(pattern):
        store, inner = _store(pattern)
        with _told(pattern):
            found = sorted(store.glob(inner)) if set("*?[") & set(inner) else [inner] if store.exists(inner) else []
            paths = [store.unstrip_protocol(path) for path in found if store.isfile(path)]
    elif ".zip/" in pattern.lower():
        return list(files.find(pattern, kind))
    else:
        paths = [path for path in files.listed(pattern) if os.path.isfile(path)]
    if not paths:
        return list(files.find(pattern, kind)) if not _remote(pattern) else _none(kind, pattern)
    return sorted((File(path, path, path) for path in paths), key=lambda file: file.place)


def _none(kind: str, pattern: str) -> list[File]:
    raise ConfigError(f"--source={kind}:{pattern} matches no file; give an existing file or a pattern such as {kind}:s3://bucket/corpus/*.")


def _store(path: str) -> tuple[Any, str]:
    """(file system, path in it) of a URL."""
    try:
        import fsspec  # an extra, for stores alone
    except ImportError:
        raise ConfigError(f"{path} needs fsspec, which is not installed; install it with: pip install 'ptm[prepare]'.") from None
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{path} names a store that cannot be used ({error}).") from None


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Faults of a store or of a compressed file as ConfigError."""
    try:
        yield
    except files.BROKEN as error:
        raise ConfigError(f"{path} cannot be read ({str(error) or type(error).__name__}); fetch it again, or mend what keeps it.") from None


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _size(path: str) -> int:
    if not _remote(path):
        return os.path.getsize(path)
    store, inner = _store(path)
    with _told(path):
        return int(store.size(inner))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file as they lie there."""
    with contextlib.ExitStack() as stack:
        with _told(path):
            if _remote(path):
                store, inner = _store(path)
                file = stack.enter_context(store.open(inner, "rb"))
            else:
                file = stack.enter_context(open(path, "rb"))
        yield file


def _digest(path: str) -> tuple[int, str]:
    if not _remote(path):
        return files.digest(path)
    size = _size(path)
    with _told(path), _opened(path) as file:
        content = hashlib.sha256(file.read(files.MEGABYTE))
        file.seek(max(files.MEGABYTE, size - files.MEGABYTE))
        content.update(file.read(files.MEGABYTE))
    return size, content.hexdigest()


_Raw = tuple[int, str, Callable[[], Any]]


def _streamed(unit: Unit, kind: str, document: str) -> Iterator[_Raw]:
    """(line, id, what makes the columns) of the records of a text or jsonl file."""
    parse = json_object if kind == "jsonl" else lambda content: {"text": content}
    grouped = {"line": _visible, "paragraph": _paragraphs, "file": _whole}["line" if kind == "jsonl" else document]
    for line, content in grouped(_lines(unit)):
        yield line, f"{unit.name}:{line}", lambda content=content: parse(content)


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(number, content with its end) of the lines of a unit; of one that is too long its beginning, one byte longer than is allowed."""
    most, total = files.MOST_EXPANSION * _size(unit.path) + files.ALWAYS_ALLOWED, 0
    with _opened(unit.path) as raw, _told(unit.path), contextlib.ExitStack() as stack:
        opener = files.OPENERS.get(_suffix(unit.path))
        file = raw if opener is None else stack.enter_context(opener(raw))
        if unit.start:
            file.seek(unit.start)
        number, left = unit.line, None if unit.stop is None else unit.stop - unit.start
        while left is None or left > 0:
            content = file.readline(records.LONGEST + 1)
            if not content:
                break
            size, rest = len(content), content
            while len(rest) > records.LONGEST and not rest.endswith(b"\n"):
                rest = file.readline(records.LONGEST + 1)
                size += len(rest)
            total += size
            left = None if left is None else left - size
            if opener is not None and total > most:
                raise files.grown(unit.path, most)
            if number == 1 and content.startswith(BYTE_ORDER_MARK):
                content = content[len(BYTE_ORDER_MARK) :]
            yield number, content
            number += 1


def _visible(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    return ((number, content.rstrip(b"\r\n")) for number, content in lines if content.strip())


def _paragraphs(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    first, held, size = 0, [], 0
    for number, content in lines:
        if content.strip():
            first = first if held else number
            if size <= records.LONGEST:  # beyond it the record is refused, and need not be held
                held.append(content)
                size += len(content)
        elif held:
            yield first, b"".join(held).rstrip(b"\r\n")
            held, size = [], 0
    if held:
        yield first, b"".join(held).rstrip(b"\r\n")


def _whole(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    held, size = [], 0
    for _, content in lines:
        if size <= records.LONGEST:
            held.append(content)
            size += len(content)
    yield 1, b"".join(held)


def _indexed(unit: Unit, kind: str, columns: Columns, document: str) -> Iterator[_Raw]:
    """(number from 1, id, what makes the columns) of the records of a file that has an index, or of an undivided source."""
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(_copied(unit.path)) if kind not in UNDIVIDED and _remote(unit.path) else unit.path
        source = sources.SOURCES[kind](f"{kind}:{unit.path}", path, columns, document)
        source.check_columns()
        base = f"{os.path.basename(path)}:"
        for index in range(len(source)):
            id = source.id(index)
            if unit.name:
                id = f"{unit.name}:{id.removeprefix(base)}"
            yield index + 1, id, lambda index=index: source.raw(index)


@contextlib.contextmanager
def _copied(path: str) -> Iterator[str]:
    """A copy of a file of a store on this machine, under its own base name's ending."""
    store, inner = _store(path)
    with tempfile.TemporaryDirectory(prefix="ptm-") as folder:
        copy = os.path.join(folder, "file" + "".join(re.findall(r"\.\w{1,12}", os.path.basename(inner))[-2:]))
        with _told(path):
            store.get_file(inner, copy)
        yield copy
