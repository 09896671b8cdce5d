"""Tokenizers of the reference library's directories, found and written as files; what the reference makes of them is for its own code."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm import text
from ptm.fields import ConfigError
from ptm.hf import files
from ptm.text.base import META
from ptm.text.export import library_files
from ptm.text.sentencepiece import SPACE

SETTINGS = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
LIBRARY = "tokenizer.json"
# Kinds with the classes of the reference that read their files as we do; any other class is read from tokenizer.json.
CLASSES = {
    "wordpiece": ("BertTokenizer", "ElectraTokenizer"),
    "bpe": ("GPT2Tokenizer", "RobertaTokenizer"),
    "sentencepiece": ("T5Tokenizer", "AlbertTokenizer", "XLNetTokenizer"),
}
PLAIN = ("wordpiece", "bpe", "file")  # kinds whose files the reference reads as we do, whoever made them
ROLES = {"pad": "pad_token", "bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "mask": "mask_token", "cls": "cls_token", "sep": "sep_token"}
ANY = "PreTrainedTokenizerFast"  # the class that reads a tokenizer.json of any kind


def find(folder: Path) -> dict[str, Any]:
    """The tokenizer in a folder, as arguments of `ptm.text.make`: kind, path, lowercase, sentinels. Raises ConfigError if there is none.

    The files of a published kind are preferred where the reference's class for them is named, then tokenizer.json, then any known files.
    """
    folder = folder.absolute()
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if META in names:
        made = text.load(str(folder))
        return {"kind": made.kind, "path": str(folder), "lowercase": made.lowercase, "sentinels": len(made.sentinels)}
    settings = files.read_json(folder / SETTINGS) if SETTINGS in names else {}
    named = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    there = [kind for kind in CLASSES if names.issuperset(text.TOKENIZERS[kind].files_needed)]
    kinds = [kind for kind in there if named in CLASSES[kind] and not _unusual(settings)]
    if LIBRARY in names and not kinds:
        return {"kind": "file", "path": str(folder), "lowercase": False, "sentinels": 0}
    if _unusual(settings):
        raise ConfigError(f"'{folder}': {SETTINGS} sets {', '.join(_unusual(settings))} as no published vocabulary has it; it needs a {LIBRARY} beside it.")
    if not (kinds or there):
        known = ", ".join(" + ".join(text.TOKENIZERS[kind].files_needed) for kind in CLASSES)
        raise ConfigError(f"'{folder}' holds no tokenizer ({known} or {LIBRARY}). Name the folder of one with --tokenizer=DIR or --config.tokenizer.path=DIR.")
    kind = (kinds or there)[0]
    lowercase = kind == "wordpiece" and bool(settings.get("do_lower_case", True))
    sentinels = settings.get("extra_ids", 100) if named == "T5Tokenizer" else 0
    if type(sentinels) is not int:
        raise ConfigError(f"{folder / SETTINGS}: extra_ids={sentinels!r}; allowed: a number of sentinels.")
    return {"kind": kind, "path": str(folder), "lowercase": lowercase, "sentinels": sentinels}


def _unusual(settings: Mapping[str, Any]) -> list[str]:
    """Options that change what the files mean, where they are not as in published models."""
    odd = []
    if settings.get("tokenize_chinese_chars", True) is not True:
        odd.append("tokenize_chinese_chars")
    if settings.get("strip_accents") not in (None, settings.get("do_lower_case", True)):
        odd.append("strip_accents")
    if settings.get("add_prefix_space", False):
        odd.append("add_prefix_space")
    return odd


def write(tokenizer: text.Tokenizer, folder: Path, *, classes: Mapping[str, str], max_length: int | None) -> list[str]:
    """Writes a tokenizer's files so that the reference loads it; `classes` are a family's own classes by kind. Returns what a user should know."""
    kind = tokenizer.kind
    if tokenizer.num_added:
        return ["The tokenizer is left out: pieces that were added by tokenizer.extra have no counterpart in the reference. The run's own folder of it has them."]
    # A published sentencepiece model puts a space before the text, as the reference's classes do; one made here does not.
    plain = kind in PLAIN or kind in classes and tokenizer.pieces(tokenizer.encode("a"))[0].startswith(SPACE)
    content = {} if plain else library_files(tokenizer)
    if content is None:
        advice = "`ptm convert --tokenizer=DIR` and tokenizer.path read the run's own folder of it."
        return [f"The reference has no counterpart of this {kind} tokenizer: it is left out. {advice}"]
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save(saved)
        for name in tokenizer.files_needed if plain else ():
            shutil.copy(Path(saved) / name, folder / name)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ROLES}
    specials = {ROLES[role]: tokenizer.pieces([index])[0] for role, index in ids.items() if index is not None}
    files.write_json(folder / SPECIALS, specials)
    settings: dict[str, Any] = {"tokenizer_class": ANY, **specials, "clean_up_tokenization_spaces": False}
    if plain and kind != "file":
        settings["tokenizer_class"] = classes[kind] if kind in classes else CLASSES[kind][0]
        if kind == "sentencepiece":
            settings["extra_ids"] = len(tokenizer.sentinels)
        elif tokenizer.sentinels:
            settings["additional_special_tokens"] = tokenizer.pieces(sorted(tokenizer.sentinels))
    if max_length is not None:
        settings["model_max_length"] = max_length
    if kind == "wordpiece":
        settings["do_lower_case"] = tokenizer.lowercase
    files.write_json(folder / SETTINGS, settings)
    return []
