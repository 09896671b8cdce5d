"""What a record is: the columns that its source has, and the fields that `data.columns` makes of them."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ptm import config, fields
from ptm.fields import ConfigError

_PIECE = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<slot>[^{}]+)\}|(?P<words>[^{}]+)")
NAME_SHOWN = 40  # characters of a column's name
STEP = re.compile(r"(?=.*[1-9])\d+(\.\d+)?")
LONGEST = 1 << 30  # bytes of a record: in memory it takes several times as much, and a document that a person wrote is far below
TRIED = 8  # first records whose columns stand for those of all, where a format names them record by record


class BadRecord(Exception):
    """A record that cannot be used; the message is the reason."""


class MissingColumn(BadRecord):
    """A record that lacks a column."""


class EmptyText(BadRecord):
    """A record whose text holds nothing."""


def require_size(size: int) -> None:
    """Raises BadRecord for more bytes than a record may have."""
    if size > LONGEST:
        raise BadRecord(f"it has {size:,} bytes; allowed are {LONGEST:,}")


def decode(content: bytes) -> str:
    """UTF-8 as text; raises BadRecord."""
    require_size(len(content))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start} is 0x{content[error.start]:02x})") from None


def plain(value: Any) -> Any:
    """A value of a record as Python's own text, numbers, lists and dicts; raises BadRecord for bytes that are no text, and for text that is not Unicode."""
    if isinstance(value, bytes):
        return decode(value)
    if isinstance(value, str):
        return _unicode(value)
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _unicode(text: str) -> str:
    require_size(len(text))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"not Unicode text ({error.reason})") from None
    return text


