"""All families, objectives and evals by name, and the checks of a whole config: what the command line needs before anything heavy is loaded."""

import math
from typing import Any, NamedTuple

from ptm import config as config_lib
from ptm import fields, log, optim, parallel, text
from ptm.config import Config, ConfigDict
from ptm.evals import EVALS
from ptm.fields import ConfigError
from ptm.models import MODELS, encoder_decoder
from ptm.objectives import OBJECTIVES, distillation, mixture

REGISTRIES = {
    "model": {name: family.config for name, family in MODELS.items()},
    "objective": {name: entry.config for name, entry in OBJECTIVES.items()},
    "eval": {name: module.Config for name, module in EVALS.items()},
}


class Phase(NamedTuple):
    """Steps from `start` on that have batches of one size and rows of one length (of the decoder, for encoder-decoders)."""

    start: int
    batch_size: int
    length: int

    def steps(self, config: Config) -> int:
        """Its steps in a run of train.steps."""
        steps = config.train.steps
        end = min((phase.start for phase in phases(config) if phase.start > self.start), default=steps)
        return max(0, min(end, steps) - self.start)


def phases(config: Config) -> tuple[Phase, ...]:
    """The phases of a run, one where nothing is scheduled. The last length and the largest batch size are those of train.batch_size and data.length."""
    rows = config_lib.size_points(config.train.batch_schedule, key="train.batch_schedule") or ((0, config.train.batch_size),)
    lengths = config_lib.size_points(config.data.length_schedule, key="data.length_schedule") or ((0, config.data.length),)

    def at(points: tuple[tuple[int, int], ...], step: int) -> int:
        return max(point for point in points if point[0] <= step)[1]

    return tuple(Phase(start, at(rows, start), at(lengths, start)) for start in sorted({start for start, _ in (*rows, *lengths)}))


def streams(config: Config) -> int:
    """Logical streams of a run: as configured, or with memory one a row, or the greatest common divisor of its batch sizes and 64."""
    return config.data.streams or (config.train.batch_size if _remembers(config.objective) else math.gcd(64, *(phase.batch_size for phase in phases(config))))


def _remembers(objective: Any) -> bool:
    """Whether rows of an objective see those of the batch before."""
    return hasattr(objective, "memory_length") and objective.memory_length > 0


