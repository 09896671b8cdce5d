"""The stages as an Apache Beam pipeline, for corpora that one machine does not hold; its records are those of `local`, byte for byte.

    read      a unit of work -> documents that filters leave                                        Reshuffle of units
    exact     of one digest the smallest key stays                                                  GroupByKey of all texts
    near      (band, key) -> names of sets of records, by record                                    GroupByKey of keys, bands times
              records with their names -> the n-grams of those that share a band with another       CoGroupByKey of all texts
              the members of a set are compared as `sketch.duplicates` says -> keys that go         GroupByKey of n-grams of shared bands
              records that were compared, without those that go                                     CoGroupByKey of their texts
    write     (split, shard) -> records in the order of their keys -> a file                        GroupByKey of all records

Every set of records that share a band is compared once, however many bands it shares. A worker holds a document at a time; of a shard, its records; of a set that is
compared, the keys and their places in a spooled file.
"""

import collections
import functools
import hashlib
import io
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from apache_beam.transforms.window import GlobalWindows

from ptm import untrusted
from ptm.prepare import dataset, reading, sketch, stages, summary
from ptm.prepare.contamination import Index
from ptm.prepare.dataset import Shard
from ptm.prepare.options import Options
from ptm.prepare.reading import Unit
from ptm.prepare.stages import Document, Key

RESULT, INDEX, SHARDS, NOTES = "result.json", "index.npz", "shards", "notes"
COUNTS, BAD, MAIN, ALONE, SETS = "counts", "bad", "main", "alone", "sets"
SPOOLED = 32 << 20  # bytes of n-grams of a set that stay in memory
Path = tfds.core.Path  # of this machine or of a store
_KEY = struct.Struct(">IIQ")

Text = tuple[str, str]  # id, text
Keyed = tuple[bytes, Text]


def pack(key: Key) -> bytes:
    """A key as 16 bytes that are ordered as keys are."""
    return _KEY.pack(*key)


