"""Files that are there whole, or as they were before, whatever is killed meanwhile and whenever the power fails."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, binary: bool = False) -> Iterator[IO]:
    """A file (of text UTF-8, line ends as they are given) that takes the place of `path` when the block ends; if the block fails, nothing has changed. Raises OSError."""
    partial = Path(f"{os.fspath(path)}.{os.getpid()}.partial")  # several processes may write the same one at a moment: one of them is last
    try:
        with open(partial, "wb") if binary else open(partial, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: str) -> None:
    """Replaces a text file, or makes it. Raises OSError."""
    with replacing(path) as file:
        file.write(content)