def check(config: Config) -> None:
    """Refuses combinations that no section can see alone; needs no data and compiles nothing. Raises ConfigError."""
    model, objective, train = config.model, config.objective, config.train
    if isinstance(model, config_lib.ModelOfInit):
        raise ConfigError("this recipe takes its model from init: set --config.init=ckpt:DIR, hf:DIR or hub:ORG/NAME, or scratch:SPEC for that model with fresh parameters.")
    paired = model.kind == "encoder_decoder"
    for part in objective.parts.values() if isinstance(objective, mixture.Config) else (objective,):
        kinds = OBJECTIVES[part.name].build.kinds
        if model.kind not in kinds:
            fitting = [name for name, entry in OBJECTIVES.items() if model.kind in entry.build.kinds]
            raise ConfigError(
                f"objective {part.name} trains models of kind {', '.join(kinds)}, but model {model.name} is of kind {model.kind}. "
                f"Objectives that fit it: {', '.join(fitting)}; choose one in the recipe."
            )
        missing = [head for head in part.heads if head not in model.heads] if hasattr(part, "heads") else []
        if missing:
            fitting = [name for name, family in MODELS.items() if set(part.heads) <= set(family.config.heads) and family.config.kind in kinds]
            raise ConfigError(
                f"objective {part.name} needs the heads {', '.join(part.heads)}, but model {model.name} has no {', '.join(missing)}. "
                f"Models that fit it: {', '.join(fitting)}; choose one in the recipe."
            )
        for phase in phases(config):
            part.lengths(phase.length)
            if hasattr(part, "raw_length"):
                part.raw_length(phase.length, paired=paired)  # refuses lengths that no text fits
        if _remembers(part) and part is not objective:
            given = f"a part of objective {objective.name} has memory_length={part.memory_length}"
            raise ConfigError(f"{given}, but parts have no memory, since their rows do not go on from batch to batch; set it to 0.")
    lengths = objective.lengths(config.data.length)
    if model.max_length is not None and max(lengths["L"], lengths["I"] if paired else 0) > model.max_length:
        raise ConfigError(
            f"data.length={config.data.length} exceeds the model's positions, model.max_length={model.max_length}. "
            f"Set --config.data.length={model.max_length} or less, or --config.model.max_length={config.data.length} or more."
        )
    for key, given in (("train.batch_schedule", train.batch_schedule), ("data.length_schedule", config.data.length_schedule)):
        if given and _remembers(objective):
            raise ConfigError(
                f"{key}={fields.unparse(given)} with objective.memory_length={objective.memory_length}, whose rows go on from batch to batch; leave one of them out."
            )
    for key, parts in (("train.microbatches", train.microbatches), ("data.streams", streams(config))):
        sizes = [phase.batch_size for phase in phases(config)]
        if odd := [size for size in sizes if size % parts]:
            given = f"{odd[0]} rows, train.batch_schedule={fields.unparse(train.batch_schedule)}" if train.batch_schedule else f"train.batch_size={train.batch_size}"
            raise ConfigError(f"{key}={parts} does not divide {given}; allowed: {', '.join(map(str, fields.divisors(math.gcd(*sizes))))}.")
    if _remembers(objective) and streams(config) != train.batch_size:
        raise ConfigError(
            f"data.streams={config.data.streams}, but with objective.memory_length={objective.memory_length} each row of a batch goes on where it ended in the "
            f"batch before: set --config.data.streams={train.batch_size}, the same as train.batch_size, or None."
        )
    if _remembers(objective) and config.data.packing not in ("default", "concat"):
        raise ConfigError(f"data.packing={config.data.packing} breaks documents off, which objective.memory_length > 0 continues; allowed: default, concat.")
    warmup = config.schedule.warmup_steps
    if warmup and warmup >= train.steps:
        raise ConfigError(
            f"schedule.warmup_steps={warmup} leaves no step of train.steps={train.steps} after the warm-up; allowed: 0 to {train.steps - 1}. "
            f"Lower --config.schedule.warmup_steps or raise --config.train.steps."
        )
    if config.log.profile and config.log.profile[0] >= train.steps:
        given = f"log.profile={fields.unparse(config.log.profile)}"
        raise ConfigError(f"{given} begins after the last step of train.steps={train.steps}; allowed: steps from 0 to {train.steps - 1}.")
    metric = config.checkpoint.metric
    if config.evals and config.checkpoint.keep_best and not metric.startswith(tuple(f"{name}/" for name in config.evals)):
        hint = fields.nearest(metric.partition("/")[0], config.evals)
        raise ConfigError(
            f"checkpoint.metric={metric} belongs to no eval; metrics are named EVAL/METRIC with EVAL one of: {', '.join(config.evals)}.{hint} "
            f"--config.checkpoint.keep_best=0 compares none."
        )
    _check_mup(config)
    fields.lookup(optim.OPTIMIZERS, config.optimizer.name, "optimizer.name")
    fields.lookup(optim.SCHEDULES, config.schedule.name, "schedule.name")
    fields.lookup(text.TOKENIZERS, config.tokenizer.kind, "tokenizer.kind")
    fields.lookup(parallel.RULES, config.mesh.preset, "mesh.preset")
    for writer in config.log.writers:
        fields.lookup(log.WRITERS, writer, "log.writers")
    given = config_lib.init_specs(config.init)
    if len(given) > 1 and (not isinstance(model, encoder_decoder.Config) or len(given) > 2 or model.share):
        fits = "a model encoder_decoder without model.share has two sides, encoder and decoder"
        raise ConfigError(f"init={config.init} names {len(given)} models, but {fits}, and this is {model.name}; name one.")
    if any(spec != "scratch" and not spec.startswith(("ckpt:", "hf:", "hub:")) for spec in given):
        allowed = "scratch, ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR, hub:ORG/NAME[@REVISION]"
        raise ConfigError(f"init={config.init}; allowed: {allowed}.{fields.nearest(config.init, ('scratch',))}")


def _check_mup(config: Config) -> None:
    """Refuses what the maximal update parametrisation is not defined for here."""
    if config.mup.base_width is None:
        return
    given = f"mup.base_width={config.mup.base_width}"
    if not hasattr(config.model, "init_std"):
        fitting = [name for name, family in MODELS.items() if "init_std" in fields.annotations(family.config)]
        raise ConfigError(
            f"{given} scales initial values that are drawn alike at all widths, and model {config.model.name} has none such; models that fit: {', '.join(fitting)}."
        )
    if config.optimizer.name not in optim.ADAM_LIKE:
        allowed = ", ".join(optim.ADAM_LIKE)
        raise ConfigError(f"{given} with optimizer.name={config.optimizer.name}, whose rates depend on the width in another way; allowed: {allowed}.")
    if isinstance(config.objective, distillation.Config):
        raise ConfigError(f"{given} with objective {config.objective.name}: teacher and student would share multipliers; leave mup.base_width None.")
    if any(spec.startswith(("hf:", "hub:")) for spec in config_lib.init_specs(config.init)):
        raise ConfigError(
            f"{given} with init={config.init}: such models are of the standard parametrisation; leave mup.base_width None, or start from scratch or ckpt:DIR."
        )


def resolve(config: ConfigDict | dict | Config) -> Config:
    """The checked Config of a ConfigDict, of its JSON, or of itself. Raises ConfigError."""
    resolved = config_lib.resolve(config_lib.to_dict(config) if isinstance(config, Config) else config, REGISTRIES)
    check(resolved)
    return resolved
