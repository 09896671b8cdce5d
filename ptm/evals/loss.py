"""The objective's own loss and ratios on the validation split: every row once, sums before the division."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import numpy as np

from ptm.fields import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """When and how much to evaluate."""

    name: ClassVar[str] = "loss"

    every: int = field(500, low=1, unit="steps", doc="Evaluate each time so many steps are done, and after the last.")
    batch_size: int | None = field(None, low=1, unit="rows", doc="Rows of a batch; None = train.batch_size.")
    batches: int | None = field(None, low=1, doc="Evaluate so many batches at most; None = the whole split.")


def evaluate(batches: Iterable[Any], *, params: Any, eval_step: Callable[[Any, Any], Any], coefficients: dict[str, float]) -> dict[str, float]:
    """{loss, loss/TERM, perplexity, RATIO, tokens} over device `batches`, added up in float64."""
    sums: Any = None
    for batch in batches:
        totals, weights, aux = eval_step(params, batch)
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get((totals, weights, aux.ratios)))
        sums = part if sums is None else jax.tree.map(np.add, sums, part)
    totals, weights, ratios = sums

    def divide(total: Any, weight: Any) -> float:
        return float(total / weight) if weight else 0.0

    terms = {term: divide(totals[term], weights[term]) for term in coefficients}
    result = {"loss": sum(c * terms[term] for term, c in coefficients.items())}
    if len(terms) > 1:
        result |= {f"loss/{term}": value for term, value in terms.items()}
    of_tokens = next((terms[term] for term in ("tokens", "mlm") if term in terms), result["loss"])
    result["perplexity"] = math.exp(min(of_tokens, 700.0))
    result |= {name: divide(total, weight) for name, (total, weight) in ratios.items()}
    result["tokens"] = float(weights["tokens"] if "tokens" in weights else next(iter(weights.values())))
    return result
