"""Evaluation of a checkpoint, exactly as the training loop does it, or of a directory of the reference library."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm import config as config_lib
from ptm import evals, fields, parallel, registry, specs, teacher, weights
from ptm.fields import ConfigError
from ptm.run import Run


def evaluate(spec: str, *, names: tuple[str, ...] = (), overrides: Mapping[str, str] | None = None, predictions: str | None = None) -> dict[str, Any]:
    """Metrics of the evals of the run behind a spec, with the step that was read; of `names` alone where some are given.

    A name that the run does not have, but ptm.evals.EVALS, is that eval with its defaults. `overrides` set keys of evals, evals.NAME.KEY -> text. What is
    predicted is written to WORKDIR/predictions/NAME-STEP.jsonl, or of one eval to the file `predictions`. Raises ConfigError.
    """
    if specs.is_directory(spec):
        run, params = weights.load(spec)
        step, which = 0, ""
    else:
        run = teacher.attach(weights.reopen(spec))
        params, step = weights.read(spec, run)
        parsed = specs.parse_spec(spec)
        which = "@ema" if parsed.which == "ema" else f"@avg{parsed.count}" if parsed.count > 1 else ""
    run = dataclasses.replace(run, config=_chosen(run, names, overrides or {}))
    if predictions is not None and len(run.config.evals) != 1:
        raise ConfigError(f"--predictions={predictions} holds what one eval predicts, and there are {', '.join(run.config.evals)}; choose with --evals=NAME.")
    metrics: dict[str, Any] = {"model": spec, "step": step}
    for name in run.config.evals:
        path = Path(predictions) if predictions else run.workdir and evals.predictions_path(run.workdir, name, step, which=which)
        metrics |= run.evaluate(name, params, predictions=path)
    return metrics


def _chosen(run: Run, names: tuple[str, ...], overrides: Mapping[str, str]) -> config_lib.Config:
    """The run's config with the evals that are asked for, as overridden."""
    known = run.config.evals
    for name in names:
        fields.lookup(known | evals.EVALS, name, "eval")
    chosen = {name: known[name] if name in known else evals.EVALS[name].Config() for name in names or known}
    config = config_lib.base(model=run.config.model, objective=run.config.objective, evals=chosen)
    for key, text in overrides.items():
        config_lib.override(config, key, text, registry.REGISTRIES)
    chosen = config_lib.resolve(config, registry.REGISTRIES).evals
    for name, options in chosen.items():
        if options.batch_size:
            parallel.check_batch(run.layout, options.batch_size, f"evals.{name}.batch_size")
    return dataclasses.replace(run.config, evals=chosen)
