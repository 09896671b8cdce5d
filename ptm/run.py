"""`setup(config)` -> Run: everything that the entry points share, built in one place from one config.

A Run knows its tokenizer, model, objective, optimizer and where arrays lie; it holds no parameters. `load` reads a run back from a
checkpoint, with its parameters.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm import checkpoint, models, optim, parallel, registry, text, tree
from ptm import state as state_lib
from ptm.config import Config, ConfigDict
from ptm.data import documents, pipeline
from ptm.data.loader import Loader
from ptm.evals import EVALS
from ptm.fields import ConfigError
from ptm.models import Model
from ptm.nn.context import Context
from ptm.objectives import OBJECTIVES
from ptm.objectives.protocol import Objective


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its resolved config and what was built from it."""

    config: Config
    workdir: Path | None
    layout: parallel.Layout
    tokenizer: Any
    model: Model
    objective: Objective
    optimizer: optim.Optimizer
    abstract_params: Any  # shapes of the parameters, with their shardings
    abstract_state: state_lib.State  # the same of the whole training state

    @functools.cached_property
    def train_step(self) -> Callable[[state_lib.State, Any], tuple[state_lib.State, Any]]:
        """The compiled step (state, batch) -> (state, metrics); accelerators give up the old state's buffers."""
        step = functools.partial(
            state_lib.train_step, model=self.model, objective=self.objective, transform=self.optimizer.transform,
            learning_rate=self.optimizer.learning_rate, train=self.config.train, seed=self.config.seed, norms=self.config.log.norms,
        )  # fmt: skip
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        # Not on CPU: there XLA copies whatever of a donated buffer it reads twice, which costs more than the memory is worth.
        donated = () if self.layout.mesh.devices.flat[0].platform == "cpu" else (0,)
        return jax.jit(step, in_shardings=(shardings, self.layout.batch()), out_shardings=(shardings, self.layout.replicated()), donate_argnums=donated)

    @functools.cached_property
    def eval_step(self) -> Callable[[Any, Any], Any]:
        """The compiled evaluation (params, batch) -> sums."""
        step = functools.partial(state_lib.eval_step, model=self.model, objective=self.objective)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        return jax.jit(step, in_shardings=(shardings, self.layout.batch()), out_shardings=self.layout.replicated())

    def init_params(self) -> Any:
        """Fresh parameters, made where they lie."""
        init = functools.partial(self.model.init, lengths=self.objective.lengths)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        return jax.jit(init, out_shardings=shardings)(jax.random.key(self.config.seed))

    def init_state(self, params: Any) -> state_lib.State:
        """The state before the first step, from parameters."""
        make = functools.partial(state_lib.make, transform=self.optimizer.transform, train=self.config.train)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(make, out_shardings=shardings)(params)

    def to_device(self, batch: dict[str, np.ndarray], *, batch_size: int, rows: list[int]) -> dict[str, jax.Array]:
        """Global device arrays of this process's rows of a batch."""
        return parallel.to_device(batch, self.layout, batch_size=batch_size, rows=rows)

    def loader(self, *, rows: Sequence[int] | None = None) -> Loader:
        """The training batches, from the first: `rows` of each, by default those that this process supplies."""
        train = self.config.train
        return Loader(
            self.config.data, featurizer=self.objective, tokenizer=self.tokenizer, seed=self.config.seed, batch_size=train.batch_size,
            streams=registry.streams(self.config), rows=parallel.local_rows(self.layout, train.batch_size) if rows is None else rows,
        )  # fmt: skip

    def validation(self, batch_size: int) -> Iterator[dict[str, jax.Array]]:
        """Device batches of one pass over the validation split."""
        rows = parallel.local_rows(self.layout, batch_size)
        batches = pipeline.validation_batches(
            self.config.data, featurizer=self.objective, tokenizer=self.tokenizer, seed=self.config.seed, batch_size=batch_size, rows=rows
        )
        return (self.to_device(batch, batch_size=batch_size, rows=rows) for batch in batches)

    def evaluate(self, name: str, params: Any) -> dict[str, float]:
        """The metrics of one of the config's evals, named NAME/METRIC."""
        options = self.config.evals[name]
        batches = self.validation(options.batch_size or self.config.train.batch_size)
        if options.batches is not None:
            batches = (batch for _, batch in zip(range(options.batches), batches))
        result = EVALS[options.name].evaluate(batches, params=params, eval_step=self.eval_step, coefficients=self.objective.coefficients)
        return {f"{name}/{metric}": value for metric, value in result.items()}

    def forward_flops(self) -> float:
        """FLOPs of the forward pass of a training batch: matrix products and attention, rows counted as full."""
        row = self.model.config.forward_flops(self.objective.lengths, self.objective.target_positions)
        return row * self.config.train.batch_size

    def tokens_per_step(self) -> int:
        """Positions of a batch, encoder's and decoder's, padding included."""
        return self.config.train.batch_size * sum(self.objective.lengths[name] for name in ("L", "I") if name in self.objective.lengths)


