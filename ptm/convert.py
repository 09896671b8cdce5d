"""`ptm convert`: a directory of the reference library becomes a workdir, a checkpoint becomes such a directory."""

import json
from pathlib import Path
from typing import Any

import jax

from ptm import config as config_lib
from ptm import hf, mup, specs, tree, weights
from ptm import run as run_lib
from ptm.fields import ConfigError
from ptm.hf import check, files, transfer, vocabulary
from ptm.objectives.classify import Classify
from ptm.objectives.tag import Tag
from ptm.run import Run

# Heads by the top-level names of their parameters.
HEADS = {
    "lm_head": "lm", "mlm_head": "mlm", "pooler": "pooled", "pair_head": "pair", "rtd_head": "rtd", "restore_head": "restore",
    "classify_head": "classify", "tag_head": "tag", "qa_head": "qa",
}  # fmt: skip


def convert(source: str, target: str, *, dtype: str = "float32", tokenizer: str | None = None, compare: bool = False) -> bool:
    """Converts `hf:DIR` or `hub:ORG/NAME` to `ckpt:DIR`, or `ckpt:DIR[@...]` to `hf:DIR`; prints what was done.

    `dtype` is the type of the tensors of a directory that is written, `tokenizer` the folder of the tokenizer of one that is read, if it
    is not there. `compare` runs the reference beside ours; False says that they differ. Raises ConfigError for what cannot be converted
    exactly, and if there is something at the target; then nothing is written.
    """
    if specs.is_directory(source) and target.startswith("ckpt:"):
        if dtype != "float32":
            raise ConfigError(f"--dtype={dtype} is for a directory that is written (--to=hf:DIR); checkpoints are float32.")
        return _to_checkpoint(source, Path(target.removeprefix("ckpt:")), tokenizer=tokenizer, compare=compare)
    if source.startswith("ckpt:") and target.startswith("hf:"):
        if tokenizer is not None:
            raise ConfigError(f"--tokenizer={tokenizer} is for a directory that is read (--from=hf:DIR); a checkpoint has its own.")
        return _to_directory(source, specs.fetch(target), dtype=dtype, compare=compare)
    raise ConfigError(f"--from={source} --to={target}; allowed: from hf:DIR or hub:ORG/NAME to ckpt:DIR, and from {specs.SPEC} to hf:DIR.")


def _to_checkpoint(source: str, target: Path, *, tokenizer: str | None, compare: bool) -> bool:
    folder = specs.fetch(source)
    imported = hf.read(folder)
    with files.fresh(target) as workdir:
        this = run_lib.setup(specs.config_of(imported, tokenizer=tokenizer or folder), workdir=workdir)
        params, made = weights.of_directory(imported, this)
        # Heads that the objective does not use are kept for whoever starts from here.
        kept = {**imported.params, **params}
        (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(this.config), indent=1) + "\n", encoding="utf-8")
        (workdir / "params.txt").write_text(run_lib.parameter_table(this), encoding="utf-8")
        with run_lib.open_checkpoints(this, workdir / "ckpt") as checkpoints:
            checkpoints.save(0, {"params": kept}, streams={}, meta={"step": 0, "tokenizer": this.tokenizer.fingerprint, "source": source})
        same = not compare or _same(folder)
    print(f"{source}: {imported.family.model_type}, {tree.size(imported.params):,} parameters, heads: {', '.join(imported.heads) or 'none'}.")
    for note in imported.notes:
        print(note)
    if made:
        print(f"The objective {this.config.objective.name} needs what is not there; initialised afresh: {', '.join(made)}.")
    print(f"Its config.json has the data ({', '.join(this.config.data.source)}) and the objective ({this.config.objective.name}) of a run with default settings.")
    print(f"Written to {target}. Use it as --workdir={target} of `ptm evaluate`, as ptm.load('ckpt:{target}') or as --config.init=ckpt:{target}.")
    return same


