"""How likely a language model finds texts: log-probabilities of tokens, in batches of similar length.

A model that reads from left to right gives log p(token | those before it); one that fills blanks gives pseudo-log-likelihoods, log p(token | all others)
with one token masked at a time (Salazar et al. 2020, section 2); an encoder-decoder gives those of a continuation after what its encoder reads.
"""

import abc
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Example, Field
from ptm.evals import stream
from ptm.fields import ConfigError
from ptm.models import Model
from ptm.nn.heads import head_names
from ptm.nn.losses import cross_entropy_and

Text = str | tuple[str, str]  # a text, or a context and what follows it


class Request(NamedTuple):
    """Tokens to score, given those before them; `about` is handed back with the scores."""

    context: np.ndarray
    target: np.ndarray
    about: Any = None


class Scored(NamedTuple):
    """Of each scored token its id, its log-probability (nats) and whether it is the likeliest of all.

    The first token of a text without context is scored only where the model was trained with a token before it.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """The log-likelihood, nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))


def windows(first: int, total: int, *, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, begin, end) of windows of at most `size` tokens that together score the tokens from `first` on, each once: [begin, end) in [start, end).

    The first window scores all that it can; each later one scores `stride` tokens, with as many before them as it holds.
    """
    begin = first
    while begin < total:
        end = min(total, max(size, begin + stride))
        yield max(0, end - size), begin, end
        begin = end


class Scorer(abc.ABC):
    """Rows of requests (the host half of an objective, without training), their compiled step, and scores from what that gives."""

    packing = "none"
    raw_length = None
    max_segments = 1
    visits = None
    fields: dict[str, Field]

    def __init__(self, lengths: dict[str, int], *, stride: int) -> None:
        self.lengths, self.stride = lengths, stride

    def finish(self, row: Example) -> Example:
        return row

    @abc.abstractmethod
    def rows(self, request: Request) -> Iterator[Example]:
        """The rows that a request needs. Raises ConfigError for one that cannot be scored."""

    @abc.abstractmethod
    def scored(self, request: Request, outputs: Sequence[dict[str, np.ndarray]]) -> Scored:
        """The scores of a request from the outputs of its rows."""


def _score(logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
    """Log-probability of each target, and whether its logit is above all others."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    log_probs = chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return {"log_probs": log_probs, "greedy": jnp.sum(logits >= chosen, axis=-1) == 1}


def _next_tokens(model: Model, params: Any, batch: Any, *, mask: str, head: str) -> dict[str, jax.Array]:
    """Scores [B, L] of targets_BL."""
    out = model.hidden(params, batch, mask=mask, head=head)
    targets_BL = batch["targets_BL"]
    given = (out.hidden_BLD, targets_BL)
    logits_of = functools.partial(model.logits, params, head=head)
    unused = jnp.zeros(targets_BL.shape, jnp.float32)
    context = model.module.context
    return cross_entropy_and(
        lambda x: logits_of(x[0]), given, targets_BL, unused, chunk=context.loss_chunk, layout=context.layout, read=lambda logits, x: _score(logits, x[1])
    )[1]


class LeftToRight(Scorer):
    """x -> x shifted by one. Under the prefix mask the context sees itself whole, as in training."""

    def __init__(self, lengths: dict[str, int], *, stride: int, start: int | None, mask: str, head: str) -> None:
        super().__init__(lengths, stride=stride)
        self._start, self._prefixed = [] if start is None else [start], mask == "prefix"
        self.options = {"mask": mask, "head": head}
        self.function = _next_tokens
        self.fields = {"tokens_BL": Field(is_tokens=True), "targets_BL": Field(is_tokens=True)}
        if self._prefixed:
            self.fields["prefix_BL"] = Field()

    def _windows(self, request: Request) -> tuple[np.ndarray, int, list[tuple[int, int, int]]]:
        """(all tokens, how many are given, windows): the first token of all is given always."""
        x = np.concatenate([self._start, request.context, request.target]).astype(np.int32)
        given = len(x) - len(request.target)
        return x, given, list(windows(max(given, 1), len(x), size=self.lengths["L"] + 1, stride=self.stride))

    def rows(self, request: Request) -> Iterator[Example]:
        x, given, found = self._windows(request)
        for start, _, end in found:
            row = {"tokens_BL": x[start : end - 1], "targets_BL": x[start + 1 : end]}
            if self._prefixed:
                row["prefix_BL"] = (np.arange(start, end - 1) < given).astype(np.int32)
            yield row

    def scored(self, request: Request, outputs: Sequence[dict[str, np.ndarray]]) -> Scored:
        x, _, found = self._windows(request)
        parts = [
            Scored(x[begin:end], *(output[name][begin - start - 1 : end - start - 1] for name in ("log_probs", "greedy")))
            for (start, begin, end), output in zip(found, outputs)
        ]
        return _joined(parts)


