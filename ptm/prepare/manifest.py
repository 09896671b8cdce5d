"""manifest.json of a data set: from what and how it was made, and the sha256 of every shard."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptm import __version__, atomic, untrusted
from ptm.data.prepared import FILE, FORMAT, read
from ptm.fields import ConfigError
from ptm.prepare import dataset, reading, stages
from ptm.prepare.dataset import Shard
from ptm.prepare.options import Options, changed

__all__ = ["BEGUN", "FILE", "FORMAT", "check", "content", "identity", "read", "require_begun", "require_same", "write"]

BEGUN = "identity.json"


def identity(options: Options) -> dict[str, Any]:
    """What decides about records: options, and fingerprints of the files that they name (that of the tokenizer is None where there is none)."""
    vocabulary = stages.tokenizer(options.tokenizer)
    sources = [*reading.fingerprints(options), *reading.fingerprints(reading.evals(options))]
    return {"options": options.identity(), "sources": sources, "tokenizer": None if vocabulary is None else vocabulary.fingerprint}


def content(
    made_from: Mapping[str, Any], *, counts: Mapping[str, int], short: Mapping[str, int], bad: Sequence[Sequence[str]], shards: Mapping[str, Sequence[Shard]]
) -> dict[str, Any]:
    """The manifest of an identity, its counts, the examples of each evaluation set that are too short, (id, reason) of bad records, and shards by split."""
    listed = {shard.file: {"split": split, **shard._asdict()} for split, found in shards.items() for shard in found}
    for entry in listed.values():
        del entry["file"]
    evals = {name: {"too_short": count} for name, count in short.items()}
    return {"format": FORMAT, "ptm": __version__, **made_from, "counts": dict(counts), "evals": evals, "bad": [list(entry) for entry in bad], "shards": listed}


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest into the folder of a data set."""
    atomic.write(folder / FILE, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def check(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises ConfigError where a shard is missing, or is not what the manifest says."""
    for name, shard in manifest["shards"].items():
        path = folder / name
        if not path.is_file() or os.path.getsize(path) != shard["size"] or dataset.sha256(path) != shard["sha256"]:
            raise ConfigError(
                f"{path} is missing or damaged: its size or sha256 is not that of {FILE}. Fetch it again, or remove the folder and prepare it anew."
            )


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Raises ConfigError that names what differs between the identity that a folder was made from and the one that is asked for now."""
    found = [f"--{line}" for line in changed(before["options"], now["options"])]
    if not found:
        pairs = zip(before["sources"], now["sources"])
        found = [f"the files of {new['source']} have changed" for old, new in pairs if old["fingerprint"] != new["fingerprint"]]
    if not found and before["tokenizer"] != now["tokenizer"]:
        found = [f"the vocabulary of --tokenizer={now['options']['tokenizer']} has changed"]
    if found:
        raise ConfigError(f"{where} was begun otherwise: {'; '.join(found)}. Give what it was begun with, or another --version, or remove that folder.")


def require_begun(path: Path, made_from: Mapping[str, Any], *, where: str) -> None:
    """Raises ConfigError where the preparation that wrote the file, of the folder `where`, began from another identity; without a file it begins now."""
    if not path.exists():
        atomic.write(path, json.dumps(made_from))
        return
    try:
        before = untrusted.read_json(path)
        require_same(before, made_from, where=where)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read ({error}); remove {where} and start again.") from None
