"""Parameters from where a spec says that they are, placed as a run places them, and the run of a spec itself."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm import config as config_lib
from ptm import growth, hf, hosts, lora, models, registry, run, specs, text, tree
from ptm.checkpoint import Checkpoints
from ptm.fields import ConfigError, unparse
from ptm.hf import vocabulary
from ptm.hf.tables import Key
from ptm.models import encoder_decoder
from ptm.nn.heads import HEAD_PARAMS
from ptm.run import Run


def load(spec: str, *, devices: list | None = None) -> tuple[Run, Any]:
    """(run, parameters) of a spec, ready to evaluate or predict.

    Raises ConfigError if there is no such checkpoint or directory, if it cannot be read, or if a checkpoint was made with another
    tokenizer than its workdir's.
    """
    if specs.is_directory(spec):
        folder = specs.fetch(spec)
        imported = hf.read(folder)
        this = run.setup(specs.config_of(imported, tokenizer=folder), devices=devices)
        return this, of_directory(imported, this)[0]
    this = reopen(spec, devices=devices)
    return this, read(spec, this)[0]


def reopen(spec: str, *, devices: list | None = None) -> Run:
    """The Run whose checkpoint `ckpt:DIR[@...]` names, from the config in its workdir; not to train, so that there are no low-rank factors any more."""
    workdir = specs.parse_spec(spec).folder.parent
    config = dataclasses.replace(registry.resolve(run.read_config(workdir)), lora=config_lib.Lora())
    if config.compute.deterministic and not hosts.started():
        run.use_deterministic_kernels()
    devices = jax.devices() if devices is None else devices
    try:
        run.layout_of(config, devices)
    except ConfigError:
        if jax.process_count() > 1:
            raise  # each of them must have a part in it
        # Made on another number of devices: one of these reads it.
        devices, config = devices[:1], dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, sequence=1))
    if config.compute.attention == "cudnn" and devices[0].platform != "gpu":
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="auto"))
    return run.setup(config, workdir=workdir, devices=devices)


def read(spec: str, this: Run) -> tuple[Any, int]:
    """(parameters, newest step) of `ckpt:DIR[@STEP|@best|@ema|@avgN]` for the run that made it, as `reopen` gives it.

    Heads that it does not use are left out, low-rank factors are merged.
    """
    params, step, *_ = _from_checkpoint(spec, this, strict=True)
    return params, step


def read_all(spec: str, this: Run) -> Any:
    """All parameters of a checkpoint, heads that its run does not use among them, on the first device; low-rank factors are merged."""
    checkpoints, steps, which = specs.open_spec(spec)
    with checkpoints:
        structure = checkpoints.structure(steps[0])
        wanted = structure[which] if which in structure else this.abstract_params  # else the error of reading says what is there
        return _restored(checkpoints, steps, {name: part for name, part in wanted.items() if name != lora.KEY}, which, None)


def _restored(checkpoints: Checkpoints, steps: list[int], wanted: dict[str, Any], which: str, sharding: Any) -> dict[str, Any]:
    """The parameters `wanted` of a step, or the mean of several; low-rank factors, read to `sharding`, are merged into their kernels first."""
    saved = checkpoints.structure(steps[0])
    if which not in saved or lora.KEY not in saved[which]:
        options = {"which": which, "subset": True}
        return checkpoints.average(steps, wanted, **options) if len(steps) > 1 else checkpoints.restore_params(steps[0], wanted, **options)
    made_with = checkpoints.meta(steps[0])["config"]["lora"]
    options = config_lib.Lora(rank=made_with["rank"], alpha=made_with["alpha"])
    factors = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), saved[which][lora.KEY])
    add = jax.jit(
        lambda total, more: jax.tree.map(lambda a, b: a + b / len(steps), total, lora.merge(more, options)),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted),
    )
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted)
    for step in steps:
        total = add(total, checkpoints.restore_params(step, {**wanted, lora.KEY: factors}, which=which, subset=True))
    return total


def start(this: Run) -> tuple[Any, str]:
    """What a run's `init` names, as its first parameters, and a line that says what was done.

    The body must be complete; a head that is not there, or has another shape there, is initialised afresh. Where the run's tokenizer extends the
    one of the checkpoint or directory, the tables of pieces grow.
    """
    spec = this.config.init
    if spec == "scratch":
        return this.init_params(), ""
    if isinstance(this.config.model, encoder_decoder.Config) and _family_of(spec) != this.config.model.name:
        return _start_sides(this)
    params, told, fresh = _found(spec, this)
    made = f" Not there, so initialised afresh: {', '.join(fresh)}." if fresh else ""
    return _with_fresh(params, this), " ".join([f"{told[0]}.{made}", *told[1:]])


def _found(spec: str, this: Run) -> tuple[Any, list[str], list[str]]:
    """What a spec has of a run's parameters, what to say of it, and the heads that it has not."""
    if specs.is_directory(spec):
        imported = _directory(spec, this)
        params, fresh = _of_body(imported, this)
        return params, [f"Parameters from {spec}", *imported.notes, *_resized(fresh, imported.params, this)], fresh
    _same_scaling(spec, this)
    params, step, fresh, notes = _from_checkpoint(spec, this, strict=False)
    return params, [f"Parameters of step {step} from {spec}", *notes], fresh


