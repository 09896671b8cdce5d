"""Random access to the records of a source FORMAT:PATH.

Every record has a stable id, '<file name>:<line>' where it comes from lines of a file. Line formats keep byte offsets in memory, never text.
"""

import functools
import hashlib
import json
from collections.abc import Callable

from ptm.config import Data
from ptm.data import files, offsets
from ptm.data.formats import lines, stores, trees, unfolded
from ptm.data.records import Columns, Source
from ptm.fields import ConfigError, lookup

# From (the source as it was given, its path, the columns that are asked for, data.document) to the source.
SOURCES: dict[str, Callable[[str, str, Columns, str], Source]] = {
    "text": lines.text,
    "jsonl": lines.jsonl,
    "json": trees.json_list,
    "csv": lines.table("csv", offsets.csv_rows, lines.csv_cells),
    "tsv": lines.table("tsv", offsets.lines, lines.tsv_cells),
    "parquet": stores.parquet,
    "conll": lines.conll,
    "squad": trees.squad,
    "parallel": lines.parallel,
    "array_record": stores.array_record,
    "tfds": stores.tfds,
    "python_docs": stores.documentation,
    "chat": unfolded.chat,
    "multirc": unfolded.multirc,
    "record": unfolded.record,
    "wsc": unfolded.wsc,
    "cluewsc": unfolded.cluewsc,
    "csl": unfolded.csl,
    "chid": unfolded.chid,
    "c3": unfolded.c3,
}


def open_source(spec: str, *, data: Data, number: int = 0) -> Source:
    """The source that FORMAT:PATH names, read as `data.columns` (for the source of that number) and `data.document` say.

    Raises ConfigError, also where it holds no record or lacks a column.
    """
    kind, colon, path = spec.partition(":")
    if not colon:
        raise ConfigError(f"data source '{spec}' is not of the form FORMAT:PATH; formats: {', '.join(SOURCES)}.")
    lookup(SOURCES, kind, "format of data source")
    patterns = lines.languages(path).values() if kind == "parallel" else (path,)
    return _opened(spec, data.columns, number, data.document, tuple(files.stamps(pattern) for pattern in patterns))


@functools.lru_cache(maxsize=32)
def _opened(spec: str, entries: tuple[str, ...], number: int, document: str, stamps: tuple) -> Source:
    """Indexing a large source takes minutes, so that training, validation and fingerprints share it while its files (`stamps`) stay."""
    kind, _, path = spec.partition(":")
    source = SOURCES[kind](spec, path, Columns(entries, number=number), document)
    source.check_columns()
    if not len(source):
        raise ConfigError(f"data source {spec} holds no document; check the files and data.document={document}.")
    return source


def fingerprint(source: Source) -> str:
    """First 16 hex digits of the sha256 over the names, sizes, first and last megabytes of a source's files."""
    return hashlib.sha256(json.dumps(source.digests()).encode()).hexdigest()[:16]