def _heads(this: Run, names: list[str], outputs: dict[str, int]) -> tuple[str, ...]:
    """The heads whose parameters have these top-level names, with their numbers of outputs, and those of the run that have none."""
    found = [f"{HEADS[name]}:{outputs[name]}" if name in outputs else HEADS[name] for name in HEADS if name in names]
    return tuple(dict.fromkeys([*found, *(head for head in this.model.module.heads if head == "lm")]))


def _to_directory(source: str, target: Path, *, dtype: str, compare: bool) -> bool:
    if dtype not in files.DTYPES:
        raise ConfigError(f"--dtype={dtype}; allowed: {', '.join(files.DTYPES)}.")
    this = weights.reopen(source)
    params = mup.folded(weights.read_all(source, this), this.model.module.context)
    shapes = {path: leaf.shape for path, leaf in tree.paths(params).items()}
    outputs = {"classify_head": "classify_head/labels/kernel", "tag_head": "tag_head/kernel"}
    heads = _heads(this, list(params), {name: shapes[path][-1] for name, path in outputs.items() if path in shapes})
    written = hf.write(this.model.config, heads, jax.device_get(params))
    ids = {f"{role}_token_id": getattr(this.tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
    if this.model.config.kind == "encoder_decoder":
        ids["decoder_start_token_id"] = this.tokenizer.pad_id
    with files.fresh(target) as folder:
        for name, exported in written.items():
            files.write(folder / name, {**ids, "dtype": dtype, **exported.config, **_label_names(this, exported.heads)}, exported.tensors, dtype=dtype)
        classes, max_length = hf.family_of(this.model.config).tokenizers, this.model.config.max_length
        notes = [vocabulary.write(this.tokenizer, folder / name, classes=classes, max_length=max_length) for name in {"": None, **written}]
        same = not compare or _same(folder)
    print(f"{source}: {tree.size(params):,} parameters.")
    for name, exported in written.items():
        print(f"Written to {target / name} as {exported.architecture.name}, heads: {', '.join(exported.heads) or 'none'}.")
        print(f"from_pretrained('{target / name}') of the reference library reads it.")
    for note in dict.fromkeys([*(note for exported in written.values() for note in exported.notes), *notes[0], *reminders(this)]):
        print(note)
    return same


def _label_names(this: Run, heads: tuple[str, ...]) -> dict[str, Any]:
    """The keys of their config.json with the names of a run's labels, where the head that gives them is written."""
    tasks = [branch.objective for branch in this.branches if isinstance(branch.objective, Classify | Tag) and branch.objective.heads[-1] in heads]
    names = tasks[0].config.labels if tasks else ()
    return {"id2label": {str(n): name for n, name in enumerate(names)}, "label2id": {name: n for n, name in enumerate(names)}} if names else {}


def reminders(this: Run) -> list[str]:
    """Where the reference computes something else than the run did, though its parameters are the same."""
    config, notes = this.model.config, []
    usual = (check.MASKS[config.kind], "permutation")  # XLNet's orders are of pretraining alone: who uses the model sees all of a row
    for mask in sorted({branch.objective.mask for branch in this.branches} - set(usual)):
        notes.append(f"The run attends under the mask {mask}, the reference's {config.name} under {usual[0]}: give it such a mask, or expect other numbers.")
    padding = config.position_offset - 1 if hasattr(config, "position_offset") else -1
    if padding >= 0 and this.tokenizer.pad_id != padding:
        notes.append(
            f"The reference's {config.name} takes id {padding} for padding when it counts positions, but here that is {this.tokenizer.pieces([padding])[0]!r}: "
            f"give it position_ids {padding + 1}, {padding + 2}, ... with each batch."
        )
    return notes


def _same(folder: Path) -> bool:
    """Prints the differences between the reference's outputs and ours; whether all are within the tolerance."""
    found = []
    for part in hf.folders(folder):
        imported = hf.read(part)
        found += check.compare(imported.family, transfer.model(imported.config, imported.heads), imported.params, part)
    for difference in found:
        print(f"  {difference.name:<20} largest difference {difference.largest:.2e}, allowed {difference.allowed:.2e}{'  EXCEEDED' if difference.exceeds else ''}")
    return not any(difference.exceeds for difference in found)
