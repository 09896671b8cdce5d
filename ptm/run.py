"""`setup(config)` -> Run: everything that the entry points share, built in one place from one config.

A Run knows its tokenizer, model, objective, optimizer and where arrays lie; it holds no parameters but those of a teacher.
"""

import bisect
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm import checkpoint, compiles, evals, hosts, labels, models, mup, objectives, optim, parallel, recompute, registry, specs, text, tree, untrusted
from ptm import config as config_lib
from ptm import state as state_lib
from ptm.config import Config, ConfigDict
from ptm.data import documents, one_pass, pipeline, turns
from ptm.data.batch import SOURCE, Document
from ptm.data.loader import Loader
from ptm.data.pack import Layout as RowLayout
from ptm.data.turns import Turns
from ptm.evals import scoring
from ptm.fields import ConfigError, unparse
from ptm.generate.text import Frame, frame_of
from ptm.models import Model
from ptm.nn.context import Context
from ptm.objectives import mixture
from ptm.objectives.mixture import Part
from ptm.objectives.protocol import Objective, Task
from ptm.objectives.seq2seq import Seq2Seq

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


class Teacher(NamedTuple):
    """What a run's model learns from: its spec, the parameters that this named when the run was started, and a hash of their files."""

    spec: str
    params: Any
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its resolved config and what was built from it."""

    config: Config
    workdir: Path | None
    layout: parallel.Layout
    tokenizer: Any
    model: Model
    branches: tuple[Part, ...]  # objectives whose batches take turns; one, without name, in all runs but some mixtures
    parts: tuple[Part, ...]  # of a mixture what is evaluated on its own
    optimizer: optim.Optimizer
    abstract_params: Any  # shapes of the parameters, with their shardings
    abstract_state: state_lib.State  # the same of the whole training state
    by_length: Mapping[int, tuple[Part, ...]] = dataclasses.field(default_factory=dict)  # the branches for each length of rows, where that is scheduled
    teacher: Teacher | None = None  # of distillation, once `ptm.teacher.attach` has read it

    @property
    def objective(self) -> Objective:
        """The run's objective; of those that take turns the first one."""
        return self.branches[0].objective

    @property
    def prompt_frame(self) -> Frame:
        """What stands around a prompt that the model goes on with freely, as around the texts of its training. Raises ConfigError for one that generates nothing."""
        objective = self.objective
        if isinstance(objective, Seq2Seq):
            return objective.frame
        bounded = self.model.config.kind == "encoder_decoder" or scoring.start_token(self) is not None
        return frame_of(self.model, self.tokenizer, mask="prefix" if objective.mask == "prefix" else "causal", boundaries=bounded)

    @functools.cached_property
    def _alone(self) -> tuple["Run", ...]:
        return tuple(self._of(branch) for branch in self.branches)

    def _of(self, branch: Part) -> "Run":
        return dataclasses.replace(self, branches=(branch,), parts=())

    @functools.cached_property
    def _phases(self) -> tuple["Run", ...]:
        return tuple(self._in(phase) for phase in registry.phases(self.config))

    def _in(self, phase: registry.Phase) -> "Run":
        train, data = dataclasses.replace(self.config.train, batch_size=phase.batch_size), dataclasses.replace(self.config.data, length=phase.length)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, train=train, data=data), branches=self._branches(phase.length))

    def _branches(self, length: int) -> tuple[Part, ...]:
        return self.by_length[length] if length in self.by_length else self.branches

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The steps from which on batches or rows have another size, the first of them 0."""
        return tuple(phase.start for phase in registry.phases(self.config))

    def at(self, step: int) -> "Run":
        """The run of a step: that of its phase, of the branch whose turn it is; this one, but for schedules of sizes and mixtures whose branches take turns."""
        if len(self.starts) > 1:
            return self._phases[bisect.bisect_right(self.starts, step) - 1]
        if len(self.branches) == 1:
            return self
        return self._alone[turns.turn(step, seed=self.config.seed, weights=[branch.weight for branch in self.branches])]

    @functools.cached_property
    def evaluated(self) -> tuple[tuple[Part, "Run"], ...]:
        """The parts of a mixture with the run of each alone."""
        return tuple((part, self._of(part)) for part in self.parts)

    @property
    def separate(self) -> tuple["Run", ...]:
        """The runs of a mixture's parts, else this one: what evals of objectives measure one by one."""
        return tuple(part for _, part in self.evaluated) or (self,)

    @functools.cached_property
    def train_step(self) -> Callable[[state_lib.State, Any], tuple[state_lib.State, Any]]:
        """The compiled step (state, batch) -> (state, metrics); accelerators give up the old state's buffers."""
        step = functools.partial(
            state_lib.train_step, model=self.model, objective=self.objective, transform=self.optimizer.transform,
            learning_rate=self.optimizer.learning_rate, train=self.config.train, seed=self.config.seed, norms=self.config.log.norms,
            frozen=self.optimizer.frozen, name=self.branches[0].name,
        )  # fmt: skip
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        # Not on CPU: there XLA copies whatever of a donated buffer it reads twice, which costs more than the memory is worth.
        donated = () if self.layout.mesh.devices.flat[0].platform == "cpu" else (0,)
        return self._compiled(step, "state", shardings, out_shardings=(shardings, self.layout.replicated()), donate_argnums=donated)

    @functools.cached_property
    def eval_step(self) -> Callable[[Any, Any], Any]:
        """The compiled evaluation (params, batch) -> sums."""
        step = functools.partial(state_lib.eval_step, model=self.model, objective=self.objective)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        return self._compiled(step, "params", shardings, out_shardings=self.layout.replicated())

    @functools.cached_property
    def outputs_step(self) -> Callable[[Any, Any], Any]:
        """The compiled outputs (params, batch) -> {name: [rows, ...]} of a task, whole on every process."""
        return self.program(self.objective.outputs)

    @functools.cached_property
    def _programs(self) -> dict[Any, Callable[[Any, Any], Any]]:
        return {}

    def program(self, function: Callable[..., Any], **options: Any) -> Callable[[Any, Any], Any]:
        """`function(model, params, batch, **options)` compiled as (params, batch), its results whole on every process; the same program each time."""
        key = (function, *sorted(options.items()))
        if key not in self._programs:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
            step = functools.partial(function, self.model, **options)
            placed = {"in_shardings": (shardings, self.layout.batch()), "out_shardings": self.layout.replicated()}
            self._programs[key] = compiles.jit(step, arguments=("params", "batch"), **placed)
        return self._programs[key]

    def _compiled(self, step: Callable[..., Any], first: str, shardings: Any, **options: Any) -> Callable[[Any, Any], Any]:
        """A step of its `first` argument, which lies as `shardings` say, and a batch, compiled; the parameters of a teacher are its last argument."""
        if self.teacher is None:
            return compiles.jit(step, arguments=(first, "batch"), in_shardings=(shardings, self.layout.batch()), **options)
        taught = jax.tree.map(lambda leaf: leaf.sharding, self.teacher.params)
        compiled = compiles.jit(step, arguments=(first, "batch", "teacher"), in_shardings=(shardings, self.layout.batch(), taught), **options)
        return lambda value, batch: compiled(value, batch, self.teacher.params)

    def init_params(self) -> Any:
        """Fresh parameters, made where they lie."""
        init = functools.partial(self.model.init, lengths=lengths_of(self.branches))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        return jax.jit(init, out_shardings=shardings)(jax.random.key(self.config.seed))

    def init_state(self, params: Any) -> state_lib.State:
        """The state before the first step, from parameters."""
        make = _state_maker(self.config, self.model, self.objective, self.optimizer)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(make, out_shardings=shardings)(params)

    def to_device(self, batch: dict[str, np.ndarray], *, batch_size: int, rows: list[int]) -> dict[str, jax.Array]:
        """Global device arrays of this process's rows of a batch."""
        return parallel.to_device(batch, self.layout, batch_size=batch_size, rows=rows)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch where the step wants it."""
        rows, sources = self.config.train.batch_size, len(self.config.data.source)
        shapes = batch_shapes(self.objective, rows)
        if sources > 1:
            shapes[SOURCE] = jax.ShapeDtypeStruct((rows, self.objective.lengths["L"], sources), jnp.int8)
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.layout.batch()) for name, leaf in shapes.items()}

    def loader(self, *, rows: Sequence[int] | Callable[[int], Sequence[int]] | None = None) -> Loader | Turns:
        """The training batches, from the first: `rows` of each (or what gives them for a batch size), by default those that this process supplies."""
        seed, phases = self.config.seed, registry.phases(self.config)
        for branch in self.branches:
            if isinstance(branch.objective, Task):
                labels.check_columns(self.config.data, branch.objective.columns, objective=branch.objective.config.name)
        rows = functools.partial(parallel.local_rows, self.layout) if rows is None else rows
        loaders = {
            branch.name: Loader(
                self.config.data, featurizer=branch.objective, tokenizer=self.tokenizer, seed=turns.branch_seed(seed, branch.name),
                batch_size=phases[0].batch_size, streams=registry.streams(self.config), rows=rows,
                later=[(phase.start, phase.batch_size, self._branches(phase.length)[0].objective) for phase in phases[1:]],
            )
            for branch in self._branches(phases[0].length)
        }  # fmt: skip
        if len(loaders) == 1:
            return next(iter(loaders.values()))
        weights, positions = ([of(branch) for branch in self.branches] for of in (lambda branch: branch.weight, _positions))
        return Turns(loaders, weights=weights, positions=positions, seed=seed)

    def validation(self, batch_size: int, *, data: config_lib.Data | None = None) -> Iterator[dict[str, jax.Array]]:
        """Device batches of one pass over the validation split, by default that of the run's own data."""
        rows = parallel.local_rows(self.layout, batch_size)
        batches = pipeline.validation_batches(
            data or self.config.data, featurizer=self.objective, tokenizer=self.tokenizer, seed=self.config.seed, batch_size=batch_size, rows=rows
        )
        return (self.to_device(batch, batch_size=batch_size, rows=rows) for batch in batches)

    def records(self, data: config_lib.Data, *, limit: int | None = None) -> Iterator[one_pass.Record]:
        """The records of the validation split of some data, of each file `limit` at most."""
        return one_pass.records(data, limit=limit)

    def documents(self, data: config_lib.Data, *, limit: int | None = None) -> Iterator[Document]:
        """The same, tokenized."""
        return one_pass.documents(data, tokenizer=self.tokenizer, limit=limit)

    def evaluate(self, name: str, params: Any, *, predictions: Path | None = None) -> dict[str, float]:
        """The metrics of one of the config's evals, named NAME/METRIC; its predictions, if it makes any, are written to a file where one is given."""
        measured = evals.measure(self, name, params)
        if predictions is not None and measured.predictions is not None and jax.process_index() == 0:
            evals.write(predictions, measured.predictions)
        return measured.metrics

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what the run is made from besides its config: data, tokenizer, and its teacher if it has one."""
        taught = {} if self.teacher is None else {"teacher": self.teacher.fingerprint}
        return {"data": pipeline.fingerprint(self.config.data), "tokenizer": self.tokenizer.fingerprint, **taught}

    def forward_flops(self) -> float:
        """FLOPs of the forward pass of a training batch: matrix products and attention, rows counted as full; the mean over branches that take turns."""
        rows = (self.model.forward_flops(branch.objective.lengths, branch.objective.target_positions, heads=branch.objective.heads) for branch in self.branches)
        return _mean(rows, self.branches) * self.config.train.batch_size

    def tokens_per_step(self) -> int:
        """Positions of a batch, encoder's and decoder's, padding included; the mean over branches that take turns."""
        return round(_mean(map(_positions, self.branches), self.branches) * self.config.train.batch_size)

    def total_tokens(self) -> int:
        """The same of all steps."""
        phases = registry.phases(self.config)
        return sum(phase.steps(self.config) * (self if len(phases) == 1 else self.at(phase.start)).tokens_per_step() for phase in phases)


def _positions(branch: Part) -> int:
    """Positions of a row of a branch."""
    return sum(size for dim, size in branch.objective.lengths.items() if dim in ("L", "I"))


def _length_key(branch: Part, dim: str) -> str:
    """The config key that a length of a branch's rows comes from."""
    return "data.length" if dim == "L" else f"objective.{f'parts.{branch.name}.' if branch.name else ''}input_length"