class _Counting(beam.DoFn):
    """Gives what it `count`s, bundle by bundle, under the tag COUNTS: exact on every runner, as Beam's own metrics are not."""

    def start_bundle(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()

    def count(self, counts: dict[str, int]) -> None:
        self._counts.update(counts)

    def finish_bundle(self) -> Iterator[Any]:
        yield beam.pvalue.TaggedOutput(COUNTS, GlobalWindows.windowed_value(dict(self._counts)))


class Read(_Counting):
    """(unit) -> (key, (id, text)) of the documents that stay; under BAD (key, id, problem) of records that cannot be read."""

    def __init__(self, options: Options, folder: str):
        self._options, self._folder = options, folder

    def setup(self) -> None:
        self._index = load_index(self._folder)

    def process(self, unit: tuple) -> Iterator[Any]:
        bad: list[Document] = []
        for document in reading.documents(Unit(*unit), self._options):
            text, rule = stages.judge(document, self._options, self._index)
            self.count(summary.of_read(document, rule))
            if text is not None:
                yield pack(document.key), (document.id, text)
            elif rule == stages.BAD:
                bad.append(document)
                stages.require_few([(document.id, document.problem) for document in bad], self._options)
                yield beam.pvalue.TaggedOutput(BAD, (pack(document.key), document.id, document.problem))


class Exact(_Counting):
    """(digest, [(key, (id, text))]) -> the smallest."""

    def process(self, group: tuple[bytes, Iterable[Keyed]]) -> Iterator[Keyed]:
        first, seen = None, 0
        for record in group[1]:
            first = record if first is None else min(first, record)
            seen += 1
        assert first is not None
        self.count(summary.of_removed(stages.EXACT, count=seen - 1))
        yield first


def bands(record: Keyed, options: Options) -> Iterator[tuple[bytes, bytes]]:
    """(band and its key, key of the record) for each band of a record."""
    for band, value in enumerate(sketch.bands(sketch.shingles(record[1][1], options), options).tolist()):
        yield struct.pack(">HQ", band, value), record[0]


def members(group: tuple[bytes, Iterable[bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """(key of a record, name of the set) for the records that share a band, if they are several. The name follows from the members alone."""
    seen, total = 0, 0
    for key in group[1]:
        seen += 1
        total += int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big")
    if seen > 1:
        name = (total % 2**128).to_bytes(16, "big") + seen.to_bytes(8, "big")
        for key in group[1]:
            yield key, name


class Apart(beam.DoFn):
    """(key, record and names of its sets) -> the record, under ALONE if it is in no set; under SETS (name, (key, n-grams)) for each set."""

    def __init__(self, options: Options):
        self._options = options

    def process(self, group: tuple[bytes, dict[str, Iterable]]) -> Iterator[Any]:
        key, found = group
        (record,) = found["record"]
        names = set(found["sets"])
        yield (key, record) if names else beam.pvalue.TaggedOutput(ALONE, (key, record))
        content = sketch.shingles(record[1], self._options).astype("<u8").tobytes() if names else b""
        for name in sorted(names):
            yield beam.pvalue.TaggedOutput(SETS, (name, (key, content)))


Place = tuple[bytes, int, int]  # key of a record; where its n-grams lie in a file, and their bytes


def similar(group: tuple[bytes, Iterable[tuple[bytes, bytes]]], options: Options) -> Iterator[tuple[bytes, None]]:
    """(name of a set, its members' n-grams) -> (key, None) of the members that go; n-grams lie in a file when they are many."""
    with tempfile.SpooledTemporaryFile(max_size=SPOOLED) as file:
        places: list[Place] = []
        for key, content in group[1]:
            places.append((key, file.tell(), len(content)))
            file.write(content)
        for key, _, _ in sketch.duplicates(sorted(places), functools.partial(_shingles, file), threshold=options.near_threshold):
            yield key, None


def _shingles(file: IO[bytes], place: Place) -> np.ndarray:
    file.seek(place[1])
    return np.frombuffer(file.read(place[2]), "<u8")


class Stay(_Counting):
    """(key, record and whether it goes) -> the record, unless it goes."""

    def process(self, group: tuple[bytes, dict[str, Iterable]]) -> Iterator[Keyed]:
        key, found = group
        (record,) = found["record"]
        if any(True for _ in found["gone"]):
            self.count(summary.of_removed(stages.NEAR))
        else:
            yield key, record


class Finish(_Counting):
    """(key, (id, text)) -> (split, id, key, serialized record)."""

    def __init__(self, options: Options):
        self._options = options

    def process(self, record: Keyed) -> Iterator[tuple[str, str, bytes, bytes]]:
        key, (id, text) = record
        split, made = stages.split(text, self._options), stages.finish(id, text, self._options)
        self.count(summary.of_kept(text, split, len(made["tokens"]) if "tokens" in made else None))
        yield split, id, key, dataset.serialize(made, self._options)


def plan(counts: dict[str, int], options: Options) -> dict[str, int]:
    """The number of shards of each split that has documents."""
    return {split: stages.shards(counts[f"{split}/bytes"], options) for split in stages.SPLITS if counts.get(f"{split}/documents")}


def assign(record: tuple[str, str, bytes, bytes], counts: dict[str, int], options: Options) -> tuple[tuple[str, int], tuple[bytes, bytes]]:
    """((split, shard), (key, serialized record))."""
    split, id, key, content = record
    return (split, stages.shard(id, plan(counts, options)[split])), (key, content)


def shards(counts: dict[str, int], options: Options) -> Iterator[tuple[tuple[str, int], tuple[bytes, bytes]]]:
    """An entry without key for each shard, so that those are written too that get no record."""
    for split, count in plan(counts, options).items():
        for number in range(count):
            yield (split, number), (b"", b"")


class Write(beam.DoFn):
    """((split, shard), [(key, serialized record)]) -> the shard as JSON. One that an earlier pipeline has finished is not made again."""

    def __init__(self, options: Options, folder: str):
        self._options, self._folder = options, folder

    def process(self, group: tuple[tuple[str, int], Iterable[tuple[bytes, bytes]]], counts: dict[str, int]) -> Iterator[tuple[str, list]]:
        (split, number), records = group
        name = dataset.name(self._options, split, number, plan(counts, self._options)[split])
        note = Path(self._folder) / NOTES / f"{name}.json"
        if not note.exists() or not (Path(self._folder) / SHARDS / name).exists():
            content = (content for key, content in sorted(records) if key)
            put(note, json.dumps(list(self._write(name, content))).encode())
        yield split, untrusted.json_of(note.read_text())

    def _write(self, name: str, content: Iterable[bytes]) -> Shard:
        target = Path(self._folder) / SHARDS / name
        with tempfile.TemporaryDirectory(prefix="ptm-", dir=None if remote(self._folder) else os.path.dirname(target)) as scratch:
            path = Path(scratch) / name  # array_record writes plain files alone
            shard = dataset.write_shard(path, content)
            path.copy(target, overwrite=True) if remote(self._folder) else path.replace(target)
        return shard


def remote(folder: str) -> bool:
    """Whether a folder is one of a store."""
    return "://" in folder


def put(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all; stores know no other."""
    if remote(os.fspath(path)):
        path.write_bytes(content)
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def save_index(index: Index | None, folder: str) -> None:
    """Writes what workers need of the evaluation sets into the folder of the pipeline."""
    if index is not None:
        content = io.BytesIO()
        np.savez(content, names=np.array(index.names), ngram=index.ngram, grams=index.grams, owners=index.owners, sizes=index.sizes, sets=index.sets)
        put(Path(folder) / INDEX, content.getvalue())


def load_index(folder: str) -> Index | None:
    """The index that `save_index` wrote, or None where there is none."""
    path = Path(folder) / INDEX
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as held:
        names = tuple(held["names"].tolist())
        return Index(names, int(held["ngram"]), held["grams"], held["owners"], held["sizes"], held["sets"], (0,) * len(names))


def _near(records: Any, options: Options) -> tuple[Any, Any]:
    """(records that stay, counts)."""
    names = records | "bands" >> beam.FlatMap(bands, options) | "same band" >> beam.GroupByKey() | "sets" >> beam.FlatMap(members)
    apart = (
        {"record": records, "sets": names}
        | "records and sets" >> beam.CoGroupByKey()
        | "apart" >> beam.ParDo(Apart(options)).with_outputs(ALONE, SETS, main=MAIN)
    )
    gone = apart[SETS] | "same set" >> beam.GroupByKey() | "similar" >> beam.FlatMap(similar, options)
    stay = {"record": apart[MAIN], "gone": gone} | "records and gone" >> beam.CoGroupByKey() | "stay" >> beam.ParDo(Stay()).with_outputs(COUNTS, main=MAIN)
    return (apart[ALONE], stay[MAIN]) | "all that stay" >> beam.Flatten(), stay[COUNTS]


def _note_result(_: None, counts: dict[str, int], bad: list, written: list, folder: str) -> None:
    content = {"counts": counts, "bad": [[id, problem] for _, id, problem in bad], "shards": sorted(written)}
    put(Path(folder) / RESULT, json.dumps(content).encode())


def build(root: beam.Pipeline, options: Options, folder: str) -> None:
    """Adds the whole preparation to a pipeline. Shards go into `folder`/shards, and what was found into `folder`/result.json."""
    units = (
        root
        | "files" >> beam.Create([tuple(unit) for unit in reading.units(options)])
        | "spread files" >> beam.Reshuffle()
        | "cut" >> beam.FlatMap(lambda unit: [tuple(part) for part in reading.cut(Unit(*unit), options)])
        | "spread parts" >> beam.Reshuffle()
    )
    read = units | "read" >> beam.ParDo(Read(options, folder)).with_outputs(COUNTS, BAD, main=MAIN)
    records, counts = read[MAIN], [read[COUNTS]]
    if options.exact:
        first = (
            records
            | "digests" >> beam.Map(lambda record: (stages.digest(record[1][1]), record))
            | "same text" >> beam.GroupByKey()
            | "exact" >> beam.ParDo(Exact()).with_outputs(COUNTS, main=MAIN)
        )
        records = first[MAIN]
        counts.append(first[COUNTS])
    if options.near:
        records, found = _near(records, options)
        counts.append(found)
    finished = records | "finish" >> beam.ParDo(Finish(options)).with_outputs(COUNTS, main=MAIN)
    total = beam.pvalue.AsSingleton((*counts, finished[COUNTS]) | "all counts" >> beam.Flatten() | "total" >> beam.CombineGlobally(summary.total))
    written = (
        (
            finished[MAIN] | "shard" >> beam.Map(assign, total, options),
            root | "once" >> beam.Create([None]) | "shards" >> beam.FlatMap(lambda _, counts: shards(counts, options), total),
        )
        | "records and shards" >> beam.Flatten()
        | "same shard" >> beam.GroupByKey()
        | "write" >> beam.ParDo(Write(options, folder), total)
    )
    bad = beam.pvalue.AsSingleton(read[BAD] | "first bad" >> beam.combiners.Top.Smallest(options.max_bad_records + 1))
    root | "at the end" >> beam.Create([None]) | "result" >> beam.Map(_note_result, total, bad, beam.pvalue.AsList(written), folder)
