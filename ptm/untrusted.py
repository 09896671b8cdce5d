"""What files that others wrote may do: JSON of bounded size and depth whose every fault is a ValueError, names that stay in their folder, text that a terminal prints.

Workdirs, studies, models and data are passed around, so that none of their files is believed: docs/security.md says what is checked where.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST_JSON = 256 << 20  # bytes of a file that is parsed as a whole
BLOCK = 1 << 16
MOST_NESTED = 64  # containers within each other; deeper ones would exhaust the stack of whoever walks through them
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*")
LONGEST_NAME = 200  # characters, which leaves room for what is put behind it in the name of a file


def json_of(content: str | bytes, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text; `parse_constant` makes those of NaN, Infinity and -Infinity. Raises ValueError for one that is none, is no UTF-8, or nests too deeply."""
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError(f"it nests more than {MOST_NESTED} deep") from None
    if text.count("[") + text.count("{") > MOST_NESTED:
        _require_flat(value)
    return value


def _require_flat(value: Any) -> None:
    level = [value]
    for _ in range(MOST_NESTED + 1):
        containers = [node for node in level if isinstance(node, dict | list)]
        if not containers:
            return
        level = [inner for node in containers for inner in (node.values() if isinstance(node, dict) else node)]
    raise ValueError(f"it nests more than {MOST_NESTED} deep")


def read_bytes(path: str | os.PathLike) -> bytes:
    """A file as a whole. Raises OSError, and ValueError for one that is larger than anything that is read so."""
    blocks, left = [], LARGEST_JSON
    with open(path, "rb") as file:
        while block := file.read(BLOCK):  # reading so many bytes at once would take the memory of all of them first
            blocks.append(block)
            left -= len(block)
            if left < 0:
                raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MiB")
    return b"".join(blocks)


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file. Raises OSError, and ValueError as `json_of`."""
    return json_of(read_bytes(path))


def is_name(name: Any) -> bool:
    """Whether a name can be that of a file or folder and nothing else: no separators, no leading dot, no control characters."""
    return isinstance(name, str) and len(name) <= LONGEST_NAME and _NAME.fullmatch(name) is not None


def is_place(name: Any) -> bool:
    """Whether a name with slashes names a place below a folder, whatever the folder is."""
    return isinstance(name, str) and all(map(is_name, name.split("/")))


def inside(folder: Path, name: Any) -> bool:
    """Whether a name, links included, leads to something in a folder."""
    return isinstance(name, str) and "\0" not in name and (folder / name).resolve().is_relative_to(folder.resolve())


def printable(text: str) -> str:
    """Text with what is no character to be seen spelt out, but for line breaks and tabs, so that no terminal takes it for a command."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