def _mean(values: Iterable[float], branches: tuple[Part, ...]) -> float:
    return sum(value * branch.weight for value, branch in zip(values, branches)) / sum(branch.weight for branch in branches)


def batch_shapes(objective: Objective, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of an objective: those of rows of padding."""
    row = objective.finish(RowLayout(objective).padding())
    return {name: jax.ShapeDtypeStruct((rows, *value.shape), jax.dtypes.canonicalize_dtype(value.dtype)) for name, value in row.items()}


def lengths_of(branches: tuple[Part, ...]) -> dict[str, int]:
    """The dimensions of a row, of several branches those of the longest."""
    return mixture.longest([branch.objective.lengths for branch in branches])


def _state_maker(config: Config, model: Model, objective: Objective, optimizer: optim.Optimizer) -> Callable[[Any], state_lib.State]:
    carry = functools.partial(objective.init_carry, model, config.train.batch_size)
    return functools.partial(state_lib.make, transform=optimizer.transform, train=config.train, carry=carry)


def make_tokenizer(config: Config, workdir: Path | None, *, abstract: bool = False) -> Any:
    """The run's tokenizer: the workdir's if the run has started, else from `tokenizer.path` or the directory of `init`, else trained; kept in the workdir.

    An abstract run trains none: it has a stand-in of the size that was asked for.
    """
    folder = None if workdir is None else workdir / "tokenizer"
    # Without a config.json beside it the folder is of a start that was refused or cut, perhaps under another config.
    if folder is not None and folder.is_dir() and (workdir / "config.json").is_file():
        return text.load(str(folder))
    c, path = config.tokenizer, config.tokenizer.path
    directories = [spec for spec in config_lib.init_specs(config.init) if specs.is_directory(spec)]
    if path is None and directories and text.needs_files(c.kind):
        path = str(specs.fetch(directories[0]))
    if abstract and path is None and text.needs_files(c.kind):
        return text.StandIn(vocab_size=c.vocab_size, sentinels=c.sentinels)

    def make() -> Any:
        texts = None if path else documents.training_texts(config.data, limit_bytes=c.train_bytes, fields=c.train_fields)
        return text.make(
            c.kind, path=path, texts=texts, vocab_size=c.vocab_size, algorithm=c.algorithm, lowercase=c.lowercase, sentinels=c.sentinels,
            extra=c.extra,
        )  # fmt: skip

    if folder is None or abstract:
        return make()

    def keep() -> None:
        partial = folder.with_name("tokenizer.partial")
        make().save(str(partial))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)

    hosts.first(keep)
    return text.load(str(folder))


def use_compile_cache(cache: str | None) -> None:
    """Turns the persistent compile cache on in a folder (auto = the user's cache folder), or off."""
    chosen = cache != "auto"
    if not chosen:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptm", "xla")
    if chosen or jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def use_deterministic_kernels() -> None:
    """Asks XLA for them, before it opens the devices of this process. Raises ConfigError where that comes too late, or the environment says otherwise.

    Where kernels of GPUs add up in any order (scatters, attention, some products) others take their place, and none is chosen by its measured speed.
    """
    given = os.environ["XLA_FLAGS"].split() if "XLA_FLAGS" in os.environ else []
    said = [flag for flag in given if flag.partition("=")[0] == DETERMINISTIC.partition("=")[0]]
    if said and said[-1].lower() not in (DETERMINISTIC, DETERMINISTIC.partition("=")[0], DETERMINISTIC.replace("true", "1")):
        raise ConfigError(f"compute.deterministic=true, but the environment has XLA_FLAGS={said[-1]}; take that out.")
    if said:
        return
    if hosts.started():
        if jax.default_backend() == "gpu":
            raise ConfigError(f"compute.deterministic=true comes too late: this process uses its GPUs already. Start it with XLA_FLAGS={DETERMINISTIC} in the environment.")
        return
    os.environ["XLA_FLAGS"] = " ".join([*given, DETERMINISTIC])


def layout_of(config: Config, devices: list | None) -> parallel.Layout:
    """The config's layout on the devices, which can share its batches. Raises ConfigError if they cannot."""
    layout = parallel.make_layout(config.mesh, devices=devices)
    for phase in registry.phases(config):
        where = f"train.batch_schedule={unparse(config.train.batch_schedule)} at step {phase.start}: " if config.train.batch_schedule else "train.batch_size / "
        parallel.check_batch(layout, phase.batch_size // config.train.microbatches, f"{where}{'rows / ' if config.train.batch_schedule else ''}train.microbatches")
    for name, options in config.evals.items():
        parallel.check_batch(layout, options.batch_size or config.train.batch_size, f"evals.{name}.batch_size" if options.batch_size else "train.batch_size")
    return layout


def _check_turns(config: Config, branches: tuple[Part, ...]) -> None:
    """Refuses what goes by the steps of a run where loaders make their batches each for itself, in turns."""
    scheduled = {
        "data.weight_schedule": config.data.weight_schedule, "data.max_epochs": config.data.max_epochs, "data.length_schedule": config.data.length_schedule,
        "train.batch_schedule": config.train.batch_schedule,
    }  # fmt: skip
    for key, value in scheduled.items():
        if value and len(branches) > 1:
            raise ConfigError(
                f"{key}={unparse(value)} goes by the steps of a run, and the objectives {', '.join(branch.name for branch in branches)} read the sources each for itself, "
                f"in turns. Leave {key} empty, or train objectives that share batches."
            )


def setup(
    config: ConfigDict | dict | Config, *, workdir: str | os.PathLike | None = None, devices: list | None = None, abstract: bool = False
) -> Run:
    """The Run of a config; trains or reads the tokenizer, makes no array. Raises ConfigError for anything that cannot run.

    An abstract one opens no data either: what would be taken from it, the vocabulary and the names of labels, is stood in for (`labels.assumed`).
    """
    workdir = None if workdir is None else Path(workdir)
    config = labels.assumed(registry.resolve(config)) if abstract else labels.filled(registry.resolve(config), workdir)
    use_compile_cache(config.compute.cache)
    layout = layout_of(config, devices)
    tokenizer = make_tokenizer(config, workdir, abstract=abstract)
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size={given} is smaller than the tokenizer's {tokenizer.vocab_size} pieces; leave it None or make it larger.")
    model_config = dataclasses.replace(config.model, vocab_size=given or tokenizer.vocab_size)
    given = {"tokenizer": tokenizer, "length": config.data.length, "packing": config.data.packing, "model_config": model_config}
    objective = objectives.make(config.objective, **given)
    branches = mixture.branches(objective)
    _check_turns(config, branches)
    phases = registry.phases(config)
    shorter = {phase.length for phase in phases} - {config.data.length}
    by_length = {length: mixture.branches(objectives.make(config.objective, **given | {"length": length})) for length in sorted(shorter)}
    for made in (branches, *by_length.values()):
        parallel.check_lengths(layout, [(_length_key(branch, dim), size) for branch in made for dim, size in branch.objective.lengths.items() if dim in ("L", "I")])
    c = config.compute
    context = Context(
        layout=layout, dtype=jnp.dtype(c.dtype), logits=jnp.dtype(c.logits), attention=c.attention, attention_chunk=c.attention_chunk, scan_layers=c.scan_layers,
        remat=c.remat, loss_chunk=c.loss_chunk * parallel.row_parts(layout) * parallel.length_parts(layout),
    )  # fmt: skip
    heads = tuple(dict.fromkeys(head for branch in branches for head in branch.objective.heads))

    scaling = mup.make(config.mup, model_config, context=context, heads=heads, lora=config.lora, lengths=lengths_of(branches))
    context = dataclasses.replace(context, multipliers=scaling.multipliers, attention_multiplier=scaling.attention)

    def make(policy: str) -> Model:
        return models.make(model_config, context=dataclasses.replace(context, remat=policy), heads=heads, lora=config.lora, initial=scaling.initial)

    model = make("full" if c.remat == "auto" else c.remat)
    shapes = jax.eval_shape(functools.partial(model.init, lengths=lengths_of(branches)), jax.random.key(0))
    if c.remat == "auto":
        rows, parts = config.train.batch_size // config.train.microbatches, parallel.token_parts(layout)
        model = make(recompute.choose(make, [branch.objective for branch in branches], shapes, batch_shapes, rows=rows, budget=c.remat_budget, parts=parts))
    optimizer = optim.make(config.optimizer, config.schedule, steps=config.train.steps, params=shapes, lora=config.lora, rates=scaling.rates)
    state = jax.eval_shape(_state_maker(config, model, branches[0].objective, optimizer), shapes)
    layout.parameters(shapes)  # refuses dimensions that cannot be split

    def place(path: str | None, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.follow(path, leaf))

    abstract_state = optim.map_state(place, state, params=shapes)
    if "carry" in state:
        abstract_state["carry"] = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.batch()), state["carry"])
    return Run(
        config=config, workdir=workdir, layout=layout, tokenizer=tokenizer, model=model, branches=branches, parts=mixture.parts(objective), optimizer=optimizer,
        abstract_params=abstract_state["params"], abstract_state=abstract_state, by_length=by_length | ({config.data.length: branches} if by_length else {}),
    )  # fmt: skip


def read_config(workdir: Path) -> dict[str, Any]:
    """The resolved config that a run left in its workdir, with the keys that were declared since. Raises ConfigError if there is none that can be read."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} is no workdir: it has no config.json. Give the --workdir of a run that `ptm train` has started.")
    try:
        stored = dict(untrusted.read_json(path))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); a checkpoint's meta/meta.json holds the config too, under the key config.") from None
    try:
        return config_lib.complete(stored, registry.REGISTRIES)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def open_checkpoints(run: Run, folder: Path, *, read_only: bool = False) -> checkpoint.Checkpoints:
    """The checkpoints in `folder` under the config's rules."""
    c = run.config.checkpoint
    return checkpoint.Checkpoints(folder, keep_latest=c.keep_latest, keep_best=c.keep_best, metric=c.metric, mode=c.mode, read_only=read_only)


def parameter_table(run: Run) -> str:
    """Every parameter with its shape, size, dimension words, sharding, whether it is decayed, and the factor of its rate where it depends on the width."""
    flat = tree.paths(run.abstract_params)
    columns = {
        "axes": {path: " ".join(parallel.axes_words(path)) for path in flat},
        "sharding": {path: str(tuple(leaf.sharding.spec)) for path, leaf in flat.items()},
        "decay": {path: "frozen" if run.optimizer.frozen[path] else "yes" if run.optimizer.decayed[path] else "no" for path in flat},
    }
    if run.optimizer.rates:
        columns["rate"] = {path: f"x {run.optimizer.rates[path]:.4g}" if path in run.optimizer.rates else "x 1" for path in flat}
    return tree.table(run.abstract_params, columns=columns)
