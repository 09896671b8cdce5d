"""The teacher of a distillation: read from its spec, placed as the student's parameters are, and given to the run."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ptm import config as config_lib
from ptm import hf, lora, models, registry, specs, tree, untrusted, weights
from ptm import run as run_lib
from ptm.fields import ConfigError
from ptm.hf import files
from ptm.models import Model
from ptm.nn.heads import COMMON_HEADS
from ptm.objectives import distillation
from ptm.run import Run, Teacher
from ptm.saved import MANIFEST


def require(config: config_lib.Config) -> None:
    """Raises ConfigError if the config names a teacher that is not there."""
    if isinstance(config.objective, distillation.Config):
        spec = config.objective.teacher
        try:
            specs.require(spec)
        except ConfigError as error:
            raise ConfigError(
                f"objective.teacher={spec}: {error} A distilled model is trained and evaluated beside its teacher: put it back, or go on without it "
                f"in a new workdir, with --config.init=ckpt:WORKDIR and a recipe of the student's own objective, {', '.join(config.objective.parts)}."
            ) from None


def attach(this: Run) -> Run:
    """The run with its teacher, if its objective has one, else itself.

    Raises ConfigError if the teacher is not there, or if it cannot read what the student reads: same kind, tokenizer (of a directory, the
    same pieces and as many at least), length and head.
    """
    if not isinstance(this.config.objective, distillation.Config):
        return this
    require(this.config)
    spec = this.config.objective.teacher
    head = this.objective.heads[0]
    # A teacher is placed, and where it is a checkpoint held to the student's tokenizer, as if it were the run's own model.
    if specs.is_directory(spec):
        folder = specs.fetch(spec)
        imported = hf.read(folder)
        model, as_run = _placed(this, imported.config, head)
        params, fresh = weights.of_directory(imported, as_run)
        if fresh:
            raise ConfigError(f"objective.teacher={spec} has no head '{head}', which the student learns from; it has: {', '.join(imported.heads) or 'none'}.")
        weights.check_pieces(spec, folder, this.tokenizer)
        fingerprint = _hash_of([folder / files.CONFIG, *sorted({tensor.file for tensor in files.read(folder).tensors.values()})])
    else:
        workdir = specs.parse_spec(spec).folder.parent
        made = registry.resolve(run_lib.read_config(workdir))
        if made.mup.base_width is not None:
            raise ConfigError(f"objective.teacher={spec} was trained with mup.base_width={made.mup.base_width}; teachers are of the standard parametrisation.")
        config = made.model
        model, as_run = _placed(this, dataclasses.replace(config, vocab_size=config.vocab_size or this.tokenizer.vocab_size), head)
        params, _ = weights.read(spec, as_run)
        fingerprint = _saved(spec)
    taught = dataclasses.replace(this.model, teacher=model)
    return dataclasses.replace(this, model=taught, teacher=Teacher(spec, params, fingerprint))


def start(this: Run) -> tuple[Any, str]:
    """First parameters and a line about them, as `ptm.weights.start`; where the objective asks for it, they are the teacher's.

    Of M layers the student's N take every (M / N)-th, the first one included (Sanh et al. 2019, section 2, and published code).
    """
    options = this.config.objective
    if this.teacher is None or not options.init_layers or this.config.init != "scratch":
        return weights.start(this)
    given = tree.paths(this.teacher.params)

    def take(path: str, like: Any) -> jax.Array:
        stacked = tree.stacked(path)
        if path not in given or given[path].shape[stacked:] != like.shape[stacked:] or stacked and len(given[path]) < like.shape[0]:
            raise ConfigError(
                f"objective.init_layers=true needs a teacher of the student's shape, with as many layers at least, but {path} differs. "
                "Change the model, or set --config.objective.init_layers=false."
            )
        leaf = given[path][jnp.arange(like.shape[0]) * len(given[path]) // like.shape[0]] if stacked else given[path]
        return jax.device_put(leaf, like.sharding)

    own = {name: leaves for name, leaves in this.abstract_params.items() if name not in (*COMMON_HEADS, lora.KEY)}
    return {**this.init_params(), **tree.map_paths(take, own)}, f"Parameters from {this.teacher.spec}, layers evenly chosen."


def _placed(this: Run, config: Any, head: str) -> tuple[Model, Run]:
    """A teacher's model and a run whose parameters are the teacher's, under the student's layout and tokenizer."""
    student, spec = this.model.config, this.config.objective.teacher
    if config.kind != student.kind:
        raise ConfigError(f"objective.teacher={spec} is of kind {config.kind}, the student of kind {student.kind}; they must be equal.")
    if config.vocab_size < this.tokenizer.vocab_size:
        sizes = f"knows {config.vocab_size} pieces, the tokenizer has {this.tokenizer.vocab_size}"
        raise ConfigError(f"objective.teacher={spec} {sizes}; teacher and student must share the tokenizer.")
    longest = max(size for branch in this.branches for dim, size in branch.objective.lengths.items() if dim in ("L", "I"))
    if config.max_length is not None and longest > config.max_length:
        raise ConfigError(f"objective.teacher={spec} has {config.max_length} positions, rows have {longest}; lower --config.data.length.")
    model = models.make(config, context=this.model.module.context, heads=(head,))
    shapes = jax.eval_shape(functools.partial(model.init, lengths=run_lib.lengths_of(this.branches)), jax.random.key(0))
    placed = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, this.layout.parameters(shapes))
    return model, dataclasses.replace(this, model=model, abstract_params=placed)


def _saved(spec: str) -> str:
    """Hash of the saved states that a spec of a checkpoint names, from their manifests."""
    checkpoints, steps, which = specs.open_spec(spec)
    with checkpoints:
        manifests = [untrusted.read_json(checkpoints.folder / str(step) / MANIFEST)["files"] for step in steps]
    states = [{name: entry for name, entry in manifest.items() if name.startswith("state/")} for manifest in manifests]
    return hashlib.sha256(json.dumps([which, states], sort_keys=True).encode()).hexdigest()


def _hash_of(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