def _joined(parts: Sequence[Scored]) -> Scored:
    if not parts:
        return Scored(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, bool))
    return Scored(*map(np.concatenate, zip(*parts)))


class Paired(Scorer):
    """The encoder reads the context and an end token, the decoder writes the target after the padding token."""

    def __init__(self, lengths: dict[str, int], *, stride: int, tokenizer: Any, head: str) -> None:
        super().__init__(lengths, stride=stride)
        self._pad, self._end = [tokenizer.pad_id], [tokenizer.eos_id]
        self.options = {"mask": "causal", "head": head}
        self.function = _next_tokens
        tokens = Field(is_tokens=True, pad=tokenizer.pad_id)
        self.fields = {"inputs_BI": tokens, "tokens_BL": tokens, "targets_BL": tokens}

    def rows(self, request: Request) -> Iterator[Example]:
        if not len(request.context):
            raise ConfigError("an encoder-decoder scores what follows a context, not a text alone; give both.")
        if len(request.target) > self.lengths["L"]:
            raise ConfigError(f"a continuation of {len(request.target)} tokens is longer than the decoder's row; allowed: {self.lengths['L']}. Give it in parts.")
        if not len(request.target):
            return
        yield {
            "inputs_BI": np.concatenate([request.context[-(self.lengths["I"] - 1) :], self._end]).astype(np.int32),
            "tokens_BL": np.concatenate([self._pad, request.target[:-1]]).astype(np.int32),
            "targets_BL": request.target.astype(np.int32),
        }

    def scored(self, request: Request, outputs: Sequence[dict[str, np.ndarray]]) -> Scored:
        size = len(request.target)
        return _joined([Scored(request.target, output["log_probs"][:size], output["greedy"][:size]) for output in outputs])


def _one_token(model: Model, params: Any, batch: Any, *, mask: str, head: str) -> dict[str, jax.Array]:
    """Scores [B] of target_B at place_B."""
    out = model.hidden(params, batch, mask=mask, head=head)
    hidden_BD = jnp.take_along_axis(out.hidden_BLD, batch["place_B"][:, None, None], axis=1)[:, 0]
    return _score(model.logits(params, hidden_BD, head=head), batch["target_B"])


class OneMasked(Scorer):
    """A row for each token, which is masked in it; texts that are too long for a row are cut into pieces, each framed as in training.

    Of a word of several tokens those that follow are masked too where `word_starts` is given (Kauf and Ivanova 2023, section 3), since they give away
    the ones before them.
    """

    def __init__(self, lengths: dict[str, int], *, tokenizer: Any, head: str, by_word: bool) -> None:
        self._before, self._after = ([] if token is None else [token] for token in (tokenizer.cls_id, tokenizer.sep_id))
        self._room = lengths["L"] - len(self._before) - len(self._after)
        super().__init__(lengths, stride=self._room)
        self._mask, self._word_starts = tokenizer.mask_id, tokenizer.word_starts if by_word else None
        self.options = {"mask": "full", "head": head}
        self.function = _one_token
        self.fields = {"tokens_BL": Field(is_tokens=True), "place_B": Field(), "target_B": Field()}

    def _ends(self, x: np.ndarray) -> np.ndarray:
        """For each token one past the last that is masked with it."""
        if self._word_starts is None:
            return np.arange(len(x)) + 1
        bounds = np.append(np.flatnonzero(self._word_starts(x)), len(x))
        return bounds[np.searchsorted(bounds, np.arange(len(x)), side="right")]

    def rows(self, request: Request) -> Iterator[Example]:
        x = np.concatenate([request.context, request.target]).astype(np.int32)
        ends, offset = self._ends(x), len(self._before)
        for start, begin, end in windows(len(request.context), len(x), size=self._room, stride=self.stride):
            piece = np.concatenate([self._before, x[start:end], self._after]).astype(np.int32)
            for place in range(begin, end):
                tokens = piece.copy()
                tokens[place - start + offset : min(ends[place], end) - start + offset] = self._mask
                yield {"tokens_BL": tokens, "place_B": np.int32(place - start + offset), "target_B": x[place]}

    def scored(self, request: Request, outputs: Sequence[dict[str, np.ndarray]]) -> Scored:
        columns = (np.array([output[name] for output in outputs], kind) for name, kind in (("log_probs", np.float32), ("greedy", bool)))
        return Scored(request.target, *columns)


