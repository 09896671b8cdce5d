"""Where the documents of a file begin and end: numpy indexes made in blocks, and reads at offsets that threads and forks may share."""

import collections
import csv
import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

Ranges = tuple[np.ndarray, np.ndarray, np.ndarray]  # first byte (int64), bytes (int64), number of the first line from 1 (uint32)
BLOCK = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OPEN_FILES = 64
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


def csv_rows(path: str) -> Ranges:
    """Rows of a csv file, whose quoted cells may hold line ends; a row that breaks the format is kept, so that reading it names the fault."""
    csv.field_size_limit(sys.maxsize)  # documents are often longer than the module's 131,072 characters
    rows, consumed, start, line = [], 0, 0, 1

    def fed(file):
        nonlocal consumed
        for text in file:
            consumed += len(text)
            yield text

    with open(path, "rb") as raw:
        start = consumed = len(BYTE_ORDER_MARK) if raw.read(3) == BYTE_ORDER_MARK else 0
    with open(path, encoding="latin-1", newline="") as file:  # one character a byte: lengths are offsets
        file.read(start)
        reader = csv.reader(fed(file))
        while True:
            try:
                filled = bool(next(reader))
            except csv.Error:
                filled = True
            except StopIteration:
                break
            if filled:
                rows.append((start, consumed - start, line))
            start, line = consumed, reader.line_num + 1
    starts, lengths, numbers = np.array(rows, np.int64).reshape(-1, 3).T
    return starts, lengths, numbers.astype(np.uint32)


class Files:
    """Byte ranges of several files, read by position: no shared file offset, and a bounded number of open descriptors."""

    def __init__(self, paths: tuple[str, ...], *, index: Callable[[str], Ranges]):
        parts = [index(path) for path in paths]
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
        """(content, number of the file) of a range."""
        file = bisect_right(self._first, index) - 1
        with self._lock:  # held while reading, or another thread might close the descriptor
            descriptor = self._open.pop(file, None)
            if descriptor is None:
                descriptor = os.open(self._paths[file], os.O_RDONLY)
                if len(self._open) >= OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            self._open[file] = descriptor
            return self._pread(descriptor, int(self._starts[index]), int(self._lengths[index])), file

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
