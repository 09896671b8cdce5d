"""What `ptm prepare` says of a data set that it made, in its manifest.json, and what of it is held against the files at each reading."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ptm import untrusted
from ptm.fields import ConfigError

FILE = "manifest.json"
FORMAT = 1
KEYS = ("format", "ptm", "options", "sources", "tokenizer", "counts", "evals", "bad", "shards")
OF_SHARD = {"split": str, "records": int, "content": int, "size": int, "sha256": str, "ends": str}


def read(folder: str | os.PathLike, *, where: str | None = None) -> dict[str, Any]:
    """The manifest of a data set. Raises ConfigError where there is none, or one that `ptm prepare` did not write; `where` is what the folder is called."""
    path = os.path.join(folder, FILE)
    try:
        found = untrusted.read_json(path)
        if not isinstance(found, dict) or set(found) != set(KEYS) or found["format"] != FORMAT:
            raise ValueError(f"it must hold the keys {', '.join(KEYS)} and have format {FORMAT}")
        if not isinstance(found["tokenizer"], str | None):
            raise ValueError("its tokenizer is no fingerprint")
        for name, shard in found["shards"].items():
            if not untrusted.is_name(name) or {key: type(value) for key, value in shard.items()} != OF_SHARD:
                raise ValueError(f"its shard {name!r} is none")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{where or folder}/{FILE} cannot be read ({error}); it belongs to every data set of `ptm prepare`: make the data set again."
        ) from None
    return found


def check_ends(manifest: Mapping[str, Any], digests: Iterable[tuple[str, int, str]], *, folder: str) -> None:
    """Raises ConfigError where a file, given as (name, bytes, sha256 of its first and last megabyte), is not the shard of the manifest."""
    for name, size, ends in digests:
        if name not in manifest["shards"] or (manifest["shards"][name]["size"], manifest["shards"][name]["ends"]) != (size, ends):
            raise ConfigError(
                f"{os.path.join(folder, name)} is not the shard that {FILE} tells of: it is damaged or was changed. Fetch it again, or prepare it anew."
            )