def start_token(run: Any) -> int | None:
    """What stands before a text that a run's model reads from left to right: the tokenizer's bos, or eos, unless the run was trained without."""
    options, tokenizer = run.config.objective, run.tokenizer
    bounded = (not hasattr(options, "boundaries") or options.boundaries) and run.config.data.packing != "window"
    return (tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id) if bounded else None


def scorer_of(run: Any, *, name: str, length: int | None = None, stride: int | None = None, by_word: bool = False) -> Scorer:
    """How a run's model scores texts, in windows of `length` tokens (None = as in training). Raises ConfigError for one that cannot; `name` is who asks."""
    model, trained = run.model, run.objective.lengths
    heads, kind, longest = head_names(model.module.heads), model.config.kind, model.config.max_length
    if length is not None and longest is not None and length > longest:
        raise ConfigError(f"{name}: length={length} is more than the model has positions, {longest}; allowed: 1 to {longest}.")
    lengths = {dim: size for dim, size in trained.items() if dim in ("L", "I")} | ({} if length is None else {"L": length})
    stride = max(1, lengths["L"] // 2) if stride is None else stride
    if stride > lengths["L"]:
        raise ConfigError(f"{name}: stride={stride} is more than the length of a window, {lengths['L']}, so that tokens would be left out; allowed: 1 to {lengths['L']}.")
    head = "mlm" if kind == "encoder" else "lm"
    if head not in heads:
        raise ConfigError(
            f"{name} needs a language model with the head {head}; model {model.config.name} with objective {run.config.objective.name} has "
            f"{', '.join(model.module.heads)}. Take the run before fine-tuning, or another family."
        )
    if model.module.part_for(head):
        raise ConfigError(f"{name}: in model {model.config.name} only the small generator models language, not the model itself; take another family.")
    mask = run.objective.mask
    if kind == "encoder_decoder":
        return Paired(lengths, stride=stride, tokenizer=run.tokenizer, head=head)
    if kind == "decoder" or mask in ("causal", "prefix"):
        return LeftToRight(lengths, stride=stride, start=start_token(run), mask="prefix" if mask == "prefix" else "causal", head=head)
    if run.tokenizer.mask_id is None:
        raise ConfigError(f"{name} masks tokens, and this tokenizer has no mask token.")
    return OneMasked(lengths, tokenizer=run.tokenizer, head=head, by_word=by_word)


def score(
    run: Any, params: Any, requests: Iterable[Request], *, scorer: Scorer, batch_size: int, window: int | None = None
) -> Iterator[tuple[Request, Scored]]:
    """Every request with its scores, in order, while they are read; `window` rows are read ahead, None = 32 batches."""
    step = run.program(scorer.function, **scorer.options)
    found = stream.through(requests, rows=scorer.rows, featurizer=scorer, step=step, run=run, params=params, batch_size=batch_size, window=window)
    for request, outputs in found:
        yield request, scorer.scored(request, outputs)


def request_of(tokenizer: Any, text: Text, *, about: Any = None) -> Request:
    """The tokens of a text; of (context, continuation) those of the whole, of which the context's are given as far as they are the same there."""
    if isinstance(text, str):
        return Request(np.zeros(0, np.int32), tokenizer.encode(text), about)
    context, whole = tokenizer.encode(text[0]), tokenizer.encode(text[0] + text[1])
    same = len(context) if np.array_equal(context, whole[: len(context)]) else int(np.argmin(_equal(context, whole)))
    return Request(whole[:same], whole[same:], about)


def _equal(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Whether they are equal place by place, and one place more, where they are not."""
    size = min(len(ours), len(theirs))
    return np.append(ours[:size] == theirs[:size], False)


def log_likelihoods(
    run: Any, params: Any, texts: Iterable[Text], *, batch_size: int, length: int | None = None, stride: int | None = None, by_word: bool = False,
    window: int | None = None,
) -> Iterator[Scored]:  # fmt: skip
    """The scores of texts, or of continuations after their contexts, in order, while they are read.

    Texts longer than a row are scored in windows of `length` tokens, `stride` of them at a time. Raises ConfigError for a model that models no language.
    """
    scorer = scorer_of(run, name="scoring", length=length, stride=stride, by_word=by_word)
    requests = (request_of(run.tokenizer, text) for text in texts)
    return (scored for _, scored in score(run, params, requests, scorer=scorer, batch_size=batch_size, window=window))
