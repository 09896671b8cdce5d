"""Checkpoints as they lie in a folder: which steps there are, what is owed of one, and whether its files are as they were written.

Neither JAX nor Orbax, so that who only looks at runs need not load them; `checkpoint.py` has the layout of a folder.
"""

import concurrent.futures
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ptm import untrusted

ITEMS = ("state", "data", "meta")
MANIFEST = "manifest.json"
OWED, EVALUATED = "meta/owed.json", "evaluated.json"


def steps_in(folder: Path) -> list[int]:
    """Committed steps of a folder, ascending; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir())


def owed(folder: Path, step: int) -> list[str]:
    """The evals of a step that a stop cut short and that were not made since."""
    try:
        return [] if (folder / str(step) / EVALUATED).is_file() else list(untrusted.read_json(folder / str(step) / OWED))
    except (OSError, ValueError, TypeError):
        return []


def settled(folder: Path, step: int) -> bool:
    """Whether a step is committed and no eval of it is owed."""
    return step in steps_in(folder) and not owed(folder, step)


def write(path: Path, text: str) -> None:
    """A file of a step that is not there yet, on the disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal(folder: Path) -> None:
    """Writes the manifest of a step whose items are complete: size and sha256 of every file."""
    names = sorted(str(path.relative_to(folder)) for item in ITEMS for path in (folder / item).rglob("*") if path.is_file())
    files = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in _digests(folder, names).items()}
    write(folder / MANIFEST, json.dumps({"files": files}, indent=1))


def damage(folder: Path, verified: dict[Path, list]) -> str | None:
    """None if every file of a step is as it was written, else the reason.

    `verified` remembers by folder which files were hashed; those that have not changed since are not hashed again.
    """
    try:
        files = untrusted.read_json(folder / MANIFEST)["files"]
        written = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        written = {}
    if not written:
        return f"{MANIFEST} is damaged"
    seen = []
    for name, (size, digest) in written.items():
        if not untrusted.inside(folder, name):
            return f"{MANIFEST} names {name!r}, which is not in the folder"
        if not (folder / name).is_file():
            return f"{name} is missing"
        stat = (folder / name).stat()
        if stat.st_size != size:
            return f"{name} has {stat.st_size} bytes instead of {size}"
        seen.append((name, digest, stat.st_ino, stat.st_ctime_ns))
    if verified.get(folder) == seen:
        return None
    try:
        digests = _digests(folder, written)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, expected in written.items():
        if digests[name] != expected:
            return f"the contents of {name} changed (sha256)"
    verified[folder] = seen
    return None


def _digests(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Name -> size and sha256; hashing leaves Python's lock, so that threads help."""

    def digest(name: str) -> tuple[str, tuple[int, str]]:
        with open(folder / name, "rb") as file:
            return name, (os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(pool.map(digest, names))
