"""The evaluators, each with its Config; all work on the same Run."""

from typing import Any

from ptm import fields
from ptm.evals import choice, cloze, loss, minimal_pairs, perplexity, pseudo_perplexity, task
from ptm.evals.protocol import Measured, predictions_path, write

__all__ = ["EVALS", "measure", "predictions_path", "require", "write"]

EVALS = {
    "loss": loss,
    "task": task,
    "perplexity": perplexity,
    "pseudo_perplexity": pseudo_perplexity,
    "minimal_pairs": minimal_pairs,
    "cloze": cloze,
    "choice": choice,
}


def measure(run: Any, name: str, params: Any) -> Measured:
    """What one of the config's evals measures, named NAME/METRIC; of a mixture's parts NAME/PART/METRIC, and NAME/loss, the parts' by weight.

    The predictions of parts follow each other and say which `part` they are of.
    """
    options = fields.lookup(run.config.evals, name, "eval")
    module = EVALS[options.name]
    if not (options.of_objective and run.evaluated):
        measured = module.evaluate(options, run=run, params=params)
        return Measured({f"{name}/{metric}": value for metric, value in measured.metrics.items()}, measured.predictions)
    found = [(part, module.evaluate(options, run=alone, params=params)) for part, alone in run.evaluated]
    metrics = {f"{name}/{part.name}/{metric}": value for part, measured in found for metric, value in measured.metrics.items()}
    if all("loss" in measured.metrics for _, measured in found):
        total = sum(part.weight * measured.metrics["loss"] for part, measured in found)
        metrics = {f"{name}/loss": total / sum(part.weight for part, _ in found), **metrics}
    if any(measured.predictions is None for _, measured in found):
        return Measured(metrics)
    return Measured(metrics, [{"part": part.name, **row} for part, measured in found for row in measured.predictions])


def require(run: Any) -> None:
    """Refuses now what one of the config's evals could not measure later. Raises ConfigError."""
    for options in run.config.evals.values():
        EVALS[options.name].require(options, run=run)
