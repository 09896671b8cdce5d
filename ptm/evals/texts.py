"""Sums over texts that perplexities are made of."""

import dataclasses
import math


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
