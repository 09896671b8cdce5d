"""The stages on this machine: several processes, memory that does not grow with the corpus, and every finished part kept.

    read/BATCH/       documents that filters leave, in parts (parts.py), and counts.json
    exact/, near/     numbers of documents that go, a file for each range of hashes (near: and band)
    exact.npy, gone.npy   a byte for each document: 0 stays, 1 is an exact duplicate, 2 a near one
    dataset/          what becomes OUTPUT/NAME/VERSION, and shards/, what was counted of each shard

All of it is in OUTPUT/NAME/.VERSION.partial; what has its name there is whole, and is not made again. A process holds one part, one range of hashes, or
what a shard is written through, whatever the size of the corpus.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptm import atomic, lock, untrusted
from ptm.fields import ConfigError
from ptm.prepare import card, dataset, manifest, reading, sketch, stages, summary, trial
from ptm.prepare.contamination import Index
from ptm.prepare.dataset import Shard
from ptm.prepare.options import Options
from ptm.prepare.parts import Part, Parts, Writer, load, ranges, save
from ptm.prepare.pool import Pool, Progress
from ptm.prepare.reading import Unit

BATCH_BYTES = 32 << 20
BATCH_UNITS = 1000
RANGE_ROWS = 1 << 17
SHINGLE_BYTES = 64 << 20  # of documents that are compared, kept by a process
KEPT, EXACT, NEAR = 0, 1, 2
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all tasks of a preparation know."""

    options: Options
    folder: Path
    index: Index | None


_job: Job


def _begin(job: Job) -> None:
    global _job
    _job = job
    _parts.cache_clear()
    _shingles.cache_clear()


def target(options: Options) -> Path:
    """The folder of the data set."""
    return Path(options.output).expanduser() / options.name / options.version


def prepare(options: Options, *, processes: int, progress: Progress | None = None) -> dict[str, Any]:
    """Makes the data set, or goes on making it; returns its manifest. Raises ConfigError, also where the folder was begun with other options."""
    if options.near:
        sketch.require()
    folder = target(options)
    partial = folder.with_name(f".{folder.name}.partial")
    made_from = manifest.identity(options)
    if folder.exists():
        found = manifest.read(folder)
        manifest.require_same(found, made_from, where=str(folder))
        manifest.check(folder, found)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was lost just after the folder got its name
        return found
    with lock.hold(partial):
        manifest.require_begun(partial / manifest.BEGUN, made_from, where=str(partial))
        _clear(partial)
        index = trial.index(options)
        pool = Pool(processes, prepare=_begin, given=(Job(options, partial, index),), progress=progress or Progress())
        try:
            found = _stages(options, partial, pool, index, made_from)
        finally:
            pool.close()
        os.rename(partial / "dataset", folder)
    shutil.rmtree(partial)
    return found


def _clear(folder: Path) -> None:
    """Removes what an earlier process had not finished."""
    for left in list(folder.rglob("*.partial")):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _stages(options: Options, folder: Path, pool: Pool, index: Index | None, made_from: dict[str, Any]) -> dict[str, Any]:
    for name in ("read", "exact", "near", "dataset", "shards"):
        (folder / name).mkdir(exist_ok=True)
    counts, bad = _read_all(options, folder, pool)
    parts = Parts(_stems(folder))
    counts.update(_remove_exact(options, folder, pool, parts))
    counts.update(_remove_near(options, folder, pool, parts))
    shards, kept = _write_all(options, folder, pool, parts)
    found = manifest.content(made_from, counts=summary.total([counts, *kept]), short=index.too_short() if index else {}, bad=bad, shards=shards)
    dataset.describe(folder / "dataset", shards, options)
    card.write(folder / "dataset", found)
    manifest.write(folder / "dataset", found)
    return found


# Reading


