"""Whole texts scored token by token, and the sums that perplexities are made of."""

import dataclasses
import math
from typing import Any

from ptm.evals import scoring
from ptm.evals.protocol import RecordsConfig, rows_of


@dataclasses.dataclass(frozen=True)
class Sums:
    """Negative log-likelihood (nats) of some tokens, words and bytes."""

    nats: float = 0.0
    tokens: int = 0
    words: int = 0
    bytes: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.nats + other.nats, self.tokens + other.tokens, self.words + other.words, self.bytes + other.bytes)

    def measures(self) -> dict[str, float]:
        """{loss (nats a token), perplexity, bits_per_byte}."""
        loss = self.nats / max(self.tokens, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": self.nats / math.log(2) / max(self.bytes, 1)}

    def counts(self) -> dict[str, float]:
        """{tokens, words, bytes}."""
        return {"tokens": float(self.tokens), "words": float(self.words), "bytes": float(self.bytes)}


def measured(options: RecordsConfig, *, run: Any, params: Any, scorer: scoring.Scorer, count_lines: bool = False) -> tuple[Sums, list[dict[str, Any]]]:
    """The sums of all records of an eval, and those of each as its prediction.

    Words stand between white space, line ends are words too if `count_lines`; bytes are those of UTF-8, without those of tokens that are not scored.
    """
    found = run.records(options.data(run.config.data), limit=options.examples)
    requests = (scoring.request_of(run.tokenizer, record.text, about=record) for record in found)
    sums, predictions = Sums(), []
    for request, scored in scoring.score(run, params, requests, scorer=scorer, batch_size=rows_of(options, run)):
        text = request.about.text
        unscored = request.target[: len(request.target) - len(scored.tokens)]
        words = len(text.split()) + (text.count("\n") + (not text.endswith("\n")) if count_lines else 0)
        row = Sums(-scored.total, len(scored.tokens), words, len(text.encode()) - int(run.tokenizer.token_bytes[unscored].sum()))
        sums += row
        predictions.append({"id": request.about.id, **row.counts(), "nats": row.nats})
    return sums, predictions
