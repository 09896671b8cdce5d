"""Masked language modelling (Devlin et al. 2019, section 3.1) of tokens, whole words (its published code; Chinese ones: Cui et al. 2021), spans
(Joshi et al. 2020) and n-grams (Lan et al. 2020)."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.objectives.selected import SelectedObjective

WORDS = "words"  # the column with a document's words: a list, or a string that sets them apart by spaces
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of masked language modelling."""

    name: ClassVar[str] = "mlm"

    rate: float = field(0.15, low=0.0, high=1.0, doc="Share of tokens that are predicted.")
    unit: str = field(
        "token", choices=("token", "whole_word", "span", "ngram"),
        doc="What is chosen at once: tokens, words (Chinese ones by a column `words`, else by character), spans or n-grams of words.",
    )  # fmt: skip
    mask_share: float = field(0.8, low=0.0, high=1.0, doc="Share of chosen tokens replaced by the mask token.")
    random_share: float = field(0.1, low=0.0, high=1.0, doc="Share of chosen tokens replaced by a random one; the rest stays.")
    span_p: float = field(0.2, low=0.01, high=1.0, doc="Success probability of the geometric span length (SpanBERT, section 3.1).")
    span_max: int = field(10, low=1, unit="words", doc="Longest span; longer draws are drawn again.")
    ngram_max: int = field(3, low=1, unit="words", doc="Longest n-gram; its length is n with a probability in proportion to 1/n (ALBERT, section 4.1).")
    visits: int | None = field(None, low=1, unit="epochs", doc="Different maskings of a document: 1 = static, 10 = BERT's copies, None = dynamic.")
    z_loss: float = field(0.0, low=0.0, doc="Coefficient of the squared log-normaliser.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row; S leaves room for a quarter more than the expected number of chosen tokens."""
        return {"L": length, "S": min(length, max(1, math.ceil(1.25 * self.rate * length)))}

    def check(self, where: str) -> None:
        if self.rate in (0.0, 1.0):
            raise ConfigError(f"{where}.rate={self.rate} leaves nothing to {'predict' if self.rate == 0 else 'predict from'}; allowed: between 0 and 1.")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ConfigError(f"{where}.mask_share={self.mask_share} + {where}.random_share={self.random_share} exceed 1.")


def choose(
    num_tokens: int, word_starts_L: np.ndarray, *, config: Config, rng: np.random.Generator, breaks: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens to predict, ascending, and a number below num_tokens of the token, word, span or n-gram that each belongs to.

    On average they are rate * num_tokens, but for at least one unit in each document. None crosses a token of `breaks`, where another text begins.
    """
    budget = min(num_tokens, max(1, int(config.rate * num_tokens + rng.random())))  # rounded at random, so that the rate is exact on average
    if config.unit == "token":
        chosen = np.sort(rng.permutation(num_tokens)[:budget])
        return chosen, chosen
    starts = np.flatnonzero(np.concatenate([[True], word_starts_L[1:]]))
    starts = np.union1d(starts, np.asarray(breaks, starts.dtype))
    ends = np.append(starts[1:], num_tokens)
    unit_L = np.full(num_tokens, -1)
    left = budget
    for number, first in enumerate(rng.permutation(len(starts))):
        for word in range(first, min(first + _words_at_once(config, rng), len(starts))):
            if unit_L[starts[word]] >= 0 or word > first and starts[word] in breaks:
                break  # a span ends before another, and where its text ends
            size = ends[word] - starts[word]
            # The last word is not cut. Taken in proportion to the room that is left for it, it exceeds the budget as much as its absence falls short.
            if left == budget or rng.random() * size < left:
                unit_L[starts[word] : ends[word]] = number
            left -= size
            if left <= 0:
                chosen = np.flatnonzero(unit_L >= 0)
                return chosen, unit_L[chosen]
    raise AssertionError("the words hold all tokens, more than the budget")


def _words_at_once(config: Config, rng: np.random.Generator) -> int:
    if config.unit == "whole_word":
        return 1
    if config.unit == "ngram":
        shares = np.cumsum(1 / np.arange(1, config.ngram_max + 1))
        return 1 + int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
    words = rng.geometric(config.span_p)
    while words > config.span_max:
        words = rng.geometric(config.span_p)
    return words


class MLM(SelectedObjective):
    """corrupted -> original at the chosen positions; the vocabulary projection runs on S positions of a row."""

    kinds = ("encoder",)
    mask = "full"
    heads = ("mlm",)
    raw_length = None  # a document is masked whole, then cut

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if tokenizer.mask_id is None:
            raise ConfigError(f"objective {config.name} needs a tokenizer with a mask token; this one has none. Choose another with --config.tokenizer.*.")
        if packing == "window":
            raise ConfigError(f"data.packing=window is for causal objectives; allowed with {config.name}: default, first_fit, concat, none.")
        super().__init__(z_loss=config.z_loss, token_bytes=tokenizer.token_bytes)
        self.config, self.tokenizer = config, tokenizer
        self.packing = "first_fit" if packing == "default" else packing
        self.lengths = config.lengths(length)
        self.fields = {"tokens_BL": Field(is_tokens=True), "targets_BL": Field(is_tokens=True), "weights_BL": Field(np.float32, 0.0)}
        self.visits = config.visits
        self.target_positions = self.lengths["S"]
        self._first, self._last = ([] if token is None else [token] for token in (tokenizer.cls_id, tokenizer.sep_id))
        self._room = length - len(self._first) - len(self._last)
        if self._room < 1:
            raise ConfigError(
                f"data.length={length} leaves no room between the tokenizer's cls and sep; allowed with {config.name}: {length - self._room + 1} or more."
            )
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), sorted(tokenizer.special_ids))
        self._misfit = False

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        targets_L = doc.tokens_L.astype(np.int32)
        if not len(targets_L):
            return
        tokens_L, weights_L = self.corrupt(targets_L, self.word_starts(doc), rng=rng)
        for start in range(0, len(targets_L), self._room):
            part = slice(start, start + self._room)
            yield {
                "tokens_BL": self._framed(tokens_L[part], self._first, self._last),
                "targets_BL": self._framed(targets_L[part], self._first, self._last),
                "weights_BL": self._framed(weights_L[part], [0] * len(self._first), [0] * len(self._last)),
            }

    def word_starts(self, doc: Document) -> np.ndarray:
        """Which tokens of a document begin a word: by the tokenizer, and where words hold Chinese characters by the column `words`, if it has one.

        A document whose column does not hold the words of its text has a word at each Chinese character; the first such one is named in the log.
        """
        if self.config.unit == "token":
            return np.ones(len(doc.tokens_L), bool)
        if WORDS in doc.columns:
            words = doc.columns[WORDS]
            words = words.split() if isinstance(words, str) else words
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
                raise ConfigError(
                    f"column '{WORDS}' of {doc.id} is {str(words)[:40]!r}; allowed: a list of words, or words with spaces between. See data.columns."
                )
            starts_L = self.tokenizer.segmented_word_starts(doc.tokens_L, words=words)
            if starts_L is not None:
                return starts_L
            if not self._misfit:
                _log.warning(
                    "column '%s' of %s does not hold the words of its text: each Chinese character counts as a word, here and in others like it.", WORDS, doc.id
                )
                self._misfit = True
        return self.tokenizer.word_starts(doc.tokens_L)

    def corrupt(
        self, targets_L: np.ndarray, word_starts_L: np.ndarray, *, rng: np.random.Generator, breaks: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens with the chosen ones replaced, and weights that are 1 there; `breaks` as in `choose`."""
        chosen, unit = choose(len(targets_L), word_starts_L, config=self.config, rng=rng, breaks=breaks)
        # Spans (SpanBERT, section 3.1) and n-grams are replaced as a whole, a word token by token (Devlin et al. 2019, published code).
        fate = rng.random(len(targets_L))[unit if self.config.unit in ("span", "ngram") else chosen]
        tokens_L, weights_L = targets_L.copy(), np.zeros(len(targets_L), np.float32)
        weights_L[chosen] = 1.0
        tokens_L[chosen[fate < self.config.mask_share]] = self.tokenizer.mask_id
        random = chosen[(fate >= self.config.mask_share) & (fate < self.config.mask_share + self.config.random_share)]
        tokens_L[random] = rng.choice(self._ordinary, len(random))
        return tokens_L, weights_L

    @staticmethod
    def _framed(x_L: np.ndarray, before: list[int], after: list[int]) -> np.ndarray:
        return np.concatenate([before, x_L, after]).astype(x_L.dtype)
