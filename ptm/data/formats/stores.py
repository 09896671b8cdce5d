"""Formats that have an index of their own: array_record, parquet, tensorflow-datasets, and the documentation that every Python carries."""

import collections
import hashlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from ptm.data import files, prepared, python_docs
from ptm.data.files import File
from ptm.data.formats.lines import json_object
from ptm.data.records import BadRecord, Columns, Source
from ptm.fields import ConfigError

_log = logging.getLogger(__name__)
ROW_GROUP_BYTES = 256 << 20  # of row groups that are kept in memory, decoded


class ArrayRecordSource(Source):
    """Records of array_record files: JSON objects if one of a file's first records is one, else UTF-8 text (column 'text')."""

    def __init__(self, name: str, *, found: Sequence[File], columns: Columns):
        self._found, self._names = found, files.names(found)
        self._readers = [_array_record_reader(file) for file in found]
        self._first = np.cumsum([0, *map(len, self._readers)])
        self._json = [any(_is_object(reader, i) for i in range(min(8, len(reader)))) for reader in self._readers]
        super().__init__(name, columns=columns, known=None if any(self._json) else ("text",))

    def __len__(self) -> int:
        return int(self._first[-1])

    def _where(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, index - int(self._first[file])

    def id(self, index: int) -> str:
        file, number = self._where(index)
        return f"{self._names[file]}:{number + 1}"

    def raw(self, index: int) -> Mapping[str, Any]:
        file, number = self._where(index)
        content = _stored(self._readers[file], number)
        return json_object(content) if self._json[file] else {"text": content}

    def digests(self) -> list[tuple[str, int, str]]:
        return files.digests(self._found)


def _array_record_reader(file: File) -> Sequence[bytes]:
    try:
        reader = grain.sources.ArrayRecordDataSource([file.path])
        if not len(reader):
            _log.warning("%s holds no record", file.place)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"data source file {file.place} is no array_record file, or a damaged one ({_first_line(error)}); make it again.") from None
    return reader


def _stored(reader: Sequence[Any], number: int) -> Any:
    """A record of a store; raises BadRecord with what its own reader says."""
    try:
        return reader[number]
    except OSError:
        raise  # of the disk, not of the record
    except Exception as error:  # each store has its own
        raise BadRecord(f"it cannot be read ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _is_object(reader: Sequence[bytes], number: int) -> bool:
    try:
        json_object(_stored(reader, number))
    except BadRecord:
        return False
    return True


def array_record(name: str, path: str, columns: Columns, document: str) -> Source:
    """array_record files of JSON objects or of text."""
    return ArrayRecordSource(name, found=files.find(path, "array_record"), columns=columns)


class ParquetSource(Source):
    """Rows of parquet files. Their row groups are decoded one by one, only the columns that are asked for; the last ones are kept."""

    def __init__(self, name: str, *, found: Sequence[File], columns: Columns):
        try:
            import pyarrow.parquet  # an extra, and slow to import
        except ImportError:
            raise ConfigError(f"data source {name} needs pyarrow, which is not installed; install it with: pip install 'ptm[parquet]'.") from None
        self._found, self._names = found, files.names(found)
        self._files = []
        for file in found:
            try:
                self._files.append(pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True))
            except (pyarrow.ArrowException, OSError) as error:
                raise ConfigError(f"data source file {file.place} is no parquet file ({_first_line(error)}).") from None
            if not self._files[-1].metadata.num_rows:
                _log.warning("%s holds no record", file.place)
        known = [column for column in self._files[0].schema_arrow.names if all(column in opened.schema_arrow.names for opened in self._files)]
        super().__init__(name, columns=columns, known=known)
        self._wanted = [column for column in known if any(column in (used, used.partition(".")[0]) for used in columns.names)]
        self._groups = [(file, group) for file, opened in enumerate(self._files) for group in range(opened.num_row_groups)]
        self._first = np.cumsum([0, *(self._files[file].metadata.row_group(group).num_rows for file, group in self._groups)])
        self._of_file = np.cumsum([0, *(opened.metadata.num_rows for opened in self._files)])
        self._broken = pyarrow.ArrowException
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._first[-1])

    def id(self, index: int) -> str:
        file = int(np.searchsorted(self._of_file, index, side="right")) - 1
        return f"{self._names[file]}:{index - int(self._of_file[file]) + 1}"

    def raw(self, index: int) -> Mapping[str, Any]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        try:
            return self._group(number).slice(index - int(self._first[number]), 1).to_pylist()[0]
        except (self._broken, ValueError, OverflowError) as error:
            raise BadRecord(f"its row cannot be read ({_first_line(error)})") from None

    def _group(self, number: int) -> Any:
        with self._lock:  # a file is read by one thread at a time
            if number not in self._kept:
                file, group = self._groups[number]
                try:
                    table = self._files[file].read_row_group(group, columns=self._wanted, use_threads=False)
                except (self._broken, OSError) as error:
                    raise BadRecord(f"its row group cannot be read ({_first_line(error)})") from None
                if table.num_rows != self._first[number + 1] - self._first[number]:
                    raise BadRecord(f"its row group has {table.num_rows} rows, and the file says {self._first[number + 1] - self._first[number]}")
                self._kept[number] = table
                while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > ROW_GROUP_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
            return self._kept[number]

    def digests(self) -> list[tuple[str, int, str]]:
        return files.digests(self._found)


