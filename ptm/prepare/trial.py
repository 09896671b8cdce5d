"""The whole preparation of few documents in memory: what the rules remove, before hours of work; and, being short, what the other paths are held against."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ptm.prepare import contamination, reading, sketch, stages, summary
from ptm.prepare.contamination import Index
from ptm.prepare.options import Options
from ptm.prepare.stages import Document, Key

Record = tuple[Key, str, dict[str, Any]]  # key, split, what `stages.finish` gives


def index(options: Options) -> Index | None:
    """The index of the evaluation sets, or None where there are none. Raises ConfigError."""
    sets = {name: reading.eval_texts(number, options) for number, name in enumerate(options.eval_sets())}
    return contamination.build(sets, ngram=options.eval_ngram) if sets else None


def documents(options: Options) -> Iterator[Document]:
    """All documents of all sources, in the order of their keys."""
    return itertools.chain.from_iterable(reading.documents(unit, options) for unit in reading.units(options))


def prepare(read: Iterable[Document], options: Options, held_out: Index | None) -> tuple[list[Record], dict[str, int]]:
    """The records of documents in the order of their keys, and the counts; the documents may come in any order."""
    counts: collections.Counter[str] = collections.Counter()
    kept: dict[Key, tuple[str, str]] = {}
    for document in read:
        text, rule = stages.judge(document, options, held_out)
        counts.update(summary.of_read(document, rule))
        if text is not None:
            kept[document.key] = document.id, text
    for rule, wanted, find in ((stages.EXACT, options.exact, _exact), (stages.NEAR, options.near, _near)):
        for key in find({key: text for key, (_, text) in sorted(kept.items())}, options) if wanted else ():
            del kept[key]
            counts.update(summary.of_removed(rule))
    records = []
    for key, (id, text) in sorted(kept.items()):
        split, record = stages.split(text, options), stages.finish(id, text, options)
        counts.update(summary.of_kept(text, split, len(record["tokens"]) if "tokens" in record else None))
        records.append((key, split, record))
    return records, summary.total([counts])


def _exact(texts: dict[Key, str], options: Options) -> set[Key]:
    first: dict[bytes, Key] = {}
    return {key for key, text in texts.items() if first.setdefault(stages.digest(text), key) != key}


def _near(texts: dict[Key, str], options: Options) -> set[Key]:
    sets = {key: sketch.shingles(text, options) for key, text in texts.items()}
    groups: dict[tuple[int, np.uint64], list[Key]] = {}
    for key, shingles_S in sets.items():
        for band in enumerate(sketch.bands(shingles_S, options)):
            groups.setdefault(band, []).append(key)
    return {key for members in groups.values() for key in sketch.duplicates(members, sets.__getitem__, threshold=options.near_threshold)}
