"""JSON lines in, JSON lines out: what has arrived is answered, in its order, and a line that cannot be is told by its number."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple, NoReturn

from ptm import untrusted
from ptm.data.records import BadRecord, MissingColumn, Source, find, plain
from ptm.fields import ConfigError

CHUNK = 1 << 20  # bytes that are read at once
RECORDS = 1024  # records of a source that are read at once
LARGEST = 64 << 20  # bytes of a line
JSON_NAMES = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}


class Line(NamedTuple):
    """A line of the input: its number from 1, and its record, or why it has none."""

    number: int
    record: dict[str, Any]
    error: str | None = None


def arrived(file: IO[bytes]) -> Iterator[list[Line]]:
    """The lines of a binary file or pipe as they arrive: all that one read completes, blank ones left out. Raises ConfigError for a line without end."""
    begun: list[bytes] = []  # the line that has not ended yet
    number = 0
    while content := os.read(file.fileno(), CHUNK):
        *ended, rest = content.split(b"\n")
        if ended:
            ended[0], begun = b"".join([*begun, ended[0]]), []
        begun.append(rest)
        if sum(map(len, begun)) > LARGEST:
            raise ConfigError(f"line {number + len(ended) + 1} of the input is longer than {LARGEST >> 20} MiB; give one JSON object a line.")
        found = [_line(number + n, line) for n, line in enumerate(ended, 1) if line.strip()]
        number += len(ended)
        if found:
            yield found
    if (last := b"".join(begun)).strip():
        yield [_line(number + 1, last)]


def _line(number: int, content: bytes) -> Line:
    try:
        record = untrusted.json_of(content.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_refuse)
        if b"\\u" in content:  # half of a pair of escapes is no text
            json.dumps(record, ensure_ascii=False).encode()
    except ValueError as error:
        return Line(number, {}, f"not JSON in UTF-8 ({error})")
    if not isinstance(record, dict):
        return Line(number, {}, f'{JSON_NAMES[type(record)]}, not an object such as {{"text": "..."}}')
    return Line(number, record)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def recorded(source: Source, *, raw: bool) -> Iterator[list[Line]]:
    """The records of a source in its order: the fields that its columns make, or `raw` all columns as they are; `id` is a record's own, or what the source calls it."""

    def line(index: int) -> Line:
        try:
            record = plain(dict(source.raw(index)))
            record = record if raw else {**record, **source.read(index)}
        except BadRecord as error:
            return Line(index + 1, {"id": source.id(index)}, str(error))
        try:
            name = find(record, "id")
        except MissingColumn:
            name = source.id(index)
        return Line(index + 1, {**record, "id": name})

    for first in range(0, len(source), RECORDS):
        yield [line(index) for index in range(first, min(first + RECORDS, len(source)))]


def answered(chunk: list[Line], answer: Callable[[Iterable[Line]], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What `answer` gives for the lines that have a record, beside what is wrong with the others: {"line", the record's "id" if it has one, ...}."""
    answers = iter(answer([line for line in chunk if line.error is None]))
    for line in chunk:
        about = {"line": line.number, **({"id": line.record["id"]} if "id" in line.record else {})}
        yield about | ({"error": line.error} if line.error is not None else next(answers))


def written(result: dict[str, Any]) -> tuple[bytes, str | None]:
    """An answer as a line of JSON, and its error if it is one; numbers that are not finite, for which JSON has no word, make it one."""
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n", result["error"] if "error" in result else None
    except (ValueError, RecursionError):
        error = "the answer or the id holds what JSON has no word for, such as numbers that are not finite"
        return json.dumps({"line": result["line"], "error": error}).encode() + b"\n", error
