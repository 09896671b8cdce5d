"""The tokenized documents of one split: read, told apart into train and validation, tokenized once while they fit the cache."""

import collections
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from ptm.config import Data, weight_points
from ptm.data import sources
from ptm.data.batch import Document
from ptm.data.mixture import Order
from ptm.data.records import BadRecord, Columns, Source
from ptm.fields import ConfigError, lookup

CACHE_BYTES = 128 << 20
ENTRY_BYTES = 500  # a document's size beside its tokens, roughly
HOLDOUT_KEY = b"ptm holdout"  # the split depends on nothing else, so that it outlives seeds and reordering
TOKENS = "tokens"  # the field of token ids that a source holds, as `ptm prepare --tokenizer` writes them
SPLITS = {"train": False, "validation": True}
_log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What the pipeline knows of a tokenizer."""

    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32, without special tokens."""
        ...


class Corpus:
    """Documents by (source, record); what cannot be read is remembered in `bad`, and is an error beyond `data.max_bad_records`."""

    def __init__(self, data: Data, *, split: str, tokenizer: Tokenizer | None = None):
        """`split` is train or validation; without a tokenizer only `record` can be called."""
        self._validation = lookup(SPLITS, split, "split")
        given = data.validation_source if self._validation and data.validation_source else data.source
        self.sources = tuple(sources.open_source(spec, data=data, number=number) for number, spec in enumerate(given))
        self.sizes = tuple(map(len, self.sources))
        self.weights = _weights(data, self.sizes) if given is data.source else (1.0,) * len(self.sources)
        self.bad: dict[tuple[int, int], str] = {}
        self._data, self._tokenizer = data, tokenizer
        self._holdout_by = None if data.validation_source else data.holdout_by
        if tokenizer is not None:
            for source in self.sources:
                _require_fitting(source, tokenizer, cut=self._holdout_by == "tail")
        self._cache: collections.OrderedDict[tuple[int, int], Document | None] = collections.OrderedDict()
        self._cached_bytes = 0

    def id(self, source: int, record: int) -> str:
        """A record's id, unique over all sources."""
        name = self.sources[source].id(record)
        return f"{source}/{name}" if len(self.sources) > 1 else name

    def record(self, source: int, record: int) -> tuple[str, dict[str, Any]] | None:
        """(this split's part of the text, other fields) of a record; None if it is bad or belongs to the other split."""
        try:
            columns = self.sources[source].read(record)
        except BadRecord as reason:
            self._note(source, record, str(reason))
            return None
        text = columns.pop("text")
        if self._holdout_by == "tail":
            cut = int(len(text) * (1 - self._data.holdout))
            text = text[cut:] if self._validation else text[:cut]
        elif self._holdout_by == "document":
            place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=HOLDOUT_KEY).digest(), "big") / 2**64
            if (place < self._data.holdout) != self._validation:
                return None
        return (text, columns) if text else None

    def document(self, source: int, record: int) -> Document | None:
        """The tokenized record with read-only tokens; None if it is bad, of the other split, or has no token."""
        key = (source, record)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        found, document = self.record(source, record), None
        if found is not None:
            given = found[1].pop(TOKENS, None)
            tokens_L = _tokens(self._tokenizer, found[0]) if given is None else _read_only(given)
            if len(tokens_L):
                document = Document(self.id(source, record), tokens_L, found[1], source)
        self._cache[key] = document
        self._cached_bytes += _size(document)
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])
        return document

    def describe_bad(self) -> list[str]:
        """'ID: reason' of every bad record met so far."""
        return [f"{self.id(*key)}: {reason}" for key, reason in sorted(self.bad.items())]

    def _note(self, source: int, record: int, reason: str) -> None:
        if (source, record) in self.bad:
            return
        self.bad[source, record] = reason
        _log.warning("skipped %s: %s", self.id(source, record), reason)
        if len(self.bad) > self._data.max_bad_records:
            raise ConfigError(
                f"more than data.max_bad_records={self._data.max_bad_records} records cannot be read: {'; '.join(self.describe_bad()[:5])}"
                f"{'; ...' if len(self.bad) > 5 else ''}. Mend the source, or raise data.max_bad_records."
            )