def _read_all(options: Options, folder: Path, pool: Pool) -> tuple[collections.Counter, list[list[str]]]:
    """All units, read and examined; their counts and the (id, reason) of bad records."""
    listed = folder / "batches.json"
    if not listed.exists():
        whole = reading.units(options)
        together = -(-len(whole) // 1000)  # most files are small, and looked at in no time
        tasks = ((start, whole[start : start + together]) for start in range(0, len(whole), together))
        cut = dict(pool.run("listing", _cut, tasks))
        atomic.write(listed, json.dumps(_batches([unit for start in sorted(cut) for unit in cut[start]])))
    batches = [[Unit(*unit) for unit in batch] for batch in untrusted.read_json(listed)]
    places = [_batch(folder, number) for number in range(len(batches))]
    left = [(number, batch) for number, batch in enumerate(batches) if not places[number].exists()]
    seen = sum(len(_told(place)["bad"]) for place in places if place.exists())
    for told in pool.run("reading", _read, left, done=len(batches) - len(left)):
        for id, reason in told["bad"]:
            _log.warning("skipped %s: %s", id, reason)
        seen += len(told["bad"])
        if seen > options.max_bad_records:
            break
    found: collections.Counter[str] = collections.Counter()
    bad: list[list[str]] = []
    for told in (_told(place) for place in places if place.exists()):
        found.update(told["counts"])
        bad += told["bad"]
    stages.require_few(bad, options)
    return found, bad


def _batches(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that are read together, so that a folder of a million small files is no million tasks."""
    found: list[list[Unit]] = []
    size = BATCH_BYTES
    for unit in units:
        if size >= BATCH_BYTES or len(found[-1]) >= BATCH_UNITS:
            found.append([])
            size = 0
        found[-1].append(unit)
        size += reading.size(unit)
    return found


def _batch(folder: Path, number: int) -> Path:
    return folder / "read" / f"{number:06d}"


def _told(batch: Path) -> dict[str, Any]:
    return untrusted.read_json(batch / "counts.json")


def _stems(folder: Path) -> list[Path]:
    return sorted(path.with_suffix("") for path in (folder / "read").glob("*/*.text"))


def _cut(start: int, units: Sequence[Unit]) -> tuple[int, list[Unit]]:
    return start, [part for unit in units for part in reading.cut(unit, _job.options)]


def _read(number: int, units: Sequence[Unit]) -> dict[str, Any]:
    """Reads and examines a batch of units into a folder of its own."""
    options, final = _job.options, _batch(_job.folder, number)
    folder = final.with_name(f"{final.name}.{os.getpid()}.partial")
    folder.mkdir()
    counts: collections.Counter[str] = collections.Counter()
    bad: list[tuple[str, str]] = []
    with Writer(folder, options) as writer:
        for unit in units:
            for document in reading.documents(unit, options):
                text, rule = stages.judge(document, options, _job.index)
                counts.update(summary.of_read(document, rule))
                if text is not None:
                    writer.add(document.id, text)
                elif rule == stages.BAD:
                    bad.append((document.id, document.problem))
                    stages.require_few(bad, options)
    told = {"counts": counts, "bad": bad}
    atomic.write(folder / "counts.json", json.dumps(told))
    os.rename(folder, final)
    return told


# Exact duplicates


def _remove_exact(options: Options, folder: Path, pool: Pool, parts: Parts) -> dict[str, int]:
    path = folder / "exact.npy"
    if not path.exists():
        found = [folder / "exact" / f"{number:05d}.npy" for number in range(len(ranges(len(parts), RANGE_ROWS)))] if options.exact else []
        tasks = [(str(place), low, high) for place, (low, high) in zip(found, ranges(len(parts), RANGE_ROWS)) if not place.exists()]
        collections.deque(pool.run("exact", _exact, tasks, done=len(found) - len(tasks)), maxlen=0)
        with _marks(path, np.zeros(0, np.uint8), len(parts)) as marks:
            for place in found:
                marks[load(place)] = EXACT
    return summary.of_removed(stages.EXACT, count=int((load(path) == EXACT).sum()))


def _exact(path: str, low: int, high: int | None) -> None:
    """Writes the numbers of the documents that repeat an earlier one, of those whose digests are in a range."""
    first, second, number = _parts().between(".digests.npy", low, high)
    order = np.lexsort((number, second, first))
    same = (first[order][1:] == first[order][:-1]) & (second[order][1:] == second[order][:-1])
    save(Path(path), np.sort(number[order][1:][same]))


@contextlib.contextmanager
def _marks(path: Path, before: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """A byte for each document, zero or as `before`, on disk under the path when the block ends."""
    with atomic.replacing(path, binary=True) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count,)})
        start = file.tell()
        file.truncate(start + count)
        file.flush()
        if not count:
            yield np.zeros(0, np.uint8)
            return
        marks = np.memmap(file.name, np.uint8, "r+", offset=start, shape=(count,))
        marks[: len(before)] = before
        yield marks
        marks.flush()


# Near duplicates


def _remove_near(options: Options, folder: Path, pool: Pool, parts: Parts) -> dict[str, int]:
    path = folder / "gone.npy"
    if not path.exists():
        stems = parts.stems if options.near else ()
        tasks = [(str(stem), first) for stem, first in zip(stems, parts.first) if not stem.with_suffix(".bands.npy").exists()]
        collections.deque(pool.run("sketches", _sketch, tasks, done=len(stems) - len(tasks)), maxlen=0)
        with _marks(folder / "hint.npy", np.zeros(0, np.uint8), len(parts)):
            pass
        bounds = ranges(len(parts), RANGE_ROWS)
        wanted = [(band, number) for band in range(options.near_bands) for number in range(len(bounds))] if options.near else []
        places = {task: folder / "near" / f"{task[0]:04d}-{task[1]:05d}.npy" for task in wanted}
        tasks = [(str(place), band, *bounds[number]) for (band, number), place in places.items() if not place.exists()]
        collections.deque(pool.run("near", _near, tasks, done=len(places) - len(tasks)), maxlen=0)
        with _marks(path, load(folder / "exact.npy"), len(parts)) as marks:
            for place in places.values():
                marks[load(place)] = NEAR
    return summary.of_removed(stages.NEAR, count=int((load(path) == NEAR).sum()))


def _sketch(stem: str, first: int) -> None:
    """Writes the keys of the bands of a part's documents, uint64 [bands, 2, documents]: key and row, ascending in each band."""
    options, part = _job.options, Part(Path(stem))
    stay = load(_job.folder / "exact.npy")[first : first + len(part)] == KEPT
    rows, keys = [], []
    for row in np.flatnonzero(stay).tolist():
        found = sketch.bands(sketch.shingles(part.text(row), options), options)
        if len(found):
            rows.append(row)
            keys.append(found)
    keys_BN = np.array(keys, np.uint64).reshape(-1, options.near_bands).T
    order_BN = np.argsort(keys_BN, axis=1, kind="stable")
    rows_BN = np.array(rows, np.uint64)[order_BN]
    save(Path(stem).with_suffix(".bands.npy"), np.stack([np.take_along_axis(keys_BN, order_BN, 1), rows_BN], axis=1))


def _near(path: str, band: int, low: int, high: int | None) -> None:
    """Writes the numbers of the documents that are similar to an earlier one, of those whose keys of a band are in a range.

    What another band has found already is not compared again: `hint` says so, and may be behind the files that count.
    """
    key, number = _parts().between(".bands.npy", low, high, item=band)
    order = np.lexsort((number, key))
    key, number = key[order], number[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1], [True]])) if len(key) else np.zeros(1, int)
    hint = load(_job.folder / "hint.npy", mode="r+") if len(key) else None
    gone: list[int] = []
    for place in np.flatnonzero(np.diff(starts) > 1):
        members = number[starts[place] : starts[place + 1]].tolist()
        found = sketch.duplicates(members, _shingles, threshold=_job.options.near_threshold, known=lambda member: bool(hint[member]))
        hint[found] = NEAR
        gone += found
    save(Path(path), np.array(sorted(gone), np.int64))


