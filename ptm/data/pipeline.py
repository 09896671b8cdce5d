"""From the drawn documents to rows: the one path that training and validation take.

    order      draws in a global order; a logical stream p of S takes the draws p, p + S, p + 2S, ...,
               or by weights that change, as a Mixer of its own says                                    (mixture)
    document   read the record, keep this split's part, tokenize                                        (documents)
    cut        a random window; or parts of max_record_tokens (ID#n), then of the featurizer's raw_length (ID@n); a Task's records stay whole
    features   examples of one piece, with randomness keyed by (seed, id of the piece, visit)            (objectives)
    pack       examples become rows with segments and positions                                          (pack)
    finish     the featurizer makes the row ready for the device

Each step is a pure function of what comes before it, so that the state of a stream is the place where its packer stands.
"""

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ptm.config import Data
from ptm.data import documents, sources
from ptm.data.batch import SOURCE, Document, Example, Featurizer, keyed_rng, reads_records
from ptm.data.documents import Corpus, Tokenizer
from ptm.data.mixture import Draw, Mixer, Order, Pass
from ptm.data.pack import Batch, Cursor, Layout, Packer, dim_of, draws_of, fitted, make_packer, stack
from ptm.fields import ConfigError

State = dict[str, Any]
Draws = Order | Mixer | Pass
RANDOM_TRIES = 64
ROOM = 256  # draws that are remembered besides those that are needed, before it is looked which these are
COUNTED = ("draws", "examples", "tokens")  # by source, where there are several: draws begun, segments of finished rows, and their positions


class Phase:
    """How rows are made from a step of the run on."""

    def __init__(self, start: int, featurizer: Featurizer, *, windows: bool):
        self.start, self.featurizer, self.layout = start, featurizer, Layout(featurizer)
        self.window = (featurizer.raw_length or self.layout.lengths["L"] + 1) if windows else None


