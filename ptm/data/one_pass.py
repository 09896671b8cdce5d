"""One pass over the validation split record by record, in source order: what evals read that measure whole texts."""

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ptm.config import Data
from ptm.data.batch import Document
from ptm.data.documents import Corpus, Tokenizer
from ptm.fields import ConfigError


class Record(NamedTuple):
    """A record's id, its text as it is, and its other fields."""

    id: str
    text: str
    columns: dict[str, Any]


def _checked(data: Data, found: Iterator[Any]) -> Iterator[Any]:
    """The same, once it is known that there is one. Raises ConfigError if there is none."""
    first = next(found, None)
    if first is None:
        given = f"data.validation_source={','.join(data.validation_source)}" if data.validation_source else f"data.holdout={data.holdout} of {','.join(data.source)}"
        raise ConfigError(f"there is no record to evaluate ({given}); give a source that holds some, and see data.columns.")
    return itertools.chain([first], found)


def _read(corpus: Corpus, limit: int | None, read: Callable[[int, int], Any]) -> Iterator[Any]:
    """What `read(source, record)` gives of the records in source order, without those that it gives None of; of each file `limit` at most."""
    taken: collections.Counter[str] = collections.Counter()
    for source, size in enumerate(corpus.sizes):
        for record in range(size):
            file = corpus.id(source, record).rpartition(":")[0]
            found = read(source, record) if limit is None or taken[file] < limit else None
            if found is not None:
                taken[file] += 1
                yield found


def records(data: Data, *, limit: int | None = None) -> Iterator[Record]:
    """The records of the validation split, of each file `limit` at most; bad ones are named and left out. Raises ConfigError at once if there is none."""
    corpus = Corpus(data, split="validation")

    def read(source: int, record: int) -> Record | None:
        found = corpus.record(source, record)
        return None if found is None else Record(corpus.id(source, record), *found)

    return _checked(data, _read(corpus, limit, read))


def documents(data: Data, *, tokenizer: Tokenizer, limit: int | None = None) -> Iterator[Document]:
    """The same, tokenized; records whose text gives no token are left out."""
    corpus = Corpus(data, split="validation", tokenizer=tokenizer)
    return _checked(data, _read(corpus, limit, corpus.document))
