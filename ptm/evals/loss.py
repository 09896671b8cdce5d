"""The objective's own loss and ratios on the validation split: every row once, sums before the division."""

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import numpy as np

from ptm import interrupts
from ptm.evals.protocol import EvalConfig, Measured, rows_of
from ptm.fields import field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvalConfig):
    """When and how much to evaluate."""

    name: ClassVar[str] = "loss"
    of_objective: ClassVar[bool] = True

    batches: int | None = field(None, low=1, doc="Evaluate so many batches at most; None = the whole split.")


def require(options: Config, *, run: Any) -> None:
    """Refuses a split without rows."""
    run.validation(rows_of(options, run), data=options.data(run.config.data))


def evaluate(options: Config, *, run: Any, params: Any) -> Measured:
    """{loss, loss/TERM, perplexity, RATIO, tokens}, and where there are several sources loss_N of what comes from source N (or loss/TERM_N), added up in float64."""
    sums: Any = None
    for batch in itertools.islice(run.validation(rows_of(options, run), data=options.data(run.config.data)), options.batches):
        interrupts.poll()
        totals, weights, aux = run.eval_step(params, batch)
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get((totals, weights, aux.ratios, aux.sources)))
        sums = part if sums is None else jax.tree.map(np.add, sums, part)
    totals, weights, ratios, sources = sums

    def divide(total: Any, weight: Any) -> float:
        return float(total / weight) if weight else 0.0

    coefficients = run.objective.coefficients
    terms = {term: divide(totals[term], weights[term]) for term in coefficients}
    result = {"loss": sum(c * terms[term] for term, c in coefficients.items())}
    if len(terms) > 1:
        result |= {f"loss/{term}": value for term, value in terms.items()}
    of_tokens = next((terms[term] for term in ("tokens", "mlm") if term in terms), result["loss"])
    result["perplexity"] = math.exp(min(of_tokens, 700.0))
    result |= {name: divide(total, weight) for name, (total, weight) in ratios.items()}
    result |= {name: divide(total, weight) for name, (total, weight) in sources.items() if weight}
    result["tokens"] = float(weights["tokens"] if "tokens" in weights else next(iter(weights.values())))
    return Measured(result)