class Stream:
    """The rows of one logical stream, or of a finite pass."""

    def __init__(
        self, corpus: Corpus, *, order: Draws, data: Data, featurizer: Featurizer, seed: int, first: int = 0, step: int = 1, windows: bool = False,
        longer: Sequence[tuple[int, Featurizer]] = (),
    ):  # fmt: skip
        """Takes the draws first, first + step, ... of `order`, or those of a Mixer of its own; `windows` draws one random window of each document.

        `longer` are featurizers of longer rows, each with the step from which on they are made. A document is made into examples by the featurizer of its
        draw; those that wait for a row then go into a longer one.
        """
        self._corpus, self._order, self._seed = corpus, order, seed
        self._first, self._step, self._shuffle = first, step, data.shuffle and not isinstance(order, Pass)
        self._phases = [Phase(start, made_by, windows=windows) for start, made_by in ((0, featurizer), *longer)]
        self._begins = [0]  # of each phase so far the first draw
        whole = reads_records(featurizer)
        if whole and data.holdout_by == "tail" and not data.validation_source:
            raise ConfigError(
                f"data.holdout_by=tail cuts every text in two, and {type(featurizer).__name__} reads records whole; set data.holdout_by=document."
            )
        self._record_size = None if whole or data.packing == "window" else data.max_record_tokens
        self._fruitless, self._found_usable = 0, False
        self.bad: frozenset[tuple[int, int]] = frozenset()
        self.rows, self.positions, self.filled, self.draws = 0, 0, 0, 0.0
        self._drawn: list[tuple[int, int]] = []
        self._places: dict[int, Draw] = {}  # of the draws that may be asked for again
        self._room = ROOM
        self.step = 0  # of the run, that rows are made for, counted from 0
        self._counts = {name: [0] * len(corpus.sizes) for name in COUNTED}
        self._packing, self._bins = row_packing(data, featurizer), data.packing_bins
        self._packer = self._make_packer()

    @property
    def _phase(self) -> Phase:
        return self._phases[len(self._begins) - 1]

    def _phase_of(self, draw: int) -> Phase:
        return self._phases[bisect.bisect_right(self._begins, draw) - 1]

    def _make_packer(self) -> Packer:
        cut = len(self._phases) > 1 and self._packing != "concat"  # by the rows of a draw's own phase, whatever the packer's rows are
        examples = (lambda draw: fitted(self._phase_of(draw).layout, self._examples(draw))) if cut else self._examples
        cursor = Cursor(examples, count=len(self._order) if isinstance(self._order, Pass) else None)
        return make_packer(self._packing, layout=self._phase.layout, cursor=cursor, bins=self._bins)

    def _lengthen(self) -> None:
        """Makes longer rows from here on: half of a document, and rows that are not full, go on in them."""
        state = self._packer.snapshot()
        self._begins.append(state["draw"] + 1)
        self._packer = self._make_packer()
        self._packer.restore(state)

    def next_row(self) -> Example | None:
        """The next finished row; None after the last one of a finite pass."""
        while len(self._begins) < len(self._phases) and self._phases[len(self._begins)].start <= self.step:
            self._lengthen()
        row = self._packer.next_row()
        if row is None:
            return None
        self.rows += 1
        self.positions += sum(self._phase.layout.lengths[dim] for dim in row.used)
        self.filled += sum(row.used.values())
        for draw, size in zip(row.draws, row.sizes):
            source, record, _ = self._places[draw]
            self._drawn.append((source, record))
            self._counts["examples"][source] += 1
            self._counts["tokens"][source] += size
        finished = self._finished(row.arrays, [self._places[draw][0] for draw in row.draws])
        if len(self._places) > self._room:
            self._forget()
            self._room = 2 * len(self._places) + ROOM
        return finished

    def _finished(self, arrays: Example, sources: Sequence[int]) -> Example:
        """A row ready for the device, with the sources of its segments where there are several."""
        count = len(self._corpus.sizes)
        if count == 1:
            return self._phase.featurizer.finish(arrays)
        of_segment = np.array([-1, *sources])
        return self._phase.featurizer.finish({**arrays, SOURCE: (of_segment[arrays["segments_BL"], None] == np.arange(count)).astype(np.int8)})

    def _forget(self) -> None:
        kept = draws_of(self._packer.snapshot())
        self._places = {draw: place for draw, place in self._places.items() if draw in kept}

    def take_drawn(self) -> tuple[tuple[int, int], ...]:
        """(source, record) of what the rows since the last call are made of."""
        drawn, self._drawn = tuple(dict.fromkeys(self._drawn)), []
        return drawn

    def padding(self) -> Example:
        """A finished row that holds nothing."""
        return self._finished(self._phase.layout.padding(), [])

    def snapshot(self) -> State:
        """The place where the next row begins, what was counted so far and the bad records met, as numbers, tuples and a frozenset."""
        packer = self._packer.snapshot()
        state = {"rows": self.rows, "filled": self.filled, "draws": self.draws, "bad": self.bad, "streams": self._step, "packer": packer}
        state |= {"step": self.step, "positions": self.positions}
        if len(self._phases) > 1:
            state["begins"] = tuple(self._begins)
        if len(self._corpus.sizes) > 1 or isinstance(self._order, Mixer):
            self._forget()
            places = tuple((draw, *place) for draw, place in self._places.items())
            state["sources"] = {name: tuple(counts) for name, counts in self._counts.items()} | {"places": places}
        if isinstance(self._order, Mixer):
            state["behind"] = tuple(self._order.behind)
        return state

    def restore(self, state: State) -> None:
        """Goes on where a snapshot was taken, given its copy from JSON."""
        self.bad = frozenset()
        for source, record in state["bad"]:
            self._document(source, record)  # so that it is named and counts towards the limit
        # A run that was begun before sources were counted counts from here on.
        counted = state["sources"] if "sources" in state else {"places": (), **{name: [0] * len(self._corpus.sizes) for name in COUNTED}}
        self._places = {draw: tuple(place) for draw, *place in counted["places"]}
        self._counts = {name: list(counted[name]) for name in COUNTED}
        if isinstance(self._order, Mixer):
            self._order.restore(counts=counted["draws"], behind=state["behind"])
        if len(self._phases) > 1:
            self._begins = list(state["begins"])
            self._packer = self._make_packer()
        self._packer.restore(state["packer"])
        self.step = state["step"] if "step" in state else 0  # only what is younger than the key goes by steps
        self.rows, self.filled, self.draws = state["rows"], state["filled"], state["draws"]
        self.positions = state["positions"] if "positions" in state else self.rows * sum(self._phase.layout.lengths[dim] for dim in self._phase.layout.packed)

    def _examples(self, draw: int) -> Iterator[Example]:
        source, record, visit = self._place(draw)
        empty = True
        for share, example in self._examples_of(source, record, visit, self._phase_of(draw)):
            empty, self.draws = False, draw + share
            yield example
        self._fruitless, self.draws = self._fruitless + 1 if empty else 0, draw + 1
        if self._fruitless >= sum(self._corpus.sizes) and not isinstance(self._order, Pass):
            self._check_usable()

    def _place(self, draw: int) -> Draw:
        """What a draw is of. Draws come one after the other; those before are remembered as long as the packer may ask for them again."""
        if draw not in self._places:
            mixed = isinstance(self._order, Mixer)
            self._places[draw] = self._order.draw(self.step) if mixed else self._order[self._first + draw * self._step]
            self._counts["draws"][self._places[draw][0]] += 1
        return self._places[draw]

    def rows_of(self, source: int, record: int) -> float:
        """Rows that the examples of a record fill, as far as that can be told of one record."""
        filled, layout = 0.0, self._phase.layout
        for _, example in self._examples_of(source, record, 0, self._phase):
            shares = [size / layout.lengths[dim] for dim, size in layout.sizes(example).items()]
            filled += 1.0 if self._packing == "none" else max(shares)
        return filled

    def _examples_of(self, source: int, record: int, visit: int, phase: Phase) -> Iterator[tuple[float, Example]]:
        """The examples of a draw that are not empty, each with the share of the document's parts that are begun."""
        document = self._document(source, record)
        if document is None:
            return
        featurizer, layout = phase.featurizer, phase.layout
        visits, raw_length = featurizer.visits, featurizer.raw_length
        parts = self._parts(document, visit, phase.window)
        for begun, part in enumerate(parts, 1):
            for piece in documents.cut(part, size=raw_length, mark="@") if raw_length else (part,):
                rng = keyed_rng(self._seed, piece.id, visit % visits if visits else visit)
                for example in featurizer.features(piece, rng=rng, draw=self._draw):
                    if any(layout.sizes(example).values()):
                        yield begun / len(parts), example

    def _parts(self, document: Document, visit: int, window: int | None) -> list[Document]:
        if window:
            return [self._random_window(document, visit, window)]
        parts = documents.cut(document, size=self._record_size, mark="#") if self._record_size else [document]
        if self._shuffle and len(parts) > 1:
            # Consecutive visits begin with different parts: streams that read the same long document at once must not read the same tokens.
            turn, begin = divmod(visit, len(parts))
            order = np.roll(keyed_rng(self._seed, document.id, "parts", turn).permutation(len(parts)), -begin)
            return [parts[n] for n in order]
        return parts

    def _random_window(self, document: Document, visit: int, window: int) -> Document:
        spare = len(document.tokens_L) - window
        if spare <= 0:
            return document
        start = int(keyed_rng(self._seed, document.id, visit, "window").integers(spare + 1))
        return dataclasses.replace(document, id=f"{document.id}@{start}", tokens_L=document.tokens_L[start : start + window])

    def _document(self, source: int, record: int) -> Document | None:
        document = self._corpus.document(source, record)
        if document is None and (source, record) in self._corpus.bad:
            self.bad |= {(source, record)}
        return document

    def _draw(self, rng: np.random.Generator) -> Document:
        """Another document of the split: its source by weight, then uniform; of a long one a random part."""
        corpus = self._corpus
        source = int(rng.choice(len(corpus.sizes), p=np.divide(corpus.weights, sum(corpus.weights)))) if len(corpus.sizes) > 1 else 0
        size = corpus.sizes[source]
        record = 0
        for attempt in range(RANDOM_TRIES + size):
            # Where usable documents are rare, the nearest one behind a random place ends the search.
            record = int(rng.integers(size)) if attempt < RANDOM_TRIES else (record + 1) % size
            document = self._document(source, record)
            if document is not None:
                parts = documents.cut(document, size=self._record_size, mark="#") if self._record_size else [document]
                return parts[int(rng.integers(len(parts)))]
        raise ConfigError(f"source {corpus.sources[source].name} has no usable document in this split. {_advice(corpus)}")

    def _check_usable(self) -> None:
        """Ends a search that would not end: after as many fruitless draws in a row as there are records."""
        if not self._found_usable and self._shuffle:
            drawn = ((source, record) for source in self._order.drawn for record in range(self._corpus.sizes[source]))
            self._found_usable = any(True for place in drawn for _ in self._examples_of(*place, 0, self._phase))
        if not self._found_usable:
            raise ConfigError(f"stream {self._first} of {self._step} found no usable document in {self._fruitless} draws. {_advice(self._corpus)}")
        self._fruitless = 0


