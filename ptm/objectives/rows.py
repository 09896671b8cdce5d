"""What tasks on texts share: how texts stand between special tokens, which position or average stands for each of a row's texts, labels and their weights."""

import abc
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Example, Field
from ptm.fields import ConfigError, field, nearest, parse, unparse
from ptm.models import Model
from ptm.nn.stack import Output
from ptm.objectives.protocol import Aux, Batch, Ratio
from ptm.objectives.selected import take
from ptm.objectives.sources import by_source
from ptm.objectives.tokens import TokenObjective

PAIR = "pair"  # the column with a second text
UNKNOWN = -1  # the label of what is not labelled, padding included
SHORTEST = 8  # positions of a row that a text takes on average, at least: what follows from it is how many texts a row may hold
PACKINGS = ("default", "first_fit", "none")
BALANCED = ("balanced",)
_log = logging.getLogger(__name__)


# Labels.


def label_name(value: Any, *, record: str) -> str | None:
    """The name of a label as a record has it: of text, whole numbers and truth values what Python prints; None where it is missing or empty."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables that have gaps hold whole numbers so
    if not isinstance(value, str | int | float):
        raise ConfigError(f"the label of record {record} is {str(value)[:40]}, a {type(value).__name__}; allowed: text or a number. See data.columns.")
    return str(value)


def number_of(name: str, numbers: Mapping[str, int], *, record: str, what: str = "label") -> int:
    """The number of a label. Raises ConfigError for one that is not among `numbers`."""
    if name not in numbers:
        known = ", ".join([*list(numbers)[:20], *(["..."] if len(numbers) > 20 else [])])
        raise ConfigError(
            f"record {record} has the {what} {name!r}, which is not one of objective.labels: {known}.{nearest(name, numbers)}"
            " Mend the data or its map, data.columns."
        )
    return numbers[name]


def check_labels(labels: tuple[str, ...], where: str) -> None:
    """Refuses labels that are given, but are less than two or not different."""
    if labels and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise ConfigError(f"{where}.labels={unparse(labels)} must hold two or more different names, or none: they are then taken from the training data.")


def class_weights(entries: tuple[str, ...], labels: tuple[str, ...], where: str) -> np.ndarray:
    """The weight of each label (float32) from entries NAME=WEIGHT; 1 for those that are not named. Raises ConfigError."""
    given: dict[str, float] = {}
    for entry in entries:
        name, equals, weight = entry.rpartition("=")
        if not equals or labels and name not in labels:
            allowed = f"NAME=WEIGHT with NAME one of {', '.join(labels[:20])}" if labels else "NAME=WEIGHT"
            raise ConfigError(f"{where}.class_weights={unparse(entries)}: '{entry}'; allowed: {allowed}; or the one word {BALANCED[0]}.{nearest(name, labels)}")
        given[name] = parse(weight, float, f"{where}.class_weights: {name}")
        if not 0 <= given[name] < float("inf"):
            raise ConfigError(f"{where}.class_weights={unparse(entries)}: {entry} is no weight; allowed: numbers from 0 on.")
    if labels and given.keys() >= set(labels) and not any(given.values()):
        raise ConfigError(f"{where}.class_weights={unparse(entries)} leaves nothing to learn from: all weights are 0.")
    return np.array([given[label] if label in given else 1.0 for label in labels], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Options of tasks whose answers are names."""

    labels: tuple[str, ...] = field((), doc="Names of the labels; none = those of the training data, which are then kept with the run.")
    class_weights: tuple[str, ...] = field(
        (), doc="Weight of a label's examples in the loss, as NAME=WEIGHT, 1 if not named; balanced = in inverse proportion to their number."
    )  # fmt: skip

    def check(self, where: str) -> None:
        check_labels(self.labels, where)
        if self.class_weights != BALANCED:
            class_weights(self.class_weights, self.labels, where)

    def names_in(self, record: str, columns: Mapping[str, Any]) -> list[str]:
        """Names of the labels that a record's columns hold."""
        raise NotImplementedError


def weights_by_label(config: LabelConfig) -> np.ndarray:
    """Weights of a config's labels. Raises ConfigError where labels or weights have not been taken from the data yet (ptm.labels)."""
    if not config.labels or config.class_weights == BALANCED:
        what = "labels" if not config.labels else "class_weights"
        raise ConfigError(
            f"objective.{what} is to be taken from the training data first; name them with --config.objective.labels=A,B,... where there is none."
        )
    return class_weights(config.class_weights, config.labels, "objective")


# Texts between special tokens.