def _weights(data: Data, sizes: tuple[int, ...]) -> tuple[float, ...]:
    """Shares of the sources' draws, not yet divided by their sum; of a schedule the mean of its entries."""
    if data.temperature is not None:
        return tuple(min(size, data.size_limit or size) ** (1 / data.temperature) for size in sizes)
    if data.weight_schedule:
        shares = [[weight / sum(weights) for weight in weights] for _, weights in weight_points(data.weight_schedule)]
        return tuple(map(sum, zip(*shares)))
    return data.weights or (1.0,) * len(sizes)


def _require_fitting(source: Source, tokenizer: Tokenizer, *, cut: bool) -> None:
    """Raises ConfigError where token ids that a source holds, and that are asked for, are not those that the run would make of its texts."""
    if TOKENS not in source.columns.fields:
        return
    if source.tokenizer != tokenizer.fingerprint:
        made = "does not say by which tokenizer" if source.tokenizer is None else f"were made by another one (fingerprint {source.tokenizer[:16]})"
        raise ConfigError(
            f"data.columns takes token ids of {source.name}, which {made}; the run's has fingerprint {tokenizer.fingerprint[:16]}."
            " Set tokenizer.kind and tokenizer.path as --tokenizer of `ptm prepare` was, or leave tokens out of data.columns."
        )
    if cut:
        raise ConfigError(
            "data.holdout_by=tail cuts texts, and token ids of data.columns are those of whole ones; set data.validation_source, or data.holdout_by=document."
        )


def _tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return _read_only(tokenizer.encode(text))


def _read_only(tokens: Any) -> np.ndarray:
    tokens_L = np.asarray(tokens, np.int32).view()
    tokens_L.flags.writeable = False
    return tokens_L


_columns_of = functools.lru_cache(maxsize=32)(Columns)


def document_of(record: Mapping[str, Any], *, id: str, data: Data, tokenizer: Tokenizer, source: int = 0, optional: Collection[str] = ()) -> Document:
    """The document of a plain record, mapped by `data.columns` and checked as the records of that source are; raises BadRecord with the reason.

    `optional` fields, which are to be predicted, say, are left out where the record lacks their columns. A field that is one column, and no template,
    may stand in the record under its own name instead.
    """
    columns = _columns_of(data.columns, number=source)
    named = {column: record[field] for field, column in columns.columns.items() if field in record and column not in record}
    fields = columns.read({**record, **named}, optional=optional)
    tokens_L = _tokens(tokenizer, fields.pop("text"))
    if not len(tokens_L):
        raise BadRecord("its text has no token")
    return Document(id, tokens_L, fields, source)


def _size(document: Document | None) -> int:
    return ENTRY_BYTES + (document.tokens_L.nbytes if document else 0)


def cut(document: Document, *, size: int, mark: str) -> list[Document]:
    """The document in pieces of at most `size` tokens with ids ID{mark}0, ID{mark}1, ...; one that fits stays as it is."""
    tokens_L = document.tokens_L
    if len(tokens_L) <= size:
        return [document]
    starts = range(0, len(tokens_L), size)
    return [dataclasses.replace(document, id=f"{document.id}{mark}{n}", tokens_L=tokens_L[at : at + size]) for n, at in enumerate(starts)]


def training_texts(data: Data, *, limit_bytes: int, fields: Collection[str] = ("text",)) -> Iterator[str]:
    """Text of the training split, up to about `limit_bytes` of UTF-8 shared out by the sources' weights, for training a tokenizer.

    Of each record it is the text of `fields`, as far as they are mapped. Documents come in a fixed random order, so that a part of a corpus stands for
    all of it; the last one is cut at the limit. Raises ConfigError where there is none.
    """
    corpus, empty = Corpus(data, split="train"), True
    for source, (size, weight) in enumerate(zip(corpus.sizes, corpus.weights)):
        left = int(limit_bytes * weight / sum(corpus.weights))
        order = Order((size,), weights=(1.0,), seed=source, shuffle=True)
        for number in range(size):
            if left <= 0:
                break
            found = corpus.record(source, order[number][1])
            if found is None:
                continue
            record = {"text": found[0], **found[1]}
            for field in fields:
                if not isinstance(record.get(field), str):
                    continue
                content = record[field].encode(errors="ignore")[:left]
                if text := content.decode(errors="ignore"):
                    empty = False
                    yield text
                left -= len(content)
    if empty:
        bad = "; ".join(corpus.describe_bad()[:5]) or "none is bad"
        raise ConfigError(
            f"no text to train a vocabulary on in data.source={','.join(data.source)}: of {sum(corpus.sizes)} records {len(corpus.bad)} cannot be read ({bad})."
        )
