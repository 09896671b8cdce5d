"""What the local path keeps on disk between its stages: documents in parts of bounded size, whose rows are numbered through, in the order of their keys.

A part is a few files with one stem: STEM.text and STEM.ids (UTF-8, one behind the other), STEM.rows.npy (where they end, split, shard) and
STEM.digests.npy (uint64 [3, rows]: both halves of the digest and the row, ascending). Later stages add STEM.bands.npy.
"""

import functools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptm import atomic
from ptm.prepare import stages
from ptm.prepare.options import Options

PART_ROWS = 1 << 16
PART_BYTES = 32 << 20
ROWS = np.dtype([("end", "<i8"), ("id_end", "<i8"), ("shard", "<u8"), ("validation", "?")])


def save(path: Path, array: np.ndarray) -> None:
    """An array as a .npy file that is there whole or not at all."""
    with atomic.replacing(path, binary=True) as file:
        np.save(file, array, allow_pickle=False)


def load(path: Path, *, mode: str = "r") -> np.ndarray:
    """An array of `save`, mapped (`mode` as that of np.memmap) and not read; nothing cannot be mapped."""
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)


class Writer:
    """Writes documents into parts within a folder, in a `with` block whose end ends the last one."""

    def __init__(self, folder: Path, options: Options):
        self._folder, self._options, self._count = folder, options, 0
        self._start()

    def _start(self) -> None:
        self._stem = self._folder / f"{self._count:08d}"  # sorted by name they are in order
        self._rows: list[tuple[int, int, int, bool]] = []
        self._digests: list[bytes] = []
        self._end = self._id_end = 0
        self._text, self._ids = (open(f"{self._stem}.{kind}", "wb") for kind in ("text", "ids"))  # noqa: SIM115

    def add(self, id: str, text: str) -> None:
        """Adds a document behind those before it."""
        self._end += self._text.write(text.encode())
        self._id_end += self._ids.write(id.encode())
        self._rows.append((self._end, self._id_end, stages.shard_hash(id), stages.split(text, self._options) == "validation"))
        self._digests.append(stages.digest(text))
        if len(self._rows) >= PART_ROWS or self._end >= PART_BYTES:
            self._finish()
            self._count += 1
            self._start()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self._finish()
        for file in (self._text, self._ids):
            file.close()

    def _finish(self) -> None:
        """Writes what is left of the part, to the disk."""
        for file in (self._text, self._ids):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        halves = np.frombuffer(b"".join(self._digests), ">u8").astype(np.uint64).reshape(-1, 2).T
        order = np.lexsort((halves[1], halves[0]))  # stable: rows of equal digests ascend
        save(self._stem.with_suffix(".rows.npy"), np.array(self._rows, ROWS))
        save(self._stem.with_suffix(".digests.npy"), np.stack([halves[0][order], halves[1][order], order.astype(np.uint64)]))


class Part:
    """A part that was written."""

    def __init__(self, stem: Path):
        self.stem = stem
        self.rows = np.array(load(stem.with_suffix(".rows.npy")))
        self._ends = tuple(np.concatenate([[0], self.rows[column]]) for column in ("end", "id_end"))
        self._files = tuple(os.open(f"{stem}.{kind}", os.O_RDONLY) for kind in ("text", "ids"))

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, file: int, row: int) -> str:
        start, end = self._ends[file][row : row + 2].tolist()
        return os.pread(self._files[file], end - start, start).decode()

    def text(self, row: int) -> str:
        """The text of a row."""
        return self._read(0, row)

    def id(self, row: int) -> str:
        """The id of a row."""
        return self._read(1, row)

    def sizes(self) -> np.ndarray:
        """Bytes of the text of each row, int64 [rows]."""
        return np.diff(self.rows["end"], prepend=0)

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file)


_part = functools.lru_cache(maxsize=16)(Part)


class Parts:
    """All parts, `stems` in the order of keys; a document's number is its row counted through all of them."""

    def __init__(self, stems: Sequence[Path]):
        self.stems = tuple(stems)
        self.first = [0]
        for stem in self.stems:
            self.first.append(self.first[-1] + len(load(stem.with_suffix(".rows.npy"))))

    def __len__(self) -> int:
        return self.first[-1]

    def __iter__(self) -> Iterator[Part]:
        return map(Part, self.stems)

    def text(self, number: int) -> str:
        """The text of a document."""
        place = bisect_right(self.first, number) - 1
        return _part(self.stems[place]).text(number - self.first[place])

    def between(self, suffix: str, low: int, high: int | None, *, item: int | None = None) -> np.ndarray:
        """Columns of the arrays that the parts have under a suffix, [columns, documents], whose first is at least `low` and below `high` (None: no bound).

        The last column, which has rows, becomes document numbers. `item` is one of arrays that a file has several of.
        """
        found = []
        for stem, first in zip(self.stems, self.first):
            array = load(stem.with_suffix(suffix))
            array = array if item is None else array[item]
            start = np.searchsorted(array[0], np.uint64(low))
            stop = array.shape[1] if high is None else np.searchsorted(array[0], np.uint64(high))
            columns = np.array(array[:, start:stop])
            columns[-1] += np.uint64(first)
            found.append(columns)
        return np.concatenate(found, axis=1)


def ranges(count: int, rows: int) -> list[tuple[int, int | None]]:
    """Ranges of 64-bit hashes, [low, high) with None for no bound, that divide `count` of them into parts of about `rows`."""
    parts = max(1, -(-count // rows))
    bounds = [(2**64 * part) // parts for part in range(parts)]
    return list(zip(bounds, [*bounds[1:], None]))
