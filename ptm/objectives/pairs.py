"""Masked language modelling with a sentence-level task, and the input formats that were compared with it.

Next sentence prediction (NSP; Devlin et al. 2019, section 3.1 and published code), sentence order prediction (SOP; Lan et al. 2020, section 3.1), and
the four formats of RoBERTa (Liu et al. 2019, section 4.2).
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import SOURCE, Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.models import Model
from ptm.nn.losses import cross_entropy
from ptm.objectives import mlm
from ptm.objectives.protocol import Aux, Batch

# Packings that an input format allows, the default first. The head `pair` reads the first position of a row, so a row holds one pair.
PACKINGS = {"segment_pair": ("none",), "sentence_pair": ("none",), "full_sentences": ("first_fit",), "doc_sentences": ("first_fit", "none")}
PAIRED = ("segment_pair", "sentence_pair")
NO_PAIR = -1  # the label of a row without a pair; padding has it too
TRIES = 10  # draws of a document that is another one
WINDOW = 8  # rows of a long document among whose sentences a random one is looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mlm.Config):
    """Options of masked language modelling with a task on pairs."""

    name: ClassVar[str] = "pairs"

    task: str = field("nsp", choices=("nsp", "sop", "none"), doc="What is asked of a pair: does B follow A (nsp), or are A and B in order (sop).")
    format: str = field(
        "segment_pair", choices=tuple(PACKINGS),
        doc="What a row holds: two segments of several sentences, two sentences, or whole sentences of many documents (full) or of one (doc).",
    )  # fmt: skip
    short_prob: float = field(0.1, low=0.0, high=1.0, doc="Share of documents whose segment pairs get a random shorter length.")
    random_prob: float = field(0.5, low=0.0, high=1.0, doc="Share of pairs whose B is from another document (nsp) or that are swapped (sop).")
    pair_coefficient: float = field(1.0, low=0.0, doc="Coefficient of the pair's cross entropy beside the tokens' 1.")

    def check(self, where: str) -> None:
        super().check(where)
        if self.task != "none" and self.format not in PAIRED:
            raise ConfigError(
                f"{where}.task={self.task} needs pairs, but {where}.format={self.format} has none. "
                f"Set {where}.task=none or {where}.format={' or '.join(PAIRED)}."
            )


class Segment(NamedTuple):
    """Consecutive tokens of a document and which of them begin a word."""

    tokens_L: np.ndarray
    word_starts_L: np.ndarray

    def cut(self, start: int, end: int) -> "Segment":
        return Segment(self.tokens_L[start:end], self.word_starts_L[start:end])


class Sentences(NamedTuple):
    """A document's tokens and the bounds of its sentences: number n runs from bounds[n] to bounds[n + 1]."""

    whole: Segment
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def between(self, first: int, last: int) -> Segment:
        """Sentences `first` to `last`, this one excluded."""
        return self.whole.cut(self.bounds[first], self.bounds[last])

    def reaching(self, first: int, size: int) -> int:
        """Where to end to have at least `size` tokens and one sentence from `first` on, or all that are left."""
        return int(np.clip(np.searchsorted(self.bounds, self.bounds[first] + size), first + 1, len(self)))

    def fitting(self, first: int, size: int) -> int:
        """Where to end to have at most `size` tokens from `first` on."""
        return int(np.searchsorted(self.bounds, self.bounds[first] + size, side="right")) - 1


