"""Token classification: a tag for each word, read at its first piece (Devlin et al. 2019, section 5.3), such as named entities or parts of speech."""

import bisect
import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.metrics.entities import entities
from ptm.models import Model
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.rows import PACKINGS, UNKNOWN, Frame, LabelConfig, ReaderConfig, label_name, number_of, weights_by_label
from ptm.objectives.sources import by_source
from ptm.text.boundaries import running_text

WORDS, TAGS = "words", "tags"  # columns
OUTSIDE = "O"
ENTITY_TAG = re.compile(r"O|([BIESUL])(?:-(.+))?")
NO_WORD = -1  # positions at which no word is predicted
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelConfig, ReaderConfig):
    """Options of token classification. A record has a list `words` and a list `tags` as long: data.columns=text=text,words=words,tags=tags."""

    name: ClassVar[str] = "tag"

    scheme: str = field(
        "bio", choices=("bio", "as_given"),
        doc="bio: tags of entities, in IOB1, IOB2, IOE, IOBES or BILOU, which become IOB2; as_given: any tags, such as parts of speech.",
    )  # fmt: skip
    overlap: int = field(
        32, low=0, unit="tokens",
        doc="Tokens, half a row at most, that two windows share of a text that is longer than a row; each word is tagged in one of them alone.",
    )  # fmt: skip
    metrics: tuple[str, ...] = field(
        (), doc="Entries of ptm.metrics.METRICS that answers are measured by; none = entity_f1, or accuracy (of whole texts) for tags as given."
    )

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row."""
        return {"L": length}

    def names_in(self, record: str, columns: Mapping[str, Any]) -> list[str]:
        """The tags of a record's words, those of entities in IOB2; nothing if it has none. Raises ConfigError where there are not as many."""
        if TAGS not in columns or columns[TAGS] is None:
            return []
        words, tags = words_of(record, columns), _listed(columns[TAGS], field=TAGS, record=record)
        if len(tags) != len(words):
            raise ConfigError(f"record {record} has {len(words)} words and {len(tags)} tags; it must have as many of each. See data.columns.")
        names = [label_name(tag, record=record) for tag in tags]
        if None in names:
            raise ConfigError(
                f"record {record} has no tag for its word {names.index(None) + 1}, {words[names.index(None)]!r}; words without tag are not known here."
            )
        return iob2(names, record=record) if self.scheme == "bio" else names


def _listed(value: Any, *, field: str, record: str) -> list[Any]:
    """A list as it is, words with spaces between as a list."""
    value = value.split() if isinstance(value, str) else value
    if not isinstance(value, list | tuple | np.ndarray):
        raise ConfigError(f"record {record} has {str(value)[:40]} as its field {field}; allowed: a list, or words with spaces between. See data.columns.")
    return list(value)


def words_of(record: str, columns: Mapping[str, Any]) -> list[str]:
    """The words of a record. Raises ConfigError if it has none."""
    if WORDS not in columns or columns[WORDS] is None:
        raise ConfigError(f"record {record} has no field {WORDS}; map it with --config.data.columns=text=COLUMN,words=COLUMN,tags=COLUMN.")
    words = _listed(columns[WORDS], field=WORDS, record=record)
    if not all(isinstance(word, str) for word in words):
        raise ConfigError(f"record {record} has words that are no text: {str(words)[:40]}. See data.columns.")
    return words


def iob2(tags: Sequence[str], *, record: str) -> list[str]:
    """Tags of entities with B at the first word of each and I at its others (Tjong Kim Sang and Veenstra 1999), from whatever scheme tells the same.

    An entity begins at B, S and U, and where its type differs or nothing was open before; E, L, S and U are its last word.
    """
    converted, inside = [], None
    for tag in tags:
        match = ENTITY_TAG.fullmatch(tag)
        if match is None:
            raise ConfigError(
                f"record {record} has the tag {tag!r}; allowed with objective.scheme=bio: O, and TYPE after one of B- I- E- S- U- L-. "
                "For tags of another kind, such as parts of speech, set --config.objective.scheme=as_given."
            )
        place, kind = match[1], match[2] or ""
        if place is None:
            converted.append(OUTSIDE)
            inside = None
            continue
        begins = place in "BSU" or inside != kind
        converted.append("-".join(filter(None, ("B" if begins else "I", kind))))
        inside = None if place in "ELSU" else kind
    return converted