def find(raw: Mapping[str, Any], column: str) -> Any:
    """A column of a record, or an item of one by a dotted path such as answers.0.text; raises MissingColumn."""
    if column in raw:
        return plain(raw[column])
    name, _, path = column.partition(".")
    if not path or name not in raw:
        raise MissingColumn(f"no column '{column}'")
    value = plain(raw[name])
    for key in path.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise MissingColumn(f"no '{key}' in column '{column}'")
    return value


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place in a template: a column, and what stands for each of its values, or None for the values themselves."""

    column: str
    values: dict[str, str] | None
    step: str = ""  # numbers are rounded to multiples of it, and written with as many decimals

    def text(self, raw: Mapping[str, Any]) -> str:
        """What a record puts here; raises BadRecord."""
        value = find(raw, self.column)
        if not isinstance(value, str | int | float):
            raise BadRecord(f"column '{self.column}' is {_kind(value)}, and a template takes text and numbers (of lists, an item: {self.column}.0)")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if self.step:
            try:
                text = f"{round(float(text) / float(self.step)) * float(self.step):.{len(self.step.partition('.')[2])}f}"
            except (ValueError, OverflowError):
                raise BadRecord(f"column '{self.column}' is '{text}', no number to be rounded") from None
        if self.values is not None and text not in self.values:
            raise BadRecord(f"column '{self.column}' is '{text}', which data.columns does not translate; it knows: {', '.join(self.values)}")
        return text if self.values is None else self.values[text]


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _template(field: str, text: str) -> tuple[str | Slot, ...]:
    """Words and slots of a template. Raises ConfigError for a brace that is not closed, and for a slot that cannot be read."""
    parts, at = [], 0
    while at < len(text):
        match = _PIECE.match(text, at)
        if match is None:
            raise ConfigError(
                f"data.columns: the brace at character {at + 1} of '{text}', the field {field}, belongs to no {{COLUMN}} or {{COLUMN|VALUE=TEXT|...}};"
                " close it, or double it for a brace of the text."
            )
        if match["slot"] is None:
            parts.append(match["words"] or match["brace"][0])
        else:
            column, *pairs = match["slot"].split("|")
            column, tilde, step = column.partition("~")
            if not column.strip() or not all("=" in pair for pair in pairs) or tilde and not STEP.fullmatch(step):
                allowed = "{COLUMN}, {COLUMN|VALUE=TEXT|...} or {COLUMN~STEP} with a number as step"
                raise ConfigError(f"data.columns: '{{{match['slot']}}}' of the field {field} is not of the form {allowed}.")
            parts.append(Slot(column.strip(), dict(pair.split("=", 1) for pair in pairs) if pairs else None, step))
        at = match.end()
    return tuple(parts)


class Columns:
    """The fields that the entries of `data.columns` make of a record of one source, whose place in the config is `number`."""

    def __init__(self, entries: Collection[str], *, number: int = 0):
        parsed = config.column_entries(entries)
        mapped = {field: text for place, field, text in parsed if place is None} | {field: text for place, field, text in parsed if place == number}
        if "text" not in mapped:
            given = fields.unparse(tuple(entries))
            raise ConfigError(f"data.columns={given} maps no column to the field 'text' of source {number}, which is what gets tokenized; add text=COLUMN.")
        self.columns = {field: text for field, text in mapped.items() if not set("{}") & set(text)}
        self._templates = {field: _template(field, text) for field, text in mapped.items() if field not in self.columns}
        slots = [(field, part.column) for field, parts in self._templates.items() for part in parts if isinstance(part, Slot)]
        self.used = [*self.columns.items(), *slots]  # (field, column that it is made of)
        self.names = {column for _, column in self.used}
        self.fields = tuple(mapped)
        self.lists = tuple(dict.fromkeys(field.partition(".")[0] for field in mapped if "." in field))  # choices.0=A,choices.1=B make a list, in this order

    def check(self, name: str, known: Collection[str], *, hint: str = "") -> None:
        """Raises ConfigError, which ends in `hint`, where a column is not among the `known` ones of the source of that name."""
        for field, column in self.used:
            if column not in known and column.partition(".")[0] not in known:
                has = ", ".join(str(other)[:NAME_SHOWN] for other in known)
                told = f"it has: {has}. Name the one that is meant, {field}=COLUMN.{fields.nearest(column, known)}{hint}"
                raise ConfigError(f"data.columns maps {field} to column '{column}', which {name} does not have; {told}")

    def read(self, raw: Mapping[str, Any], *, optional: Collection[str] = ()) -> dict[str, Any]:
        """The fields of a record, `text` a string that is not blank; `optional` ones only where it has their columns. Raises BadRecord with the reason."""
        record = {}
        for field in self.fields:
            try:
                if field in self.columns:
                    record[field] = find(raw, self.columns[field])
                else:
                    record[field] = "".join(part if isinstance(part, str) else part.text(raw) for part in self._templates[field])
            except RecursionError:
                raise BadRecord(f"the field {field} is nested too deeply") from None
            except MissingColumn:
                if field not in optional:
                    raise
        for name in self.lists:
            record[name] = [record.pop(part) for part in self.fields if part.partition(".")[0] == name and part in record]
        text = record["text"]
        if not isinstance(text, str):
            raise BadRecord(f"column '{self.columns['text']}' is {_kind(text)}, not text")
        if not text or text.isspace():
            raise EmptyText("empty text")
        return record


class Source:
    """`len(source)` records, each with an id and the fields that `columns` makes of it. `tokenizer` is the fingerprint of that whose ids it holds, if it holds any."""

    tokenizer: str | None = None

    def __init__(self, name: str, *, columns: Columns, known: Collection[str] | None, hint: str = ""):
        """`known` are the columns that every record has, or None where each record names its own; `hint` helps who asks for others."""
        self.name, self.columns, self._known, self._hint = name, columns, known, hint

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
        """The fields of a record, `text` a string that is not blank; raises BadRecord with the reason."""
        return self.columns.read(self.raw(index))

    def check_columns(self) -> None:
        """Raises ConfigError where a column that is asked for is not there: among the known ones, or in any of the first records that can be read."""
        known = self._known
        if known is None:
            known = {}
            for index in range(min(TRIED, len(self))):
                try:
                    known |= dict.fromkeys(self.raw(index))
                except BadRecord:
                    continue
            if not known:
                return
        self.columns.check(self.name, list(known), hint=self._hint)
