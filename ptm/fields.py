"""How a config key is declared: `field(default, doc=...)` on a frozen dataclass, and the checks that follow from it.

Every key of the project is declared once, with its default, unit, range and meaning, beside the code that reads it. This module is
the lowest of the package: anything may import it.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

LONGEST_SHOWN = 200  # characters of a value in a message


class ConfigError(ValueError):
    """Wrong usage or configuration: says what was given, what is allowed and what to do. The command line exits with 2 on it."""


class StorageError(RuntimeError):
    """Files could not be written or read, through no fault of the program: says which, and why. The command line exits with 1 on it, without a traceback."""


def field(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple | None = None,
) -> Any:
    """A config key: its default (required if left out), unit, meaning, inclusive range and allowed values."""
    meta = {"doc": doc, "unit": unit, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


def sections(table: str, *, doc: str) -> Any:
    """A config key that holds sections by name, each the Config of an entry of a `table` of the registry (objective, ...); recipes choose them."""
    return dataclasses.field(default_factory=dict, metadata={"doc": doc, "table": table})


def tables(cls: type) -> dict[str, str]:
    """The keys of a config dataclass that hold `sections`, with the table of each."""
    return {f.name: f.metadata["table"] for f in dataclasses.fields(cls) if "table" in f.metadata}


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for a misspelt word, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def divisors(number: int) -> list[int]:
    """The divisors of a number that a message lists, ascending: those up to 4096, whatever the number is."""
    return [n for n in range(1, min(number, 4096) + 1) if number % n == 0]


def lookup(table: dict[str, Any], name: str, what: str) -> Any:
    """Entry `name` of one of the project's explicit tables; an unknown name prints the known ones."""
    if name not in table:
        raise ConfigError(f"unknown {what} '{name}'. Known: {', '.join(sorted(table))}.{nearest(name, table)}")
    return table[name]


def annotations(cls: type) -> dict[str, Any]:
    """Resolved type of every key of a config dataclass, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def nullable(annotation: Any) -> bool:
    """Whether null is a value of this type."""
    return isinstance(annotation, types.UnionType) and type(None) in typing.get_args(annotation)


def strip_null(annotation: Any) -> Any:
    """The type without its null."""
    if not nullable(annotation):
        return annotation
    return next(a for a in typing.get_args(annotation) if a is not type(None))


def type_name(annotation: Any) -> str:
    """A type as a user reads it: 'int', 'true or false', 'tuple of float', 'str or None'."""
    if nullable(annotation):
        return f"{type_name(strip_null(annotation))} or None"
    if typing.get_origin(annotation) is tuple:
        return f"tuple of {type_name(typing.get_args(annotation)[0])}"
    return "true or false" if annotation is bool else annotation.__name__


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation`: int becomes float and list becomes tuple, nothing else is converted."""
    if value is None and nullable(annotation):
        return None
    inner = strip_null(annotation)
    if typing.get_origin(inner) is tuple and isinstance(value, list | tuple):
        return tuple(coerce(item, typing.get_args(inner)[0], f"{where}[{number}]") for number, item in enumerate(value))
    if inner is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(inner, type) and isinstance(value, inner) and not (inner is int and isinstance(value, bool)):
        return value
    shown = repr(value)
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
    raise ConfigError(f"{where}={shown} has type {type(value).__name__}; allowed: {type_name(annotation)}.")


_ITEM = re.compile(r"""(?:^|(?<=,))(\s*"(?:[^"]|"")*"\s*|\s*'(?:[^']|'')*'\s*|(?:\{[^{}]*\}|[^,])*)(?=,|$)""")
_CLOSED = re.compile(r"\{[^{}]*\}")  # of a path for several files, such as train.{en,de}


def parse(text: str, annotation: Any, where: str) -> Any:
    """The value that `text` from a command line stands for under `annotation`.

    Items of a tuple are separated by commas, but for those between braces; one that holds other commas stands between quotes, a quote in it doubled.
    """
    if nullable(annotation) and text in ("None", "null"):
        return None
    inner = strip_null(annotation)
    if typing.get_origin(inner) is tuple:
        stripped = text.strip()
        if stripped[:1] + stripped[-1:] in ("()", "[]"):
            stripped = stripped[1:-1]
        items = [item.strip() for item in _ITEM.findall(stripped)]
        if items[-1] == "":
            items.pop()
        items = [item[1:-1].replace(item[0] * 2, item[0]) if len(item) > 1 and item[0] == item[-1] in "'\"" else item for item in items]
        return tuple(parse(item, typing.get_args(inner)[0], f"{where}[{number}]") for number, item in enumerate(items))
    try:
        if inner is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return inner(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{where}={text} cannot be read; allowed: {type_name(annotation)}.") from None


def unparse(value: Any) -> str:
    """The text that stands for a value on a command line, which `parse` reads back."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_item, value)) if isinstance(value, list | tuple) else str(value)


def _item(value: Any) -> str:
    text = unparse(value)
    plain = text == text.strip() and not set(",{") & set(_CLOSED.sub("", text)) and text[:1] not in ("'", '"', "(", "[", "")
    return text if plain else '"' + text.replace('"', '""') + '"'


def span(low: float | None, high: float | None) -> str:
    """An inclusive range as a user reads it: '1 or more', 'up to 5', '0.0 to 1.0'."""
    if low is None:
        return f"up to {high}"
    return f"{low} or more" if high is None else f"{low} to {high}"


def check(config: Any, where: str) -> None:
    """Holds every key of a config dataclass to its declared type, range and choices, then calls its own `check()` if it has one.

    Raises ConfigError naming `where.key`, the value and what is allowed.
    """
    hints = annotations(type(config))
    for f in dataclasses.fields(config):
        key, value, meta = f"{where}.{f.name}" if where else f.name, getattr(config, f.name), f.metadata
        if not meta or "table" in meta:
            continue
        coerce(value, hints[f.name], key)
        if value is None:
            continue
        low, high, choices = meta["low"], meta["high"], meta["choices"]
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                raise ConfigError(f"{key}={unparse(value)}; allowed: finite numbers. ({meta['doc']})")
            if low is not None and item < low or high is not None and item > high:
                unit = " " + meta["unit"] if meta["unit"] else ""
                raise ConfigError(f"{key}={unparse(value)} is out of range; allowed: {span(low, high)}{unit}. ({meta['doc']})")
            if choices is not None and item not in choices:
                raise ConfigError(f"{key}={unparse(value)}; allowed: {', '.join(map(str, choices))}.{nearest(str(item), map(str, choices))}")
    if hasattr(config, "check"):
        config.check(where)
