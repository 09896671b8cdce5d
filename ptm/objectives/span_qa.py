"""Extractive question answering: which stretch of a context answers a question (Rajpurkar et al. 2016, 2018; Devlin et al. 2019, sections 4.2 and 4.3)."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.metrics import metric_of
from ptm.models import Model
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.rows import PACKINGS, Frame, Framed, ReaderConfig
from ptm.objectives.sources import by_source

CONTEXT, ANSWERS = "context", "answers"  # columns
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ReaderConfig):
    """Options of extractive question answering. A record's text is the question; its field `context` is what is read, `answers` a list of
    {"text", "answer_start"}, empty for a question without answer: data.columns=text=QUESTION,context=CONTEXT,answers=ANSWERS.
    """

    name: ClassVar[str] = "span_qa"

    doc_stride: int = field(128, low=1, unit="tokens", doc="From the beginning of a window of the context to that of the next.")
    max_question: int = field(64, low=1, unit="tokens", doc="Longest question; the end of a longer one is cut.")
    n_best: int = field(20, low=1, doc="Answers that are told of each question, the best first.")
    max_answer: int = field(30, low=1, unit="tokens", doc="Longest answer.")
    null_threshold: float | None = field(
        None, doc="Answer nothing where that scores higher than the best answer by more than this; None = always answer (SQuAD 1.1)."
    )  # fmt: skip
    metrics: tuple[str, ...] = field(("squad",), doc="Entries of ptm.metrics.METRICS that answers are measured by; cmrc for Chinese.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row. Raises ConfigError where a question leaves no room for a window."""
        self.check_window(length, overhead=3)
        return {"L": length}

    def check_window(self, length: int, *, overhead: int) -> None:
        """Refuses rows in which windows would leave out a part of the context, with `overhead` special tokens in each."""
        room = length - self.max_question - overhead
        if room < self.doc_stride:
            raise ConfigError(
                f"data.length={length} leaves {max(room, 0)} tokens for a window of the context beside objective.max_question={self.max_question} and special "
                f"tokens, and the next window begins after objective.doc_stride={self.doc_stride}; make data.length longer, or lower the others."
            )

    def check(self, where: str) -> None:
        for metric in self.metrics:
            metric_of(metric)


class Window(NamedTuple):
    """A question with a part of its context in one row: context tokens [first, last) stand from `at` on, `null` is the position of no answer."""

    framed: Framed
    first: int
    last: int
    at: int
    null: int


class Reading(NamedTuple):
    """A record's windows, and the characters starts[n]:ends[n] of the context that its token n stands for."""

    windows: list[Window]
    starts: np.ndarray
    ends: np.ndarray


