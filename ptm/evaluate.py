"""Evaluation of a checkpoint, exactly as the training loop does it."""

from typing import Any

from ptm import teacher, weights


def evaluate(spec: str) -> dict[str, Any]:
    """Metrics of all evals of the run behind `ckpt:DIR[@STEP|@best|@ema|@avgN]`, with the step that was read."""
    run = teacher.attach(weights.reopen(spec))
    params, step = weights.read(spec, run)
    metrics: dict[str, Any] = {"model": spec, "step": step}
    for name in run.config.evals:
        metrics |= run.evaluate(name, params)
    return metrics