def _advice(corpus: Corpus) -> str:
    bad = corpus.describe_bad()
    held = "; ".join(bad[:5]) if bad else "none is bad"
    return (
        f"Of {sum(corpus.sizes)} records {len(bad)} cannot be read ({held}); the others are held out or too short:"
        " see data.holdout, data.columns and data.document."
    )


def row_packing(data: Data, featurizer: Featurizer) -> str:
    """How rows are packed: as asked for, or as the featurizer wants it; windows are concatenated where all fields allow it."""
    if data.packing == "window" and all(dim_of(name) == "L" for name in featurizer.fields):
        return "concat"
    return featurizer.packing if data.packing in ("default", "window") else data.packing


def validation_batches(
    data: Data, *, featurizer: Featurizer, tokenizer: Tokenizer, seed: int, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """One pass over the validation split in source order; the last batch is filled up with padding.

    `rows` are this host's row numbers of the batch, by default all. Raises ConfigError at once if the split is empty.
    """
    corpus = Corpus(data, split="validation", tokenizer=tokenizer)
    stream = Stream(corpus, order=Pass(corpus.sizes), data=data, featurizer=featurizer, seed=seed)
    first = stream.next_row()
    if first is None:
        what = (
            f"data.validation_source={data.validation_source}"
            if data.validation_source
            else f"data.holdout={data.holdout} by {data.holdout_by} of {data.source}"
        )
        raise ConfigError(
            f"the validation split is empty ({what}, {sum(corpus.sizes)} documents in all, {len(corpus.bad)} of them bad): raise data.holdout,"
            " set data.holdout_by=tail for a few long documents, or give data.validation_source."
        )
    return _batches(stream, first, batch_size, list(range(batch_size) if rows is None else rows))


def _batches(stream: Stream, row: Example | None, batch_size: int, chosen: list[int]) -> Iterator[Batch]:
    while row is not None:
        made = [row]
        while len(made) < batch_size and (row := stream.next_row()) is not None:
            made.append(row)
        made += [stream.padding() for _ in range(batch_size - len(made))]
        yield stack([made[n] for n in chosen])
        row = stream.next_row()


def fingerprint(data: Data) -> str:
    """16 hex digits over the fingerprints of all sources of the training and validation splits, in order."""
    splits = (data.source, data.validation_source)
    parts = [[sources.fingerprint(sources.open_source(spec, data=data, number=n)) for n, spec in enumerate(specs)] for specs in splits]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