def _same_scaling(spec: str, this: Run) -> None:
    """Refuses parameters of a checkpoint that are of another parametrisation than the run's, with which they would compute something else."""
    theirs, ours = run.read_config(specs.parse_spec(spec).folder.parent)["mup"], config_lib.to_dict(this.config.mup)
    if theirs != ours:
        wanted = " ".join(f"--config.mup.{key}={unparse(value)}" for key, value in theirs.items() if value != ours[key])
        raise ConfigError(f"{spec} was trained under another parametrisation; set {wanted}.")


def _family_of(spec: str) -> str:
    """The family of the model that a spec names."""
    if len(config_lib.init_specs(spec)) > 1:
        return ""
    if specs.is_directory(spec):
        return hf.read(specs.fetch(spec)).config.name
    return run.read_config(specs.parse_spec(spec).folder.parent)["model"]["name"]


def _start_sides(this: Run) -> tuple[Any, str]:
    """First parameters of an encoder-decoder whose sides come from models of their own (Rothe et al. 2020, section 3): cross-attention is new."""
    options, given = this.config.model, config_lib.init_specs(this.config.init)
    chosen = {"decoder": given[-1]} if options.share else {"encoder": given[0], "decoder": given[-1]}
    params: dict[str, Any] = {}
    told = []
    for side, spec in chosen.items():
        if spec == "scratch":
            continue
        config = this.model.config.side(side)
        own = {path: leaf for path, leaf in tree.paths(this.abstract_params[side]).items() if "cross_attention" not in path}
        # A side is read as if it were the run's own model.
        model = models.make(config, context=this.model.module.context, heads=("lm",) if "lm" in config.heads else ("mlm",))
        part = dataclasses.replace(this, model=model, abstract_params=tree.unflatten(own))
        try:
            params[side], lines, _ = _found(spec, part)
        except ConfigError as error:
            raise ConfigError(f"init: {spec}, of which the {side} is to be made: {error}") from None
        told += [f"The {'encoder and the decoder' if options.share else side}: {lines[0][0].lower()}{lines[0][1:]}.", *lines[1:]]
    there = tree.paths(params)
    missing = dict.fromkeys(tree.group(path) for path in tree.paths(this.abstract_params) if path not in there and not path.startswith(lora.KEY + "/"))
    return _with_fresh(params, this), " ".join([*told, f"Not there, so initialised afresh: {', '.join(missing)}."])


def _head_of(path: str) -> str | None:
    name = path.partition("/")[0]
    return name if name in HEAD_PARAMS else None


def _resized(fresh: list[str], given: Any, this: Run) -> list[str]:
    """What to tell of heads that begin afresh because what was given has them with another number of outputs."""
    have, wanted = ({path: leaf.shape for path, leaf in tree.paths(params).items()} for params in (given, this.abstract_params))
    outputs = {_head_of(path): (have[path][-1], wanted[path][-1]) for path in wanted if path in have and have[path][-1:] != wanted[path][-1:]}
    return [f"{head} has {outputs[head][0]} outputs there, {outputs[head][1]} here." for head in fresh if head in outputs]


