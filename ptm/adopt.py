"""The model of a recipe that names none: fine-tuning takes it, and its tokenizer, from what `init` names."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ptm import config as config_lib
from ptm import hf, registry, run, specs
from ptm.config import ConfigDict, ModelOfInit, Mup, Tokenizer
from ptm.models import encoder_decoder

FRESH = "scratch:"


def adopt(config: ConfigDict, *, workdir: str | os.PathLike | None = None) -> None:
    """Gives a config without a model the one of its init, `SPEC` or `scratch:SPEC` (the same with fresh parameters), and its tokenizer, in place.

    ENCODER+DECODER gives an encoder-decoder of both, with the encoder's tokenizer. A run that has begun in `workdir` keeps what it has. A config that has a
    model, or whose init names none, stays as it is. Raises ConfigError if there is no such model.
    """
    if config.model.name != ModelOfInit.name:
        return
    spec = config.init.removeprefix(FRESH)
    mup = Mup()
    sides = config_lib.init_specs(spec)
    if workdir is not None and (Path(workdir) / "config.json").is_file():
        made = registry.resolve(run.read_config(Path(workdir)))
        model, tokenizer, mup = made.model, made.tokenizer, made.mup
    elif spec == "scratch":
        return
    elif len(sides) == 2:
        (encoder, tokenizer, _), (decoder, *_) = map(_of, sides)
        parts = {name: dataclasses.replace(side, vocab_size=None) for name, side in (("encoder", encoder), ("decoder", decoder))}
        model = encoder_decoder.Config(parts=parts, vocab_size=encoder.vocab_size)
    else:
        model, tokenizer, mup = _of(spec)
    config_lib.set_section(config, "model", model)
    config_lib.set_section(config, "tokenizer", tokenizer)
    config_lib.set_section(config, "mup", mup)
    if config.init.startswith(FRESH):
        config.init = "scratch"


def _of(spec: str) -> tuple[Any, Tokenizer, Mup]:
    """The configs of the model and the tokenizer that a spec names, and its parametrisation."""
    if specs.is_directory(spec):
        folder = specs.fetch(spec)
        made = registry.resolve(specs.config_of(hf.read(folder), tokenizer=folder))
        return made.model, made.tokenizer, made.mup
    source = specs.parse_spec(spec).folder.parent
    made = registry.resolve(run.read_config(source))
    return made.model, dataclasses.replace(made.tokenizer, path=str(source / "tokenizer"), extra=None), made.mup