def make_tokenizer(config: Config, workdir: Path | None) -> Any:
    """The run's tokenizer: the workdir's if the run has started, else from `tokenizer.path`, else trained on the training split; kept in the workdir."""
    folder = None if workdir is None else workdir / "tokenizer"
    # Without a config.json beside it the folder is of a start that was refused or cut, perhaps under another config.
    if folder is not None and folder.is_dir() and (workdir / "config.json").is_file():
        return text.load(str(folder))
    c = config.tokenizer
    texts = None if c.path else documents.training_texts(config.data, limit_bytes=c.train_bytes)
    tokenizer = text.make(
        c.kind, path=c.path, texts=texts, vocab_size=c.vocab_size, algorithm=c.algorithm, lowercase=c.lowercase, sentinels=c.sentinels
    )
    if folder is not None and jax.process_index() == 0:
        partial = folder.with_name("tokenizer.partial")
        tokenizer.save(str(partial))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    return tokenizer


def use_compile_cache(cache: str | None) -> None:
    """Turns the persistent compile cache on in a folder (auto = the user's cache folder), or off."""
    chosen = cache != "auto"
    if not chosen:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptm", "xla")
    if chosen or jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _layout(config: Config, devices: list | None) -> parallel.Layout:
    """The config's layout on the devices, which can share its batches. Raises ConfigError if they cannot."""
    layout = parallel.make_layout(config.mesh, devices=devices)
    parallel.check_batch(layout, config.train.batch_size // config.train.microbatches, "train.batch_size / train.microbatches")
    for name, options in config.evals.items():
        parallel.check_batch(layout, options.batch_size or config.train.batch_size, f"evals.{name}.batch_size" if options.batch_size else "train.batch_size")
    return layout


def setup(config: ConfigDict | dict | Config, *, workdir: str | os.PathLike | None = None, devices: list | None = None) -> Run:
    """The Run of a config; trains or reads the tokenizer, makes no array. Raises ConfigError for anything that cannot run."""
    config = registry.resolve(config)
    workdir = None if workdir is None else Path(workdir)
    use_compile_cache(config.compute.cache)
    layout = _layout(config, devices)
    tokenizer = make_tokenizer(config, workdir)
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size={given} is smaller than the tokenizer's {tokenizer.vocab_size} pieces; leave it None or make it larger.")
    model_config = dataclasses.replace(config.model, vocab_size=given or tokenizer.vocab_size)
    build = OBJECTIVES[config.objective.name].build
    objective = build(config.objective, tokenizer=tokenizer, length=config.data.length, packing=config.data.packing, model_config=model_config)
    c = config.compute
    context = Context(
        layout=layout, dtype=jnp.dtype(c.dtype), attention=c.attention, attention_chunk=c.attention_chunk, scan_layers=c.scan_layers,
        remat=c.remat, loss_chunk=c.loss_chunk,
    )  # fmt: skip
    model = models.make(model_config, context=context, heads=objective.heads)
    shapes = jax.eval_shape(functools.partial(model.init, lengths=objective.lengths), jax.random.key(0))
    optimizer = optim.make(config.optimizer, config.schedule, steps=config.train.steps, params=shapes)
    state = jax.eval_shape(functools.partial(state_lib.make, transform=optimizer.transform, train=config.train), shapes)
    layout.parameters(shapes)  # refuses dimensions that cannot be split

    def place(path: str | None, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.follow(path, leaf))

    abstract_state = optim.map_state(place, state, params=shapes)
    return Run(
        config=config, workdir=workdir, layout=layout, tokenizer=tokenizer, model=model, objective=objective, optimizer=optimizer,
        abstract_params=abstract_state["params"], abstract_state=abstract_state,
    )  # fmt: skip


def read_config(workdir: Path) -> dict[str, Any]:
    """The resolved config that a run left in its workdir. Raises ConfigError if there is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} is no workdir: it has no config.json. Give the --workdir of a run that `ptm train` has started.")
    return json.loads(path.read_text(encoding="utf-8"))


def load(spec: str, *, devices: list | None = None) -> tuple[Run, Any]:
    """(run, parameters) of `ckpt:DIR[@STEP|@best|@ema|@avgN]`, ready to evaluate or predict.

    Raises ConfigError if there is no such checkpoint, or if it was made with another tokenizer than the workdir's.
    """
    run = reopen(spec, devices=devices)
    return run, load_params(spec, run)[0]


def reopen(spec: str, *, devices: list | None = None) -> Run:
    """The Run whose checkpoint `ckpt:DIR[@...]` names, from the config in its workdir."""
    workdir = checkpoint.parse_spec(spec).folder.parent
    config = registry.resolve(read_config(workdir))
    devices = jax.devices() if devices is None else devices
    try:
        _layout(config, devices)
    except ConfigError:
        # Made on another number of devices: one of these reads it.
        devices, config = devices[:1], dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, sequence=1))
    if config.compute.attention == "cudnn" and devices[0].platform != "gpu":
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="auto"))
    return setup(config, workdir=workdir, devices=devices)


def load_params(spec: str, run: Run) -> tuple[Any, int]:
    """(parameters, newest step) of `ckpt:DIR[@STEP|@best|@ema|@avgN]`, placed as `run` places them. Raises ConfigError if they do not fit it."""
    checkpoints, steps, which = checkpoint.open_spec(spec)
    with checkpoints:
        made_with = checkpoints.meta(steps[0])["tokenizer"]
        if made_with != run.tokenizer.fingerprint:
            raise ConfigError(
                f"{spec} was made with another tokenizer (fingerprint {made_with[:12]}) than this run's ({run.tokenizer.fingerprint[:12]}). "
                f"Set --config.tokenizer.path={checkpoints.folder.parent / 'tokenizer'}."
            )
        if len(steps) > 1:
            return checkpoints.average(steps, run.abstract_params, which=which), steps[0]
        return checkpoints.restore_params(steps[0], run.abstract_params, which=which), steps[0]


def open_checkpoints(run: Run, folder: Path, *, read_only: bool = False) -> checkpoint.Checkpoints:
    """The checkpoints in `folder` under the config's rules."""
    c = run.config.checkpoint
    return checkpoint.Checkpoints(folder, keep_latest=c.keep_latest, keep_best=c.keep_best, metric=c.metric, mode=c.mode, read_only=read_only)


def parameter_table(run: Run) -> str:
    """Every parameter with its shape, size, dimension words, sharding and whether it is decayed."""
    flat = tree.paths(run.abstract_params)
    columns = {
        "axes": {path: " ".join(parallel.axes_words(path)) for path in flat},
        "sharding": {path: str(tuple(leaf.sharding.spec)) for path, leaf in flat.items()},
        "decay": {path: "frozen" if run.optimizer.frozen[path] else "yes" if run.optimizer.decayed[path] else "no" for path in flat},
    }
    return tree.table(run.abstract_params, columns=columns)