def _wanted(this: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a run by path, but for low-rank factors: these begin with the run."""
    return {path: leaf for path, leaf in tree.paths(this.abstract_params).items() if not path.startswith(lora.KEY + "/")}


def _compare(have: dict[str, tuple[int, ...]], this: Run, what: str, *, strict: bool) -> list[str]:
    """Heads that are missing or of another shape; heads alone may be too many. Raises ConfigError listing all else that differs."""
    wanted = {path: leaf.shape for path, leaf in _wanted(this).items()}
    lacking = {_head_of(path) for path in wanted if path not in have or have[path] != wanted[path]} - {None}
    fresh = [] if strict else sorted(lacking)

    def kept(paths: dict[str, Any]) -> dict[str, Any]:
        return tree.unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in paths.items() if _head_of(path) not in fresh})

    lines = tree.diff(kept(wanted), kept({path: shape for path, shape in have.items() if path in wanted or _head_of(path) is None})).splitlines()
    if lines:
        more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        listed = "\n".join([*lines[:20], *more])
        raise ConfigError(f"{what} does not fit (expected: this run, got: what is there):\n{listed}\nUse the config that it was made with.")
    return fresh


def _from_checkpoint(spec: str, this: Run, *, strict: bool) -> tuple[Any, int, list[str], list[str]]:
    """(parameters, newest step, heads that are missing, notes); unless `strict`, tables grow with the tokenizer."""
    checkpoints, steps, which = specs.open_spec(spec)
    with checkpoints:
        made_with = checkpoints.meta(steps[0])["tokenizer"]
        same = made_with == this.tokenizer.fingerprint
        grew = None if same or strict else growth.between(this.tokenizer, made_with)
        if not same and grew is None:
            raise ConfigError(
                f"{spec} was made with another tokenizer (fingerprint {made_with[:12]}) than this run's ({this.tokenizer.fingerprint[:12]}). "
                f"Set --config.tokenizer.path={checkpoints.folder.parent / 'tokenizer'}; --config.tokenizer.extra=FILE adds pieces to it."
            )
        structure, wanted = checkpoints.structure(steps[0]), _wanted(this)
        have, fresh = {}, []
        if which in structure:  # else the error of reading says what is there
            have = {path: tuple(leaf.shape) for path, leaf in tree.paths(structure[which]).items() if not path.startswith(lora.KEY + "/")}
            compared = have if grew is None else growth.shapes(have, wanted)
            fresh = _compare(compared, this, f"checkpoint {checkpoints.folder / str(steps[0])}", strict=strict)
        flat = {path: leaf for path, leaf in wanted.items() if _head_of(path) not in fresh}
        known = tree.unflatten(growth.before(flat, have) if grew is not None and have else flat)
        params = _restored(checkpoints, steps, known, which, this.layout.replicated())
    if grew is not None:
        params = growth.grow(params, grew, wanted=wanted)
    resized = _resized(fresh, structure[which], this)
    return params, steps[0], fresh, [*resized, *([] if grew is None else [grew.note])]


def _directory(spec: str, this: Run) -> hf.Imported:
    """The directory's model that a run begins with, its tables grown where the run's tokenizer extends the directory's."""
    folder = specs.fetch(spec)
    imported, grew = hf.read(folder), growth.between(this.tokenizer, None)
    check_pieces(spec, folder, this.tokenizer)
    if grew is not None and imported.config.vocab_size > grew.size and ((theirs := _tokenizer_of(folder)) is None or theirs.vocab_size > grew.size):
        has = "no tokenizer" if theirs is None else f"a tokenizer of {theirs.vocab_size} pieces"
        raise ConfigError(
            f"{spec} has {imported.config.vocab_size} rows of pieces and {has}; tokenizer.extra would give those from {grew.size} on new values, and they may be "
            f"trained. Make it a checkpoint with its tokenizer (ptm convert --from={spec} --to=ckpt:DIR --tokenizer=FOLDER) and start from ckpt:DIR."
        )
    if grew is None or imported.config.vocab_size < grew.size:
        _same_function(spec, imported, this)
        return imported
    config = dataclasses.replace(imported.config, vocab_size=this.model.config.vocab_size)
    imported = imported._replace(config=config, notes=[*imported.notes, grew.note])
    _same_function(spec, imported, this)
    wanted = tree.paths(this.abstract_params)
    params = tree.unflatten({path: leaf for path, leaf in tree.paths(imported.params).items() if path in wanted})
    return imported._replace(params=growth.grow(params, grew, wanted=wanted))


def _tokenizer_of(folder: Path) -> text.Tokenizer | None:
    """The tokenizer of a directory; None if it has none that we read."""
    try:
        return text.make(**vocabulary.find(folder))
    except ConfigError:
        return None


def check_pieces(spec: str, folder: Path, tokenizer: text.Tokenizer) -> None:
    """Raises ConfigError if the ids of a directory's tokenizer stand for other text than those of a run's. One without a tokenizer that we read fits all."""
    theirs = _tokenizer_of(folder)
    if theirs is None:
        return
    count = min(theirs.vocab_size, tokenizer.vocab_size - tokenizer.num_added)
    sample = np.unique(np.linspace(0, count - 1, 1000).astype(int))
    differing = [i for i in sample if theirs.decode([i]) != tokenizer.decode([i])]
    # The same vocabulary from files of another form may show some pieces otherwise; of two vocabularies next to none agree.
    if len(differing) > len(sample) // 4:
        shown = ", ".join(f"{i} is {theirs.decode([i])!r}, not {tokenizer.decode([i])!r}" for i in differing[-3:])
        raise ConfigError(
            f"{spec} has another tokenizer than this run: {len(differing)} of {len(sample)} ids that were compared differ ({shown}). Its own: "
            f"--config.tokenizer.kind={vocabulary.find(folder)['kind']} --config.tokenizer.path={folder}"
        )


def of_directory(imported: hf.Imported, this: Run) -> tuple[Any, list[str]]:
    """(parameters, heads initialised afresh) of a run from a directory's model. Raises ConfigError if the bodies differ."""
    params, fresh = _of_body(imported, this)
    return _with_fresh(params, this), fresh


def _of_body(imported: hf.Imported, this: Run) -> tuple[Any, list[str]]:
    """(parameters, heads that are missing) of a run from a directory's model."""
    flat = tree.paths(imported.params)
    fresh = _compare({path: leaf.shape for path, leaf in flat.items()}, this, "the directory's model", strict=False)
    wanted = {path: leaf for path, leaf in _wanted(this).items() if _head_of(path) not in fresh}
    placed = {path: jax.make_array_from_callback(leaf.shape, leaf.sharding, flat[path].__getitem__) for path, leaf in wanted.items()}
    return tree.unflatten(placed), fresh


def _with_fresh(params: Any, this: Run) -> Any:
    """The parameters with those that are missing as they begin. Raises ConfigError for one that would stay so."""
    given = tree.paths(params)
    missing = [path for path in tree.paths(this.abstract_params) if path not in given]
    if not missing:
        return params
    frozen = list(dict.fromkeys(tree.group(path) for path in missing if path in this.optimizer.frozen and this.optimizer.frozen[path]))
    if frozen:
        raise ConfigError(
            f"{', '.join(frozen)} would begin afresh and be frozen: what init names has none. Train it: with --config.lora.train={frozen[0]}/.* (beside "
            "what lora.train has) if low-rank factors are trained, or leave it out of --config.optimizer.freeze."
        )
    fresh = tree.paths(this.init_params())
    return tree.unflatten({**given, **{path: fresh[path] for path in missing}})


def _same_function(spec: str, imported: hf.Imported, this: Run) -> None:
    """Refuses a run whose model would compute something else with a directory's parameters."""
    ours = this.model.config
    if type(ours) is not type(imported.config):
        raise ConfigError(f"{spec} holds a model {imported.config.name}, but the run's is {ours.name}; use a recipe of that family.")
    wrong = []
    for entry in imported.family.keys:
        if entry.free:
            continue
        try:
            here, there = entry.write_to(ours), entry.write_to(imported.config)
        except ConfigError as error:
            wrong.append(str(error))
            continue
        if here != there:
            known = isinstance(entry, Key)
            wrong.append(f"--config.model.{entry.ours}={unparse(getattr(imported.config, entry.ours))}" if known else f"what makes {there} of {here}")
    if wrong:
        raise ConfigError(f"{spec} holds another model than the run's config; set {', '.join(wrong)}.")