def shortened(texts: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """The texts with tokens taken from the end of whichever is the longest until they fit into `room` tokens together."""
    return [text[:size] for text, size in zip(texts, levelled([len(text) for text in texts], room))]


def levelled(sizes: Sequence[int], room: int) -> list[int]:
    """Sizes that are `room` together at most, the largest ones made smaller."""
    sizes = list(sizes)
    while sum(sizes) > room:
        longest = int(np.argmax(sizes))
        others = max((size for n, size in enumerate(sizes) if n != longest), default=0)
        sizes[longest] -= min(sum(sizes) - room, max(1, sizes[longest] - others))
    return sizes


class Framed(NamedTuple):
    """Texts with what stands between them: ids, segment types, and where each text begins."""

    tokens_L: np.ndarray
    types_L: np.ndarray
    starts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Frame:
    """Special tokens before, between and behind texts; `num_types` are the segment types that the model tells apart, `ends` says that cls comes last.

    An encoder reads cls text sep (pair sep), one that ends with its summary text sep (pair sep) cls (Yang et al. 2019, published code), a decoder
    bos text (sep pair) eos (Radford et al. 2018, section 3.3). Two seps part a pair where cls and sep are the tokenizer's bos and eos, as in RoBERTa
    (Liu et al. 2019, published code). Types are 0, 1 for the pair, and 2 for a cls at the end, as far as the model has so many.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    num_types: int
    ends: bool

    @classmethod
    def of(cls, tokenizer: Any, model_config: Any, *, objective: str) -> "Frame":
        """The frame of a family. Raises ConfigError where the tokenizer lacks a special piece that it needs."""
        num_types = model_config.num_types if hasattr(model_config, "num_types") else 1
        if model_config.kind == "decoder":
            first, last, needed = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id, tokenizer.eos_id, "bos or eos"
        else:
            first, last, needed = tokenizer.cls_id, tokenizer.sep_id, "cls and sep"
        if first is None or last is None:
            raise ConfigError(
                f"objective {objective} needs a tokenizer with {needed} for a {model_config.kind}; this one has none. Choose another with --config.tokenizer.*."
            )
        if model_config.kind == "decoder":
            return cls((first,), (tokenizer.sep_id if tokenizer.sep_id is not None else last,), (last,), num_types, False)
        if model_config.summary == "last":
            return cls((), (last,), (last, first), num_types, True)
        return cls((first,), (last,) * (2 if first == tokenizer.bos_id else 1), (last,), num_types, False)

    def overhead(self, texts: int) -> int:
        """Special tokens around so many texts."""
        return len(self.before) + len(self.between) * (texts - 1) + len(self.after)

    def around(self, texts: Sequence[np.ndarray]) -> Framed:
        """The texts framed, none of them cut."""
        tokens, types, starts = [self.before], [np.zeros(len(self.before), int)], []
        for n, text in enumerate(texts):
            behind = self.after if n == len(texts) - 1 else self.between
            starts.append(sum(map(len, tokens)))
            tokens += [text, behind]
            types.append(np.full(len(text) + len(behind), n))
        types_L = np.concatenate(types)
        if self.ends:
            types_L[-1] = 2
        return Framed(np.concatenate(tokens).astype(np.int32), np.minimum(types_L, self.num_types - 1).astype(np.int32), tuple(starts))


class Noted:
    """Tells in the log, once, that texts are cut."""

    def __init__(self, objective: str, length: int) -> None:
        self._objective, self._length, self._told = objective, length, False

    def cut(self, record: str) -> None:
        if not self._told:
            _log.warning("texts that are longer than data.length=%d are cut for objective %s, %s the first of them.", self._length, self._objective, record)
            self._told = True


# Tasks that ask one question about each text.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """Options of what stands between a model and a task's head; with the body in optimizer.freeze the model is a feature extractor."""

    layer_mix: bool = field(False, doc="The head reads a learned average of the hidden states of all layers (ELMo), not the last ones.")
    bilstm_layers: int = field(0, low=0, doc="Layers of LSTMs in both directions before the head (BERT, section 5.3: 2, beside a frozen body).")

    def readers(self) -> tuple[str, ...]:
        """The heads that this asks for."""
        return (*(["layer_mix"] if self.layer_mix else []), *([f"bilstm:{self.bilstm_layers}"] if self.bilstm_layers else []))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryConfig(ReaderConfig):
    """Options that all of them have."""

    pooling: str = field(
        "default", choices=("default", "first", "last", "mean", "max"),
        doc="What stands for a text: its first or last hidden state (default = as the family has it), or mean or maximum of all, special tokens included.",
    )  # fmt: skip
    lm_coefficient: float = field(0.0, low=0.0, doc="Coefficient of a decoder's language modelling of the same text (GPT: 0.5).")
    metrics: tuple[str, ...] = field((), doc="Entries of ptm.metrics.METRICS that answers are measured by; none = those of the objective.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row; a row holds one text for each 8 positions at most, so that it is known how many summaries there are."""
        return {"L": length, "S": max(1, length // SHORTEST)}


class SummaryTask(TokenObjective, abc.ABC):
    """Base of tasks that read one hidden state, or an average, of each text, through the head `classify`.

    Examples mark the position that stands for their text (mark_BL) and say there what is asked of it (NAME_BL of `marked`). A finished row has
    the positions of its texts, index_BS (L where there is none), and NAME_BS beside them. Texts are packed first-fit; attention stays within each.
    """

    kinds = ("encoder", "decoder")
    raw_length = None
    visits = None
    columns: tuple[str, ...] = ("label",)
    usual_metrics: tuple[str, ...]
    config: Any

    def __init__(
        self, config: Any, *, tokenizer: Any, length: int, packing: str, model_config: Any, outputs: int, marked: dict[str, Field], texts: int = 2
    ) -> None:
        """`outputs` are those of the head, `texts` the most texts that one frame holds."""
        if packing not in PACKINGS:
            raise ConfigError(f"data.packing={packing} cuts or joins texts; allowed with {config.name}: {', '.join(PACKINGS)}.")
        decoder = model_config.kind == "decoder"
        if config.lm_coefficient and not decoder:
            raise ConfigError(
                f"objective.lm_coefficient={config.lm_coefficient} models language left to right, and model {model_config.name} reads both ways; allowed: 0."
            )
        if config.pooling == "first" and decoder:
            raise ConfigError(
                f"objective.pooling=first reads what a decoder knows before the text; allowed with model {model_config.name}: default, last, mean, max."
            )
        super().__init__(z_loss=0.0, token_bytes=tokenizer.token_bytes)
        self.config, self.tokenizer, self.frame = config, tokenizer, Frame.of(tokenizer, model_config, objective=config.name)
        shortest = self.frame.overhead(texts) + texts
        if length < shortest:
            raise ConfigError(f"data.length={length} leaves no room for {texts} texts between special tokens; allowed with {config.name}: {shortest} or more.")
        self.packing = "first_fit" if packing == "default" else packing
        self.mask = "causal" if decoder else "full"
        self.pooling = model_config.summary if config.pooling == "default" else config.pooling
        self.head = f"classify:{outputs}"
        if config.lm_coefficient and config.readers():
            given = f"objective.lm_coefficient={config.lm_coefficient}"
            raise ConfigError(f"{given} models language with the last hidden states, which objective.layer_mix and objective.bilstm_layers replace; leave one of them out.")
        self.heads = (*(["lm"] if config.lm_coefficient else []), *config.readers(), self.head)
        self.coefficients = {"label": 1.0, **({"tokens": config.lm_coefficient} if config.lm_coefficient else {})}
        self.lengths = config.lengths(length)
        self.max_segments = self.lengths["S"]
        self.marked = marked
        self.fields = {"tokens_BL": Field(is_tokens=True), "mark_BL": Field(), **{f"{name}_BL": spec for name, spec in marked.items()}}
        self.fields |= {} if decoder else {"types_BL": Field()}
        self.fields |= {"targets_BL": Field(is_tokens=True), "weights_BL": Field(np.float32, 0.0)} if config.lm_coefficient else {}
        self.target_positions = length if config.lm_coefficient else 0
        self.metrics = config.metrics or self.usual_metrics
        self._noted = Noted(config.name, length)

    # Host.

    def encoded(self, value: Any) -> np.ndarray:
        """Tokens of a text in a column."""
        return self.tokenizer.encode(value if isinstance(value, str) else str(value))

    def texts(self, doc: Document) -> list[np.ndarray]:
        """Tokens of a document's text and of the second one, if it has one."""
        pair = doc.columns[PAIR] if PAIR in doc.columns else None
        return [doc.tokens_L, *([] if pair is None else [self.encoded(pair)])]

    def example(self, texts: Sequence[np.ndarray], doc: Document, *, room: int, **marked: Any) -> Example:
        """The framed texts, cut to `room` positions, with a mark, and what is `marked` there."""
        kept = shortened(texts, room - self.frame.overhead(len(texts)))
        if sum(map(len, kept)) < sum(map(len, texts)):
            self._noted.cut(doc.id)
        framed = self.frame.around(kept)
        size, at = len(framed.tokens_L), len(framed.tokens_L) - 1 if self.pooling == "last" else 0
        example = {"tokens_BL": framed.tokens_L, "mark_BL": np.zeros(size, np.int32)}
        example["mark_BL"][at] = 1
        for name, spec in self.marked.items():
            example[f"{name}_BL"] = np.full(size, spec.pad, spec.dtype)
            example[f"{name}_BL"][at] = marked[name]
        if "types_BL" in self.fields:
            example["types_BL"] = framed.types_L
        if "weights_BL" in self.fields:
            example["targets_BL"] = np.append(framed.tokens_L[1:], 0).astype(np.int32)
            example["weights_BL"] = np.append(np.ones(size - 1), 0).astype(np.float32)
        return example

    def finish(self, row: Example) -> Example:
        """Adds the positions of the summaries and what is said of them; these take the place of the marks."""
        row, count = dict(row), self.lengths["S"]
        length, at = len(row["tokens_BL"]), np.flatnonzero(row.pop("mark_BL"))
        assert len(at) <= count, f"a row has {len(at)} texts, {count} are allowed"
        row["index_BS"] = np.full(count, length, np.int32)
        row["index_BS"][: len(at)] = at
        for name, spec in self.marked.items():
            values_L = row.pop(f"{name}_BL")
            row[f"{name}_BS"] = np.full(count, spec.pad, spec.dtype)
            row[f"{name}_BS"][: len(at)] = values_L[at]
        return row

    # Devices.

    @abc.abstractmethod
    def label_weights(self, batch: Batch) -> jax.Array:
        """Weight of each text's label, [B, S]; of the batch alone."""

    @abc.abstractmethod
    def label_terms(self, logits_BSN: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, Ratio]]:
        """(nats of each text's label [B, S], which count as its weight says; ratios to report) of the head's outputs, float32."""

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        labelled = {"label": jnp.sum(self.label_weights(batch))}
        return labelled | ({"tokens": jnp.sum(batch["weights_BL"])} if "tokens" in self.coefficients else {})

    def summaries(self, out: Output, batch: Batch) -> jax.Array:
        """What stands for each text, [B, S, D]; 0 where there is none."""
        index_BS, segments_BL, hidden_BLD = batch["index_BS"], batch["segments_BL"], out.hidden_BLD
        if self.pooling not in ("mean", "max"):
            return take(hidden_BLD, index_BS)
        own_BS = take(segments_BL, index_BS)

        @jax.checkpoint
        def pooled(own_B: jax.Array) -> jax.Array:
            inside_BL1 = ((segments_BL == own_B[:, None]) & (own_B > 0)[:, None])[:, :, None]
            if self.pooling == "mean":
                return jnp.sum(jnp.where(inside_BL1, hidden_BLD, 0), axis=1) / jnp.maximum(jnp.sum(inside_BL1, axis=1), 1).astype(hidden_BLD.dtype)
            return jnp.where((own_B > 0)[:, None], jnp.max(jnp.where(inside_BL1, hidden_BLD, jnp.finfo(hidden_BLD.dtype).min), axis=1), 0)

        return jnp.moveaxis(jax.lax.map(pooled, own_BS.T), 0, 1)  # one text of each row after the other: no array [B, S, L, D]

    def _logits(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, train: bool) -> tuple[jax.Array, Output]:
        keys = (None, None) if rng is None else jax.random.split(rng)
        out = model.hidden(params, batch, mask=self.mask, head=self.head, train=train, rng=keys[0])
        logits_BSN = model.logits(params, self.summaries(out, batch), head=self.head, train=train, rng=keys[1])
        return logits_BSN.astype(jnp.float32), out

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        logits_BSN, out = self._logits(model, params, batch, rng=rng, train=train)
        nats_BS, ratios = self.label_terms(logits_BSN, batch)
        weights_BS = self.label_weights(batch)
        sources = by_source(batch, self.loss_name("label"), nats_BS, weights_BS, batch["index_BS"])
        totals, maxima = {"label": jnp.sum(nats_BS * weights_BS)}, {} if out.attention_max is None else {"attention_logit": out.attention_max}
        if "tokens" in self.coefficients:
            tokens, aux = self.token_terms(model, params, batch, out)
            totals |= tokens
            sources = sources | aux.sources
            ratios = ratios | {f"lm_{name}": ratio for name, ratio in aux.ratios.items()}
        return totals, Aux(ratios=ratios, maxima=maxima, sources=sources), carry

    def outputs(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """The head's outputs for each row's texts, logits [rows, S, N]."""
        return {"logits": self._logits(model, params, batch, rng=None, train=False)[0]}
