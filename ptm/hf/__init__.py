"""Models of the reference library (Hugging Face Transformers) and ours, in both directions: one table a model_type."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm.fields import ConfigError, lookup
from ptm.hf import electra, encoder_decoder, files, transfer
from ptm.hf.albert import ALBERT
from ptm.hf.bert import BERT
from ptm.hf.gpt import GPT, GPT2
from ptm.hf.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from ptm.hf.modernbert import MODERNBERT
from ptm.hf.roberta import ROBERTA, XLM_ROBERTA
from ptm.hf.t5 import MT5, T5
from ptm.hf.tables import Family
from ptm.hf.transfer import Exported, Imported
from ptm.hf.xlnet import XLNET

# A config of ours is written with the first table of its family that says it can.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (encoder_decoder.ENCODER_DECODER, GPT2, GPT, BERT, ROBERTA, XLM_ROBERTA, ALBERT, electra.ELECTRA, XLNET, MODERNBERT, T5, MT5, QWEN3, MISTRAL, QWEN2, LLAMA)
}

__all__ = ["FAMILIES", "Exported", "Imported", "family_of", "folders", "read", "write"]


def folders(folder: str | os.PathLike) -> list[Path]:
    """The directories that a model is made of: the folder itself, or those of ELECTRA's generator and discriminator in it."""
    folder = Path(folder).expanduser()
    parts = [folder / name for name in electra.PARTS]
    return parts if not (folder / files.CONFIG).is_file() and all((part / files.CONFIG).is_file() for part in parts) else [folder]


def read(folder: str | os.PathLike) -> Imported:
    """The model in a directory of the reference library, or in ELECTRA's two.

    Raises ConfigError if its model_type is unknown or if it cannot be had exactly.
    """
    found = [_read(part) for part in folders(folder)]
    return electra.join(*found) if len(found) > 1 else found[0]


def _read(folder: Path) -> Imported:
    directory = files.read(folder)
    if "model_type" not in directory.config:
        raise ConfigError(f"{directory.folder / files.CONFIG} names no model_type; known: {', '.join(FAMILIES)}.")
    return transfer.read(lookup(FAMILIES, str(directory.config["model_type"]), f"model_type of {directory.folder / files.CONFIG}"), directory)


def family_of(config: Any) -> Family:
    """The table that a config of ours is written with."""
    fitting = [family for family in FAMILIES.values() if family.name == config.name and family.writes(config)]
    if not fitting:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise ConfigError(f"model {config.name} with this config has no counterpart in the reference library; families that have: {known}.")
    return fitting[0]


def write(config: Any, heads: tuple[str, ...], params: Mapping[str, Any]) -> dict[str, Exported]:
    """The directories of a model of ours, by their names below the folder that they are for; of a single one the name is empty."""
    family = family_of(config)
    if family is encoder_decoder.ENCODER_DECODER:
        config, params = encoder_decoder.unshared(config, params)
    models = electra.split(config, heads, params) if family is electra.ELECTRA else {}
    if len(models) < 2:
        models = {"": next(iter(models.values()), (config, heads, params))}
    return {name: transfer.write(family, *model) for name, model in models.items()}
