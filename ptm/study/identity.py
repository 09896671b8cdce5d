"""What a run of a study is, whatever it is called and wherever it lies: a hash of its config and data. Runs of one identity are made once.

The config of a run that starts from another one holds that one's place, `$STUDY/RUN`; in the hash its identity stands there instead.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ptm import config as config_lib
from ptm import registry, tree
from ptm.fields import ConfigError
from ptm.study.folder import PLACE, Record, RunRecord

SAFE = re.compile(r"[^A-Za-z0-9._=-]+")
LONGEST = 80  # characters of a folder's name


def of(config: Mapping[str, Any], fingerprints: Mapping[str, str | None], *, parent: str | None) -> str:
    """sha256 of a flat config, of the fingerprints of its data and tokenizer, and of the identity of the run that it starts from."""
    own = {key: parent if isinstance(value, str) and PLACE in value else value for key, value in config.items()}
    return hashlib.sha256(json.dumps({"config": own, "fingerprints": dict(fingerprints)}, sort_keys=True).encode()).hexdigest()


def recorded(record: Record) -> dict[str, str]:
    """Run -> identity of the runs of a record, with the keys that were declared since it was written at their defaults."""
    found: dict[str, str] = {}
    for run, about in record.runs.items():
        found[run] = of(current(about), about.fingerprints, parent=found[about.needs] if about.needs else None)
    return found


def current(about: RunRecord) -> dict[str, Any]:
    """The flat config of a recorded run with every key of this version; as it was recorded where this version cannot read it."""
    try:
        return config_lib.flatten(config_lib.complete(unflatten(about.config), registry.REGISTRIES))
    except ConfigError:
        return about.config


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of dotted keys."""
    return tree.unflatten({key.replace(".", "/"): value for key, value in flat.items()})


def folders(names: Iterable[str], *, taken: Iterable[str]) -> dict[str, str]:
    """Name of an arm -> a name for its folder: readable, different from the others and from `taken`."""
    used, found = {name.lower() for name in taken}, {}  # lower: some file systems know no difference
    for name in names:
        plain = SAFE.sub("_", name).strip("_.")[:LONGEST] or "arm"
        number, chosen = 1, plain
        while chosen.lower() in used:
            number += 1
            chosen = f"{plain}-{number}"
        used.add(chosen.lower())
        found[name] = chosen
    return found
