"""What names a model on the command line and in `config.init`: a checkpoint of a run, or a directory of the reference library.

    ckpt:DIR[@STEP|@best|@ema|@avgN]   a workdir or its ckpt folder
    hf:DIR                             config.json and safetensors files
    hub:ORG/NAME[@REVISION]            the same, fetched by huggingface_hub
"""

import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ptm import config as config_lib
from ptm import fields, hf, text
from ptm.checkpoint import Checkpoints
from ptm.config import ConfigDict
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.hf import files, vocabulary
from ptm.nn.heads import split_head
from ptm.objectives import OBJECTIVES, rows, tag
from ptm.saved import steps_in

SPEC = "ckpt:DIR[@STEP|@best|@ema|@avgN]"
DIRECTORIES = ("hf:", "hub:")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # never code, never weights that could hold some
MAX_NAMES = 20
# The objective of a directory's run, by one of its heads, else by the kind of its model.
BY_HEAD = {"pair": "pairs", "rtd": "rtd", "classify": "classify", "tag": "tag"}
BY_KIND = {"decoder": "causal", "encoder": "mlm", "encoder_decoder": "span_corruption"}
LENGTH = 512  # tokens of a row of such a run, at most


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


class Spec(NamedTuple):
    """What 'ckpt:DIR[@STEP|@best|@ema|@avgN]' names: a folder, a step number or 'latest' or 'best', 'params' or 'ema', and how many steps to average."""

    folder: Path
    step: int | str
    which: str
    count: int


def parse_spec(spec: str) -> Spec:
    """Reads 'ckpt:DIR[@STEP|@best|@ema|@avgN]', where DIR is a workdir or its ckpt folder.

    @ema means the averaged weights of the newest valid step, @avg5 the mean of the weights of the 5 newest valid steps. Raises
    ConfigError saying what exists if the folder, its checkpoints or the step do not.
    """
    body = spec.removeprefix("ckpt:")
    if body == spec or not body:
        raise ConfigError(f"'{spec}' does not name a checkpoint; allowed: {SPEC}.")
    tail = None if os.path.exists(body) else re.fullmatch("(.+)@([^/@]*)", body)
    name, suffix = tail.groups() if tail else (body, "")
    known = re.fullmatch("(?P<step>[0-9]+)|best|ema|avg(?P<count>[1-9][0-9]*)", suffix)
    if tail and not known:
        raise ConfigError(f"'{spec}' ends in '@{suffix}'; allowed: {SPEC}.{fields.nearest(suffix, ('best', 'ema', 'avg5'))}")
    root = Path(name).expanduser()
    if not root.is_dir():
        around = sorted(path.name for path in root.parent.iterdir() if path.is_dir()) if root.parent.is_dir() else []
        raise ConfigError(f"'{spec}': there is no folder '{root}'. In {root.parent}: {_listed(around)}.{fields.nearest(root.name, around)}")
    folder = root / "ckpt" if (root / "ckpt").is_dir() else root
    steps = steps_in(folder)
    if not steps:
        raise ConfigError(f"'{spec}': no checkpoint in {folder}; it holds: {_listed(sorted(path.name for path in folder.iterdir())[:MAX_NAMES])}.")
    number, count = known.group("step", "count") if known else (None, None)
    if number and int(number) not in steps:
        raise ConfigError(f"'{spec}': no step {number} in {folder}; there are: {_listed(steps)}.")
    step = int(number) if number else "best" if suffix == "best" else "latest"
    return Spec(folder, step, "ema" if suffix == "ema" else "params", int(count or 1))