class SpanQA:
    """Mean of two cross entropies of the head `qa`: of the position where the answer begins and of that where it ends, over all positions of the window.

    Where the answer is not in a window the right position is that of cls, or the last one of families whose summary that is. A record without `answers`,
    or with answers that are nowhere in its context, is asked but not learned from. Contexts longer than a row are read in windows that overlap; an answer's
    score is its best over all windows, which takes the place of the published rule that only the window with most context around a token counts.
    """

    kinds = ("encoder", "decoder")
    columns = (CONTEXT, ANSWERS)
    coefficients = {"span": 1.0}
    raw_length = max_segments = visits = None
    target_positions = 0

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if packing not in PACKINGS:
            raise ConfigError(f"data.packing={packing} cuts or joins texts; allowed with {config.name}: {', '.join(PACKINGS)}.")
        self.config, self.tokenizer, self.metrics = config, tokenizer, config.metrics
        self.heads = (*config.readers(), "qa")
        self.packing = "first_fit" if packing == "default" else packing
        self.lengths = config.lengths(length)
        self.mask = "causal" if model_config.kind == "decoder" else "full"
        self.frame = Frame.of(tokenizer, model_config, objective=config.name)
        config.check_window(length, overhead=self.frame.overhead(2))
        self._last = model_config.summary == "last"
        self.fields = {"tokens_BL": Field(is_tokens=True), **({} if self.mask == "causal" else {"types_BL": Field()}), "start_BL": Field(), "end_BL": Field()}
        self._cut_question, self._misfits = False, 0

    # Host.

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        reading = self.read(doc)
        target = self._target(doc, reading)
        for window in reading.windows:
            size = len(window.framed.tokens_L)
            marks = {"start_BL": np.zeros(size, np.int32), "end_BL": np.zeros(size, np.int32)}
            if target is not None:
                inside = window.first <= target[0] and target[1] < window.last
                for marks_L, token in zip(marks.values(), target):
                    marks_L[window.at + token - window.first if inside else window.null] = 1
            types = {"types_BL": window.framed.types_L} if "types_BL" in self.fields else {}
            yield {"tokens_BL": window.framed.tokens_L, **types, **marks}

    def finish(self, row: Example) -> Example:
        return row

    def read(self, doc: Document) -> Reading:
        """The windows of a record. Raises ConfigError for one without a context."""
        question_L, context_L, starts, ends = doc.tokens_L, *self._context(doc)
        if len(question_L) > self.config.max_question:
            if not self._cut_question:
                _log.warning("questions longer than objective.max_question=%d tokens are cut, %s the first of them.", self.config.max_question, doc.id)
            self._cut_question, question_L = True, question_L[: self.config.max_question]
        room = self.lengths["L"] - self.frame.overhead(2) - len(question_L)
        windows = []
        for first in range(0, max(1, len(context_L) - room + self.config.doc_stride), self.config.doc_stride):
            last = min(first + room, len(context_L))
            framed = self.frame.around([question_L, context_L[first:last]])
            windows.append(Window(framed, first, last, framed.starts[1], len(framed.tokens_L) - 1 if self._last else 0))
        return Reading(windows, starts, ends)

    def _context(self, doc: Document) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if CONTEXT not in doc.columns or not isinstance(doc.columns[CONTEXT], str):
            wanted = "--config.data.columns=text=QUESTION,context=COLUMN,answers=COLUMN"
            raise ConfigError(f"record {doc.id} has no text in its field context; map it with {wanted}.")
        return self.tokenizer.encode_with_offsets(doc.columns[CONTEXT])

    def _target(self, doc: Document, reading: Reading) -> tuple[int, int] | None:
        """First and last context token of the first answer that is in the context, (-1, -1) for none, None where nothing is known."""
        answers = answers_of(doc)
        if answers is None or not answers:
            return None if answers is None else (-1, -1)
        for text, start in answers:
            place = located(doc.columns[CONTEXT], text, start)
            tokens = None if place is None else covering(reading.starts, reading.ends, *place)
            if tokens is not None:
                return tokens
        self._misfits += 1
        if self._misfits & (self._misfits - 1) == 0:  # 1, 2, 4, 8, ... of them
            _log.warning("%s: its answer %r is not in its context; not learned from, %d so far.", doc.id, answers[0][0][:60], self._misfits)
        return None

    def answer(self, doc: Document, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The best answer over all windows, a slice of the context, and the n best with their probabilities among these; "" is no answer."""
        config, reading, context = self.config, self.read(doc), doc.columns[CONTEXT]
        scores: dict[tuple[int, int], float] = {}
        null_score = float("inf")
        for window, found in zip(reading.windows, outputs, strict=True):
            start_L, end_L = (np.asarray(found[name], np.float64) for name in ("start", "end"))
            null_score = min(null_score, float(start_L[window.null] + end_L[window.null]))
            part = slice(window.at, window.at + window.last - window.first)
            for score, first, last in best_spans(start_L[part], end_L[part], count=2 * config.n_best, longest=config.max_answer):
                place = (int(reading.starts[window.first + first]), int(reading.ends[window.first + last]))
                scores[place] = max(score, scores.get(place, score))
        n_best: list[dict[str, Any]] = []
        seen: set[str] = set()
        for (start, end), score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
            text = context[start:end].strip()
            if text and text not in seen and len(n_best) < config.n_best:
                seen.add(text)
                start += len(context[start:end]) - len(context[start:end].lstrip())
                n_best.append({"text": text, "score": score, "start": start, "end": start + len(text)})
        silent = not n_best or config.null_threshold is not None and null_score - n_best[0]["score"] > config.null_threshold
        if not n_best or config.null_threshold is not None:
            n_best.append({"text": "", "score": null_score, "start": None, "end": None})
            n_best.sort(key=lambda entry: -entry["score"])
        shares = np.exp([entry["score"] - n_best[0]["score"] for entry in n_best])
        for entry, share in zip(n_best, shares / shares.sum()):
            entry["probability"] = float(share)
        chosen = next(entry for entry in n_best if (entry["text"] == "") == silent)
        return {"prediction": chosen["text"], "score": chosen["score"], "null_score": null_score, "n_best": n_best}

    def reference(self, doc: Document) -> list[str] | None:
        """The texts of a record's answers, none for a question without answer."""
        answers = answers_of(doc)
        return None if answers is None else [text for text, _ in answers]

    # Devices.

    def init_carry(self, model: Model, batch_size: int) -> Any:
        return None

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"span": jnp.sum(batch["start_BL"]).astype(jnp.float32)}

    def _logits(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, train: bool) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        keys = (None, None) if rng is None else jax.random.split(rng)
        out = model.hidden(params, batch, mask=self.mask, head="qa", train=train, rng=keys[0])
        logits_BL2 = model.logits(params, out.hidden_BLD, head="qa", train=train, rng=keys[1]).astype(jnp.float32)
        return logits_BL2[..., 0], logits_BL2[..., 1], {} if out.attention_max is None else {"attention_logit": out.attention_max}

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        start_BL, end_BL, maxima = self._logits(model, params, batch, rng=rng, train=train)
        score = jax.vmap(score_segments)
        start_nats_BL, start_hits_BN = score(start_BL, batch["start_BL"], batch["segments_BL"])
        end_nats_BL, end_hits_BN = score(end_BL, batch["end_BL"], batch["segments_BL"])
        hits = jnp.sum(start_hits_BN * end_hits_BN)  # windows whose two positions are both right
        total = (jnp.sum(start_nats_BL * batch["start_BL"]) + jnp.sum(end_nats_BL * batch["end_BL"])) / 2
        sources = jax.tree.map(jnp.add, *(by_source(batch, "loss", nats, batch[name]) for nats, name in ((start_nats_BL, "start_BL"), (end_nats_BL, "end_BL"))))
        return {"span": total}, Aux(ratios={"accuracy": (hits, self.weights(batch)["span"])}, maxima=maxima, sources=sources), carry

    def outputs(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Logits of the beginning and the end of the answer, [rows, L] each."""
        start_BL, end_BL, _ = self._logits(model, params, batch, rng=None, train=False)
        return {"start": start_BL, "end": end_BL}


def score_segments(logits_L: jax.Array, marks_L: jax.Array, segments_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(nats of each position among those of its segment [L]; whether a segment's marked logit is its largest [L + 1]) of one row."""
    count = len(logits_L) + 1
    top_N = jax.ops.segment_max(jax.lax.stop_gradient(logits_L), segments_L, count)
    sum_N = jax.ops.segment_sum(jnp.exp(logits_L - top_N[segments_L]), segments_L, count)
    log_z_L = top_N[segments_L] + jnp.log(sum_N[segments_L])
    hits_N = jax.ops.segment_sum(marks_L * (logits_L >= top_N[segments_L]), segments_L, count)
    return log_z_L - logits_L, hits_N


def answers_of(doc: Document) -> list[tuple[str, int]] | None:
    """(text, where it begins in the context) of a record's answers that are not empty; None where the record has no such field. Raises ConfigError."""
    given = doc.columns[ANSWERS] if ANSWERS in doc.columns else None
    if given is None:
        return None
    if isinstance(given, dict) and {"text", "answer_start"} <= given.keys():  # as the reference library's data sets have them: lists side by side
        given = [{"text": text, "answer_start": start} for text, start in zip(given["text"], given["answer_start"])]
    try:
        answers = [(str(answer["text"]), int(answer["answer_start"])) for answer in given]
    except (TypeError, KeyError, ValueError):
        raise ConfigError(
            f'the field answers of record {doc.id} is {str(given)[:60]!r}; allowed: a list of {{"text": TEXT, "answer_start": NUMBER}}. See data.columns.'
        ) from None
    return [(text, start) for text, start in answers if text.strip()]


def located(context: str, text: str, start: int) -> tuple[int, int] | None:
    """Where an answer stands, without the spaces around it: at `start` if it is there, else at the nearest place with its text; None if there is none."""
    place, text = start + len(text) - len(text.lstrip()), text.strip()
    if place < 0 or not context.startswith(text, place):
        before, behind = context.rfind(text, 0, max(place, 0) + len(text)), context.find(text, max(place, 0))
        places = [found for found in (before, behind) if found >= 0]
        if not places:
            return None
        place = min(places, key=lambda found: abs(found - place))
    return place, place + len(text)


def covering(starts: np.ndarray, ends: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """First and last of the tokens at [starts, ends) that hold the characters [start, end); None if none holds any of them."""
    inside = np.flatnonzero((ends > start) & (starts < end) & (ends > starts))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def best_spans(start_L: np.ndarray, end_L: np.ndarray, *, count: int, longest: int) -> list[tuple[float, int, int]]:
    """The `count` best (score, first, last) with first <= last and `longest` positions at most; a score is the sum of both logits."""
    size = len(start_L)
    widths = range(min(longest, size))
    score_N = np.concatenate([start_L[: size - width] + end_L[width:] for width in widths] or [np.zeros(0)])
    first_N = np.concatenate([np.arange(size - width) for width in widths] or [np.zeros(0, int)])
    width_N = np.repeat(np.arange(len(widths)), [size - width for width in widths])
    order = np.argsort(-score_N, kind="stable")[:count]
    return [(float(score_N[n]), int(first_N[n]), int(first_N[n] + width_N[n])) for n in order]