@functools.cache
def _parts() -> Parts:
    return Parts(_stems(_job.folder))


class _Shingles:
    """The n-grams of documents by number, of which the last ones are kept."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._size = 0

    def cache_clear(self) -> None:
        self._kept.clear()
        self._size = 0

    def __call__(self, number: int) -> np.ndarray:
        if number not in self._kept:
            self._kept[number] = sketch.shingles(_parts().text(number), _job.options)
            self._size += self._kept[number].nbytes
            while self._size > SHINGLE_BYTES and len(self._kept) > 2:
                self._size -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(number)
        return self._kept[number]


_shingles = _Shingles()


# Writing


def _write_all(options: Options, folder: Path, pool: Pool, parts: Parts) -> tuple[dict[str, list[Shard]], list[dict[str, int]]]:
    """The shards of each split that has documents, and what is counted of each shard."""
    sizes, gone = dict.fromkeys(stages.SPLITS, 0), load(folder / "gone.npy")
    for part, first in zip(parts, parts.first):
        stay = gone[first : first + len(part)] == KEPT
        for number, split in enumerate(stages.SPLITS):
            sizes[split] += int(part.sizes()[stay & (part.rows["validation"] == number)].sum())
    if not any(sizes.values()):
        raise ConfigError(stages.NOTHING_LEFT)
    wanted = [(split, number, count) for split, size in sizes.items() if size for count in [stages.shards(size, options)] for number in range(count)]
    notes = {task: folder / "shards" / f"{dataset.name(options, *task)}.json" for task in wanted}
    tasks = [(str(note), *task) for task, note in notes.items() if not note.exists()]
    collections.deque(pool.run("writing", _write, tasks, done=len(notes) - len(tasks)), maxlen=0)
    shards: dict[str, list[Shard]] = {}
    kept = []
    for (split, _, _), note in notes.items():
        told = untrusted.read_json(note)
        shards.setdefault(split, []).append(Shard(**told["shard"]))
        kept.append(told["counts"])
    return shards, kept


def _write(note: str, split: str, number: int, count: int) -> None:
    """Writes a shard, then what was counted of it: who finds this finds the shard."""
    options, parts = _job.options, _parts()
    gone, counts = load(_job.folder / "gone.npy"), collections.Counter()

    def records() -> Iterator[bytes]:
        for part, first in zip(parts, parts.first):
            stay = gone[first : first + len(part)] == KEPT
            here = part.rows["shard"] % np.uint64(count) == number
            for row in np.flatnonzero(stay & here & (part.rows["validation"] == stages.SPLITS.index(split))).tolist():
                text = part.text(row)
                record = stages.finish(part.id(row), text, options)
                counts.update(summary.of_kept(text, split, len(record["tokens"]) if "tokens" in record else None))
                yield dataset.serialize(record, options)

    shard = dataset.write_shard(_job.folder / "dataset" / dataset.name(options, split, number, count), records())
    atomic.write(Path(note), json.dumps({"shard": shard._asdict(), "counts": counts}))
