"""All families, objectives and evals by name, and the checks of a whole config: what the command line needs before anything heavy is loaded."""

import math

import ml_collections

from ptm import config as config_lib
from ptm import fields, log, optim, parallel, text
from ptm.config import Config
from ptm.evals import EVALS
from ptm.fields import ConfigError
from ptm.models import MODELS
from ptm.objectives import OBJECTIVES

REGISTRIES = {
    "model": {name: family.config for name, family in MODELS.items()},
    "objective": {name: entry.config for name, entry in OBJECTIVES.items()},
    "eval": {name: module.Config for name, module in EVALS.items()},
}


def streams(config: Config) -> int:
    """Logical streams of a run: as configured, or the greatest common divisor of its batch sizes and 64."""
    return config.data.streams or math.gcd(config.train.batch_size, 64)


def check(config: Config) -> None:
    """Refuses combinations that no section can see alone; needs no data and compiles nothing. Raises ConfigError."""
    model, objective, train = config.model, config.objective, config.train
    lengths = objective.lengths(config.data.length)
    if model.max_length is not None and max(lengths["L"], lengths.get("I", 0)) > model.max_length:
        raise ConfigError(
            f"data.length={config.data.length} exceeds the model's positions, model.max_length={model.max_length}. "
            f"Set --config.data.length={model.max_length} or less, or --config.model.max_length={config.data.length}."
        )
    kinds = OBJECTIVES[objective.name].build.kinds
    if model.kind not in kinds:
        fitting = [name for name, entry in OBJECTIVES.items() if model.kind in entry.build.kinds]
        raise ConfigError(f"objective {objective.name} trains models of kind {', '.join(kinds)}, but {model.name} is {model.kind}; objectives that fit: {', '.join(fitting)}.")
    if train.batch_size % train.microbatches:
        raise ConfigError(f"train.microbatches={train.microbatches} does not divide train.batch_size={train.batch_size}.")
    if train.batch_size % streams(config):
        raise ConfigError(f"data.streams={config.data.streams} does not divide train.batch_size={train.batch_size}.")
    if config.schedule.warmup_steps >= train.steps and config.schedule.warmup_steps:
        raise ConfigError(f"schedule.warmup_steps={config.schedule.warmup_steps} leaves no step of train.steps={train.steps} after the warm-up.")
    if not config.checkpoint.metric.startswith(tuple(f"{name}/" for name in config.evals)) and config.evals and config.checkpoint.keep_best:
        raise ConfigError(f"checkpoint.metric={config.checkpoint.metric} belongs to no eval; metrics are named EVAL/METRIC with EVAL one of: {', '.join(config.evals)}.")
    fields.lookup(optim.OPTIMIZERS, config.optimizer.name, "optimizer.name")
    fields.lookup(optim.SCHEDULES, config.schedule.name, "schedule.name")
    fields.lookup(text.TOKENIZERS, config.tokenizer.kind, "tokenizer.kind")
    fields.lookup(parallel.RULES, config.mesh.preset, "mesh.preset")
    for writer in config.log.writers:
        fields.lookup(log.WRITERS, writer, "log.writers")
    if config.init != "scratch" and not config.init.startswith("ckpt:"):
        raise ConfigError(f"init={config.init!r}; allowed: scratch, ckpt:DIR[@STEP|@best|@ema].")


def resolve(config: ml_collections.ConfigDict | dict | Config) -> Config:
    """The checked Config of a ConfigDict, of its JSON, or of itself."""
    resolved = config if isinstance(config, Config) else config_lib.resolve(config, REGISTRIES)
    check(resolved)
    return resolved