class Window(NamedTuple):
    """Words `first` to `last` of a text that a row reads, this one excluded, and `begin` to `end`, which are tagged there."""

    first: int
    last: int
    begin: int
    end: int


def windows(sizes: Sequence[int], *, room: int, overlap: int) -> Iterator[Window]:
    """As few windows of `room` tokens as hold all words, of `sizes` tokens each (1 to `room`); neighbours share `overlap` tokens as far as whole words allow.

    What they share is parted in its middle: the first half of its words is tagged in the window before, so that each word has context on both sides.
    """
    ends = [0, *itertools.accumulate(sizes)]
    first = begin = 0
    while begin < len(sizes):
        last = bisect.bisect_right(ends, ends[first] + room) - 1
        if last == len(sizes):
            yield Window(first, last, begin, last)
            return
        following = max(first + 1, bisect.bisect_left(ends, ends[last] - overlap))
        following = max(following, bisect.bisect_left(ends, ends[last + 1] - room))  # the next window has a word more
        end = max(begin + 1, (following + last + 1) // 2)
        yield Window(first, last, begin, end)
        first, begin = following, end


class Tag:
    """Cross entropy of the head `tag` at the first piece of each word; texts that are longer than a row are read in overlapping windows.

    Words are encoded as in running text, framed as the family has it; a word that the tokenizer drops is its unknown piece.
    """

    kinds = ("encoder", "decoder")
    raw_length = None
    visits = None
    max_segments = None
    columns = (WORDS, TAGS)
    coefficients = {"label": 1.0}
    target_positions = 0

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if packing not in PACKINGS:
            raise ConfigError(f"data.packing={packing} cuts or joins texts; allowed with {config.name}: {', '.join(PACKINGS)}.")
        self._weights = weights_by_label(config)
        self.config, self.tokenizer, self.frame = config, tokenizer, Frame.of(tokenizer, model_config, objective=config.name)
        self._room = length - self.frame.overhead(1)
        if self._room < 1:
            raise ConfigError(f"data.length={length} leaves no room between special tokens; allowed with {config.name}: {self.frame.overhead(1) + 1} or more.")
        self.packing = "first_fit" if packing == "default" else packing
        self.mask = "causal" if model_config.kind == "decoder" else "full"
        self.heads = (*config.readers(), f"tag:{len(config.labels)}")
        self.lengths = config.lengths(length)
        self.fields = {"tokens_BL": Field(is_tokens=True), "label_BL": Field(np.int32, UNKNOWN), "word_BL": Field(np.int32, NO_WORD)}
        self.fields |= {} if model_config.kind == "decoder" else {"types_BL": Field()}
        self.metrics = config.metrics or (("entity_f1",) if config.scheme == "bio" else ("accuracy",))
        self._numbers = {name: number for number, name in enumerate(config.labels)}
        self._told_cut = False
        if tokenizer.unk_id is not None:
            self._dropped = np.array([tokenizer.unk_id], np.int32)
        else:
            self._dropped = np.array([tokenizer.eos_id], np.int32) if tokenizer.eos_id is not None else tokenizer.encode(" ")[:1]

    # Host.

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        words, tags = words_of(doc.id, doc.columns), self.reference(doc)
        label_W = np.full(len(words), UNKNOWN, np.int32) if tags is None else np.array([self._numbers[tag] for tag in tags], np.int32)
        pieces = [ids if len(ids) else self._dropped for ids in self.tokenizer.encode_words(words)]
        if not self._told_cut and (longest := max(map(len, pieces), default=0)) > self._room:
            _log.warning(
                "words that are longer than a row, data.length=%d, are cut, one of %s with %d tokens the first of them.", self.lengths["L"], doc.id, longest
            )
            self._told_cut = True
        pieces = [ids[: self._room] for ids in pieces]
        for window in windows([len(ids) for ids in pieces], room=self._room, overlap=min(self.config.overlap, self._room // 2)):
            inside = pieces[window.first : window.last]
            framed = self.frame.around([np.concatenate(inside)])
            starts = framed.starts[0] + np.cumsum([0, *map(len, inside[:-1])])
            tagged = slice(window.begin - window.first, window.end - window.first)
            example = {"tokens_BL": framed.tokens_L, "label_BL": np.full(len(framed.tokens_L), UNKNOWN, np.int32)}
            example["word_BL"] = np.full(len(framed.tokens_L), NO_WORD, np.int32)
            example["label_BL"][starts[tagged]] = label_W[window.begin : window.end]
            example["word_BL"][starts[tagged]] = np.arange(window.begin, window.end)
            yield example | ({"types_BL": framed.types_L} if "types_BL" in self.fields else {})

    def finish(self, row: Example) -> Example:
        return row

    def reference(self, doc: Document) -> list[str] | None:
        """The tags of a record's words, as the objective's labels have them; None if it has none. Raises ConfigError for one that is not known."""
        if TAGS not in doc.columns or doc.columns[TAGS] is None:
            return None
        tags = self.config.names_in(doc.id, doc.columns)
        for tag in tags:
            number_of(tag, self._numbers, record=doc.id, what="tag")
        return tags

    def answer(self, doc: Document, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """A tag for each word, and for tags of entities these: type, first word, one past the last, and their text."""
        words = words_of(doc.id, doc.columns)
        tag_W = np.full(len(words), UNKNOWN)
        for output in outputs:
            at = np.flatnonzero(output["word"] != NO_WORD)
            tag_W[output["word"][at]] = output["tag"][at]
        assert not np.any(tag_W == UNKNOWN), f"the examples of {doc.id} hold all of its words"
        tags = [self.config.labels[tag] for tag in tag_W]
        if self.config.scheme != "bio":
            return {"prediction": tags}
        found = sorted(entities(tags), key=lambda entity: entity[1:])
        listed = [{"type": kind, "start": start, "end": end, "text": running_text(words[start:end])} for kind, start, end in found]
        return {"prediction": tags, "entities": listed}

    # Devices.

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"label": jnp.sum(self._label_weights(batch))}

    def _label_weights(self, batch: Batch) -> jax.Array:
        return jnp.where(batch["label_BL"] != UNKNOWN, jnp.asarray(self._weights)[batch["label_BL"]], 0.0)

    def init_carry(self, model: Model, batch_size: int) -> Any:
        return None

    def _logits(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = (None, None) if rng is None else jax.random.split(rng)
        out = model.hidden(params, batch, mask=self.mask, head=self.heads[-1], train=train, rng=keys[0])
        logits_BLN = model.logits(params, out.hidden_BLD, head=self.heads[-1], train=train, rng=keys[1])
        return logits_BLN.astype(jnp.float32), {} if out.attention_max is None else {"attention_logit": out.attention_max}

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        logits_BLN, maxima = self._logits(model, params, batch, rng=rng, train=train)
        label_BL = batch["label_BL"]
        nll_BL = -jnp.take_along_axis(jax.nn.log_softmax(logits_BLN), jnp.maximum(label_BL, 0)[..., None], axis=2)[..., 0]
        known_BL = (label_BL != UNKNOWN).astype(jnp.float32)
        hits = jnp.sum((jnp.argmax(logits_BLN, axis=2) == label_BL) * known_BL)
        weights_BL = self._label_weights(batch)
        aux = Aux(ratios={"accuracy": (hits, jnp.sum(known_BL))}, maxima=maxima, sources=by_source(batch, "loss", nll_BL, weights_BL))
        return {"label": jnp.sum(nll_BL * weights_BL)}, aux, carry

    def outputs(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """The words that rows tag, by their number in the text (-1 elsewhere), and the most likely tag there, both [rows, L]."""
        return {"word": batch["word_BL"], "tag": jnp.argmax(self._logits(model, params, batch, rng=None, train=False)[0], axis=2)}