def truncated(a: Segment, b: Segment, *, room: int, rng: np.random.Generator) -> tuple[Segment, Segment]:
    """The pair cut to `room` tokens: the longer one loses tokens, each at its front or its back by chance, until both are equal and take turns."""
    keep_a = min(len(a.tokens_L), max(room - len(b.tokens_L), room - room // 2))
    cut = []
    for segment, keep in ((a, keep_a), (b, min(len(b.tokens_L), room - keep_a))):
        front = int(rng.binomial(len(segment.tokens_L) - keep, 0.5))
        cut.append(segment.cut(front, front + keep))
    return cut[0], cut[1]


class Pairs(mlm.MLM):
    """[CLS] A [SEP] B [SEP] with types 0 and 1, or [CLS] sentences [SEP]; corrupted -> original at the chosen positions, and one label for a pair.

    Labels are those of the published models: 0 = B follows A, 1 = B is from another document (nsp) or the two are swapped (sop). A sentence
    is never longer than half a row (a row, where there are no pairs): longer ones are cut, so that text without sentences is used too. What has no second
    sentence gets a random one under nsp, as published. Under sop and without a task it is a row of A alone, which only the masked tokens
    are learned from: a random B would teach topics, which is what sop is there to avoid.
    """

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        allowed = PACKINGS[config.format]
        if packing not in ("default", *allowed):
            raise ConfigError(f"data.packing={packing} does not go with objective.format={config.format}; allowed: default, {', '.join(allowed)}.")
        if tokenizer.cls_id is None or tokenizer.sep_id is None:
            raise ConfigError("objective pairs needs a tokenizer with cls and sep pieces; this one has none. Choose another with --config.tokenizer.*.")
        super().__init__(config, tokenizer=tokenizer, length=length, packing=allowed[0] if packing == "default" else packing, model_config=model_config)
        self._paired = config.format in PAIRED
        if self._paired:
            self._room = length - 3
            if self._room < 2:
                raise ConfigError(f"data.length={length} leaves no room for a pair between cls, sep and sep; allowed: 5 or more.")
            if hasattr(model_config, "num_types") and model_config.num_types < 2:
                raise ConfigError(
                    f"model.num_types={model_config.num_types} cannot tell A from B; set --config.model.num_types=2 for objective.format={config.format}."
                )
            self.fields = {**self.fields, "types_BL": Field()}
        if config.task != "none":
            self.heads = (*self.heads, "pair")
            self.fields = {**self.fields, "pair_label_B": Field(pad=NO_PAIR)}
            self.coefficients = {**self.coefficients, "pair": config.pair_coefficient}

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        if not len(doc.tokens_L):
            return
        sentences = self._sentences(doc)
        if self._paired:
            for a, b, label in self._pairs(sentences, doc, rng, draw):
                parts = [part for part in truncated(a, b, room=self._room, rng=rng) if len(part.tokens_L)]
                yield self._example(parts, label if len(parts) == 2 else NO_PAIR, rng)
            return
        first = 0
        while first < len(sentences):
            last = sentences.fitting(first, self._room)
            yield self._example([sentences.between(first, last)], NO_PAIR, rng)
            first = last

    def _sentences(self, doc: Document) -> Sentences:
        tokens_L = doc.tokens_L.astype(np.int32)
        longest = self._room // 2 if self._paired else self._room
        starts = np.flatnonzero(self.tokenizer.sentence_starts(tokens_L)[1:]) + 1
        bounds = [at for start, end in itertools.pairwise([0, *starts.tolist(), len(tokens_L)]) for at in range(start, end, longest)]
        return Sentences(Segment(tokens_L, self.word_starts(doc)), np.array([*bounds, len(tokens_L)]))

    def _pairs(self, sentences: Sentences, doc: Document, rng: np.random.Generator, draw: Draw) -> Iterator[tuple[Segment, Segment, int]]:
        """(A, B, label) by the published builder: sentences are gathered up to a target length and split into A and B at random.

        Where B is random, what was gathered for it is used again. Under sop at least two sentences are gathered, if there are two.
        """
        config, target = self.config, self._room
        if config.format == "segment_pair" and rng.random() < config.short_prob:
            target = int(rng.integers(2, self._room + 1))
        first = 0
        while first < len(sentences):
            two = min(first + 2, len(sentences))
            last = two if config.format == "sentence_pair" else sentences.reaching(first, target)
            if config.task == "sop":
                last = max(last, two)
            split = first + int(rng.integers(1, last - first)) if last > first + 1 else last
            a, b = sentences.between(first, split), sentences.between(split, last)
            if config.task == "nsp" and (split == last or rng.random() < config.random_prob):
                yield a, self._random_segment(doc, target - len(a.tokens_L), rng, draw), 1
                first = split
                continue
            if config.task == "sop" and split < last and rng.random() < config.random_prob:
                yield b, a, 1
            else:
                yield a, b, 0
            first = last

    def _random_segment(self, doc: Document, size: int, rng: np.random.Generator, draw: Draw) -> Segment:
        """Sentences from a random one on, of another document if there is one: up to `size` tokens, or one sentence where pairs are of sentences."""
        for _ in range(TRIES):
            other = draw(rng)
            if _record(other) != _record(doc):
                break
        window = WINDOW * self.lengths["L"]
        begin = int(rng.integers(len(other.tokens_L) - window + 1)) if len(other.tokens_L) > window else 0
        ends_document = begin + window >= len(other.tokens_L)
        sentences = self._sentences(dataclasses.replace(other, tokens_L=other.tokens_L[begin : begin + window]))
        # A window begins and ends within a sentence; one in its middle is whole.
        inner = range(min(int(begin > 0), len(sentences) - 1), len(sentences))
        first = inner[int(rng.integers(max(1, len(inner) - (not ends_document))))]
        last = first + 1 if self.config.format == "sentence_pair" else sentences.reaching(first, size)
        return sentences.between(first, last)

    def _example(self, parts: list[Segment], label: int, rng: np.random.Generator) -> Example:
        """The framed example of one or two texts, corrupted together; no word, span or n-gram reaches from one into the other."""
        targets_L = np.concatenate([part.tokens_L for part in parts])
        breaks = [len(part.tokens_L) for part in parts[:-1]]
        tokens_L, weights_L = self.corrupt(targets_L, np.concatenate([part.word_starts_L for part in parts]), rng=rng, breaks=breaks)

        def framed(x_L: np.ndarray, cls: int, sep: int) -> np.ndarray:
            return np.concatenate([[cls], *[value for text in np.split(x_L, breaks) for value in (text, [sep])]]).astype(x_L.dtype)

        example = {
            "tokens_BL": framed(tokens_L, self.tokenizer.cls_id, self.tokenizer.sep_id),
            "targets_BL": framed(targets_L, self.tokenizer.cls_id, self.tokenizer.sep_id),
            "weights_BL": framed(weights_L, 0, 0),
        }
        if self._paired:
            example["types_BL"] = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.tokens_L) + 1 + (n == 0) for n, part in enumerate(parts)])
        if "pair_label_B" in self.fields:
            example["pair_label_B"] = np.int32(label)
        return example

    def finish(self, row: Example) -> Example:
        return super().finish(self._merged(row) if self.config.format == "full_sentences" else row)

    def _merged(self, row: Example) -> Example:
        """The row as one segment, [CLS] document [SEP] document [SEP]: the cls of all documents but the first goes, positions run through."""
        kept = np.flatnonzero((row["segments_BL"] > 0) & ((row["segments_BL"] == 1) | (row["positions_BL"] > 0)))
        merged = dict(row)
        contents = {name: (row[name][kept], spec.pad) for name, spec in self.fields.items()}
        contents |= {"segments_BL": (1, 0), "positions_BL": (np.arange(len(kept)), 0)}
        if SOURCE in row:
            contents[SOURCE] = (row[SOURCE][kept], 0)
        for name, (values, pad) in contents.items():
            merged[name] = np.full_like(row[name], pad)
            merged[name][: len(kept)] = values
        return merged

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        weights = super().weights(batch)
        return {**weights, "pair": jnp.sum(_real_pairs(batch))} if "pair" in self.coefficients else weights

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        out = model.hidden(params, batch, mask=self.mask, head=self.heads[0], train=train, rng=rng)
        totals, aux = self.token_terms(model, params, batch, out)
        if "pair" in self.coefficients:
            real_B = _real_pairs(batch)
            sums = cross_entropy(
                lambda hidden_B1D: model.logits(params, hidden_B1D[:, 0], head="pair")[:, None],
                out.hidden_BLD[:, :1], batch["pair_label_B"][:, None], real_B[:, None], chunk=len(real_B),
            )  # fmt: skip
            totals = {**totals, "pair": sums.nll}
            aux = aux.replace(ratios={**aux.ratios, "pair_accuracy": (sums.correct, jnp.sum(real_B))})
        return totals, aux, carry


def _real_pairs(batch: Batch) -> jax.Array:
    return (batch["pair_label_B"] != NO_PAIR).astype(jnp.float32)


def _record(doc: Document) -> str:
    """The id of the record that a document is or is a part of."""
    return re.sub(r"#\d+$", "", doc.id)