def parquet(name: str, path: str, columns: Columns, document: str) -> Source:
    """Parquet files; lists and structs become lists and dicts."""
    return ParquetSource(name, found=files.find(path, "parquet"), columns=columns)


class TfdsSource(Source):
    """A split of a tensorflow-datasets data set stored as array_record."""

    def __init__(self, name: str, *, builder: Any, split: str, columns: Columns):
        super().__init__(name, columns=columns, known=tuple(sorted(builder.info.features)))
        self._prefix = f"{builder.info.name}/{split}"
        try:
            self._digests = [(os.path.basename(path), *files.digest(str(path))) for path in builder.info.splits[split].filepaths]
            self._rows = builder.as_data_source(split=split)
            self._size = len(self._rows)
        except Exception as error:  # it was prepared for TensorFlow, or is damaged
            raise ConfigError(
                f"data source {name} cannot be read without TensorFlow ({_first_line(error)}); prepare it with file_format='array_record', again if it was so."
            ) from error

    def __len__(self) -> int:
        return self._size

    def id(self, index: int) -> str:
        return f"{self._prefix}:{index + 1}"

    def raw(self, index: int) -> Mapping[str, Any]:
        return _stored(self._rows, index)

    def digests(self) -> list[tuple[str, int, str]]:
        return self._digests


def tfds(name: str, path: str, columns: Columns, document: str) -> Source:
    """A data set of tensorflow-datasets: NAME[/SPLIT], or the folder that it was prepared in."""
    import tensorflow_datasets  # a slow import, and only this format needs it

    path = os.path.expanduser(path).rstrip("/")
    place, _, split = path.rpartition("/")
    if not place or _is_prepared(path):
        place, split = path, "train"
    try:
        builder = tensorflow_datasets.builder_from_directory(place) if _is_prepared(place) else tensorflow_datasets.builder(place)
    except Exception as error:  # what the parsers of its files raise has no common kind
        raise ConfigError(
            f"data source {name}: no data set '{place}' ({_first_line(error)}); give NAME[/SPLIT] or the folder that holds dataset_info.json."
        ) from None
    if not builder.info.splits:
        raise ConfigError(
            f"data source {name} is not prepared in {builder.data_dir}; prepare it with tensorflow_datasets and file_format='array_record' first."
        )
    if split not in builder.info.splits:
        raise ConfigError(f"data source {name} has no split '{split}'; it has: {', '.join(sorted(builder.info.splits))}.")
    source = TfdsSource(name, builder=builder, split=split, columns=columns)
    if os.path.isfile(os.path.join(place, prepared.FILE)):
        manifest = prepared.read(place)
        prepared.check_ends(manifest, source.digests(), folder=place)
        source.tokenizer = manifest["tokenizer"]
    return source


def _is_prepared(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "dataset_info.json"))


class PythonDocsSource(Source):
    """The documentation that this Python carries: language topics and the docstrings of the standard library."""

    def __init__(self, name: str, *, columns: Columns):
        super().__init__(name, columns=columns, known=("text",))
        self._documents = python_docs.documents()

    def __len__(self) -> int:
        return len(self._documents)

    def id(self, index: int) -> str:
        return self._documents[index][0]

    def raw(self, index: int) -> Mapping[str, Any]:
        return {"text": self._documents[index][1]}

    def digests(self) -> list[tuple[str, int, str]]:
        return [(name, len(text), hashlib.sha256(text.encode()).hexdigest()) for name, text in self._documents]


def documentation(name: str, path: str, columns: Columns, document: str) -> Source:
    """What every Python has; takes no path."""
    if path:
        raise ConfigError(f"data source {name} takes no path; write python_docs:.")
    return PythonDocsSource(name, columns=columns)