def open_spec(spec: str) -> tuple[Checkpoints, list[int], str]:
    """A reader of the folder that `spec` names, its steps, checked, newest first (one, or those to average), and 'params' or 'ema'.

    Raises ConfigError if there are not so many sound ones.
    """
    folder, step, which, count = parse_spec(spec)
    checkpoints = Checkpoints.reader(folder)
    if isinstance(step, int):
        steps = [step]
    elif step == "latest":
        steps = checkpoints.newest(count)
    else:
        best = checkpoints.best()
        steps = [] if best is None else [best]
    if len(steps) < count:
        existing = f"of the steps {_listed(checkpoints.steps())} in {folder}"
        if count > 1:
            raise ConfigError(f"'{spec}': {existing} {len(steps)} are valid, not {count}; average fewer, or train with --config.checkpoint.keep_latest={count}.")
        why = f"has a valid checkpoint with the metric '{checkpoints.metric}'" if step == "best" else "is valid"
        raise ConfigError(f"'{spec}': {existing} none {why}.")
    for step in steps:
        checkpoints.require(step)
    return checkpoints, steps, which


def require(spec: str) -> None:
    """Raises ConfigError unless a spec names something that is there; what `hub:` names is asked for when it is read."""
    if spec.startswith("hf:"):
        for folder in hf.folders(fetch(spec)):
            files.read(folder)
    elif not is_directory(spec):
        parse_spec(spec)


def is_directory(spec: str) -> bool:
    """Whether a spec names a directory of the reference library."""
    return spec.startswith(DIRECTORIES)


def fetch(spec: str) -> Path:
    """The folder of `hf:DIR`, or of what `hub:ORG/NAME[@REVISION]` names, fetched first. Raises ConfigError if it cannot be had."""
    kind, _, body = spec.partition(":")
    if kind == "hf":
        if not body:
            raise ConfigError(f"'{spec}' names no folder; write hf:DIR.")
        return Path(body).expanduser()
    name, _, revision = body.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConfigError(f"'{spec}' does not name a model; allowed: hub:ORG/NAME[@REVISION].")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(f"'{spec}' needs the package huggingface_hub: pip install 'ptm[hub]'. Or fetch the files yourself and write hf:DIR.")
    import huggingface_hub  # an extra: only this spec needs it

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ConfigError(f"'{spec}' could not be fetched ({type(error).__name__}: {str(error).strip().splitlines()[0]}).") from None


def config_of(imported: hf.Imported, *, tokenizer: str | os.PathLike) -> ConfigDict:
    """A run for a directory's model: the objective that fits its heads, the tokenizer in the folder `tokenizer`, defaults for all else.

    It evaluates on the text that every installation has; the length of a row is the model's, up to 512 tokens.
    """
    model = imported.config
    found = vocabulary.find(Path(tokenizer))
    made = text.make(**found)
    if made.vocab_size > model.vocab_size:
        raise ConfigError(f"the tokenizer in '{tokenizer}' has {made.vocab_size} pieces, more than the model's {model.vocab_size}; give its own with --tokenizer=DIR.")
    return config_lib.base(
        model=model,
        objective=_objective_of(imported, made),
        evals={"validation": loss.Config()},
        tokenizer=config_lib.Tokenizer(**found),
        data=config_lib.Data(length=min(model.max_length or LENGTH, LENGTH)),
    )


def _objective_of(imported: hf.Imported, tokenizer: text.Tokenizer) -> Any:
    """What a directory's model does, by its heads; a task on texts only where the tokenizer has the special pieces that it needs."""
    model, labels = imported.config, imported.labels
    name = next((BY_HEAD[head] for head, _ in map(split_head, imported.heads) if head in BY_HEAD), BY_KIND[model.kind])
    if name not in ("classify", "tag"):
        return OBJECTIVES[name].config()
    try:
        fits = model.kind in OBJECTIVES[name].build.kinds and rows.Frame.of(tokenizer, model, objective=name)
    except ConfigError:
        fits = False
    if not fits:
        return OBJECTIVES[BY_KIND[model.kind]].config()
    if len(labels) == 1:
        return OBJECTIVES["regress"].config()
    if name == "classify":
        return OBJECTIVES[name].config(labels=labels)
    return OBJECTIVES[name].config(labels=labels, scheme="bio" if all(map(tag.ENTITY_TAG.fullmatch, labels)) else "as_given")
