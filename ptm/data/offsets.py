"""Where the documents of a file begin and end: numpy indexes made in blocks, and reads at offsets that threads and forks may share."""

import collections
import csv
import logging
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ptm.data import records
from ptm.data.records import BadRecord

Ranges = tuple[np.ndarray, np.ndarray, np.ndarray]  # first byte (int64), bytes (int64), number of the first line from 1 (uint32)
BLOCK = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OPEN_FILES = 64
_log = logging.getLogger(__name__)
_VISIBLE = np.ones(256, bool)
_VISIBLE[list(b" \t\r\n\v\f")] = False


def all_lines(path: str) -> tuple[np.ndarray, np.ndarray]:
    """(offsets where lines begin, and one more at the end of the file; whether each line holds more than blanks)."""
    size = os.path.getsize(path)
    if not size:
        return np.zeros(1, np.int64), np.zeros(0, bool)
    content = np.memmap(path, np.uint8, mode="r")
    start = len(BYTE_ORDER_MARK) if content[:3].tobytes() == BYTE_ORDER_MARK else 0
    bounds, filled = [np.array([start], np.int64)], []
    reach = BLOCK
    while start < size:
        block = content[start : start + reach]
        ends = np.flatnonzero(block == 10) + 1
        if start + reach < size:
            if not len(ends):
                reach *= 2
                continue
            block = block[: ends[-1]]
        elif not len(ends) or ends[-1] < len(block):
            ends = np.append(ends, len(block))
        filled.append(np.logical_or.reduceat(_VISIBLE[block], np.append(0, ends[:-1])))
        bounds.append(ends + start)
        start, reach = start + len(block), BLOCK
    return np.concatenate(bounds), np.concatenate(filled) if filled else np.zeros(0, bool)


def lines(path: str) -> Ranges:
    """Lines that are not blank, their ends included."""
    bounds, filled = all_lines(path)
    where = np.flatnonzero(filled)
    return bounds[where], bounds[where + 1] - bounds[where], (where + 1).astype(np.uint32)


def paragraphs(path: str) -> Ranges:
    """Runs of lines that are not blank, their ends included."""
    bounds, filled = all_lines(path)
    edges = np.diff(np.concatenate(([0], filled.astype(np.int8), [0])))
    first, past = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return bounds[first], bounds[past] - bounds[first], (first + 1).astype(np.uint32)


def whole(path: str) -> Ranges:
    """The file as one document."""
    with open(path, "rb") as file:
        start = len(BYTE_ORDER_MARK) if file.read(3) == BYTE_ORDER_MARK else 0
    return np.array([start]), np.array([os.path.getsize(path) - start]), np.ones(1, np.uint32)


class _Lines(Iterator[str]):
    """Lines of a file, of which those taken last can be given back."""

    def __init__(self, file: Iterable[str]):
        self._file, self._back = iter(file), collections.deque[str]()
        self.taken: list[str] = []

    def __next__(self) -> str:
        self.taken.append(self._back.popleft() if self._back else next(self._file))
        return self.taken[-1]

    def keep_first(self) -> None:
        """Gives all taken lines but the first back."""
        self._back.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def csv_rows(path: str) -> Ranges:
    """Rows of a csv file, whose quoted cells may hold line ends; a row that breaks the format is kept, so that reading it names the fault.

    A quote that nothing closes, or that only the beginning of a later cell closes, would take the rows behind it along: its line alone is then the row.
    """
    csv.field_size_limit(records.LONGEST)  # documents are often longer than the module's 131,072 characters
    with open(path, "rb") as raw:
        start = len(BYTE_ORDER_MARK) if raw.read(3) == BYTE_ORDER_MARK else 0
    rows, line = [], 1
    with open(path, encoding="latin-1", newline="") as file:  # one character a byte: lengths are offsets
        file.read(start)
        lines = _Lines(file)
        reader = csv.reader(lines)
        while True:
            lines.taken.clear()
            try:
                filled = bool(next(reader))
            except csv.Error:
                filled = True
            except StopIteration:
                break
            if len(lines.taken) > 1 and not _is_closed(lines.taken):
                lines.keep_first()
            length = sum(map(len, lines.taken))
            if filled:
                rows.append((start, length, line))
            start, line = start + length, line + len(lines.taken)
    starts, lengths, numbers = np.array(rows, np.int64).reshape(-1, 3).T
    return starts, lengths, numbers.astype(np.uint32)


def _is_closed(lines: list[str]) -> bool:
    """Whether the quotes of a row stand where they should."""
    try:
        next(csv.reader(lines, strict=True))
    except csv.Error:
        return False
    return True


class Files:
    """Byte ranges of several files, read by position: no shared file offset, and a bounded number of open descriptors."""

    def __init__(self, paths: tuple[str, ...], *, index: Callable[[str], Ranges]):
        parts = [index(path) for path in paths]
        for path, (starts, _, _) in zip(paths, parts):
            if not len(starts):
                _log.warning("%s holds no record", path)
        self._paths = paths
        self._first = np.cumsum([0, *(len(starts) for starts, _, _ in parts)]).tolist()
        self._starts, self._lengths, self._lines = (np.concatenate(column) for column in zip(*parts))
        self._open: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._first[-1]

    def where(self, index: int) -> tuple[int, int]:
        """(number of the file, line in it from 1) of a range."""
        return bisect_right(self._first, index) - 1, int(self._lines[index])

    def read(self, index: int) -> tuple[bytes, int]:
        """(content, number of the file) of a range. Raises BadRecord for one that is too long, or whose file is shorter than it was."""
        file, length = bisect_right(self._first, index) - 1, int(self._lengths[index])
        records.require_size(length)
        with self._lock:  # held while reading, or another thread might close the descriptor
            descriptor = self._open.pop(file, None)
            if descriptor is None:
                descriptor = os.open(self._paths[file], os.O_RDONLY)
                if len(self._open) >= OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            self._open[file] = descriptor
            content = self._pread(descriptor, int(self._starts[index]), length)
        if len(content) < length:
            raise BadRecord(f"its file lacks {length - len(content):,} of its {length:,} bytes: it was cut off after its records were found")
        return content, file

    @staticmethod
    def _pread(descriptor: int, start: int, length: int) -> bytes:
        content = os.pread(descriptor, length, start)
        while len(content) < length:  # one call reads at most 2 GiB
            more = os.pread(descriptor, length - len(content), start + len(content))
            if not more:
                break
            content += more
        return content

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
