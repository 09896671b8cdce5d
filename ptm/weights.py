"""Parameters from where a spec says that they are, placed as a run places them, and the run of a spec itself."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ptm import growth, hf, registry, run, specs, text, tree
from ptm.fields import ConfigError, unparse
from ptm.hf import vocabulary
from ptm.hf.tables import Key
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
    """The Run whose checkpoint `ckpt:DIR[@...]` names, from the config in its workdir."""
    workdir = specs.parse_spec(spec).folder.parent
    config = registry.resolve(run.read_config(workdir))
    devices = jax.devices() if devices is None else devices
    try:
        run.layout_of(config, devices)
    except ConfigError:
        # Made on another number of devices: one of these reads it.
        devices, config = devices[:1], dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, sequence=1))
    if config.compute.attention == "cudnn" and devices[0].platform != "gpu":
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="auto"))
    return run.setup(config, workdir=workdir, devices=devices)


def read(spec: str, this: Run) -> tuple[Any, int]:
    """(parameters, newest step) of `ckpt:DIR[@STEP|@best|@ema|@avgN]` for the run that made it; heads that it does not use are left out."""
    params, step, *_ = _from_checkpoint(spec, this, strict=True)
    return params, step


def read_all(spec: str, this: Run) -> Any:
    """All parameters of a checkpoint, heads that its run does not use among them, on the first device."""
    checkpoints, steps, which = specs.open_spec(spec)
    with checkpoints:
        structure = checkpoints.structure(steps[0])
        wanted = structure[which] if which in structure else this.abstract_params  # else the error of reading says what is there
        if len(steps) > 1:
            return checkpoints.average(steps, wanted, which=which)
        return checkpoints.restore_params(steps[0], wanted, which=which)


def start(this: Run) -> tuple[Any, str]:
    """What a run's `init` names, as its first parameters, and a line that says what was done.

    The body must be complete; a head that is not there, or has another shape there, is initialised afresh. Where the run's tokenizer extends the
    one of the checkpoint or directory, the tables of pieces grow.
    """
    spec = this.config.init
    if spec == "scratch":
        return this.init_params(), ""
    if specs.is_directory(spec):
        imported = _directory(spec, this)
        params, fresh = of_directory(imported, this)
        what, notes = "Parameters", imported.notes
    else:
        params, step, fresh, notes = _from_checkpoint(spec, this, strict=False)
        what = f"Parameters of step {step}"
    made = f" Not there, so initialised afresh: {', '.join(fresh)}." if fresh else ""
    return params, " ".join([f"{what} from {spec}.{made}", *notes])


def _head_of(path: str) -> str | None:
    name = path.partition("/")[0]
    return name if name in HEAD_PARAMS else None


def _compare(have: dict[str, tuple[int, ...]], this: Run, what: str, *, strict: bool) -> list[str]:
    """Heads that are missing or of another shape; heads alone may be too many. Raises ConfigError listing all else that differs."""
    wanted = {path: leaf.shape for path, leaf in tree.paths(this.abstract_params).items()}
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
    """(parameters, newest step, heads initialised afresh, notes); unless `strict`, tables grow with the tokenizer."""
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
        structure, wanted = checkpoints.structure(steps[0]), tree.paths(this.abstract_params)
        have, fresh = {}, []
        if which in structure:  # else the error of reading says what is there
            have = {path: tuple(leaf.shape) for path, leaf in tree.paths(structure[which]).items()}
            compared = have if grew is None else growth.shapes(have, wanted)
            fresh = _compare(compared, this, f"checkpoint {checkpoints.folder / str(steps[0])}", strict=strict)
        flat = {path: leaf for path, leaf in wanted.items() if _head_of(path) not in fresh}
        known = tree.unflatten(growth.before(flat, have) if grew is not None and have else flat)
        if len(steps) > 1:
            params = checkpoints.average(steps, known, which=which, subset=True)
        else:
            params = checkpoints.restore_params(steps[0], known, which=which, subset=True)
    if grew is not None:
        params = growth.grow(params, grew, wanted=wanted)
    return _with_fresh(params, this, fresh), steps[0], fresh, [] if grew is None else [grew.note]


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
    flat = tree.paths(imported.params)
    fresh = _compare({path: leaf.shape for path, leaf in flat.items()}, this, "the directory's model", strict=False)
    wanted = {path: leaf for path, leaf in tree.paths(this.abstract_params).items() if _head_of(path) not in fresh}
    placed = {path: jax.make_array_from_callback(leaf.shape, leaf.sharding, flat[path].__getitem__) for path, leaf in wanted.items()}
    return _with_fresh(tree.unflatten(placed), this, fresh), fresh


def _with_fresh(params: Any, this: Run, fresh: list[str]) -> Any:
    return {**params, **{name: leaves for name, leaves in this.init_params().items() if name in fresh}} if fresh else params


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
