"""The config of a run: `base()` for recipes, overrides, and the way back to checked dataclasses. Its sections are declared in ptm/sections.py.

A recipe calls `base(model=..., objective=..., evals=...)` and changes the ml_collections ConfigDict that it gets; the command line
overrides leaves of it; `resolve` turns it into one frozen `Config` whose every key was checked. Families, objectives and evals
declare their own `Config` dataclasses, each with a class attribute `name`, the key of its table.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from ptm import fields, untrusted
from ptm.fields import ConfigError
from ptm.sections import (
    SECTIONS,
    TOP_LEVEL,
    Checkpoint,
    Compute,
    Config,
    Data,
    Log,
    Lora,
    Mesh,
    ModelOfInit,
    Mup,
    Optimizer,
    Schedule,
    Tokenizer,
    Train,
    column_entries,
    init_specs,
    size_points,
    weight_points,
)

__all__ = [
    "SECTIONS", "TOP_LEVEL", "Checkpoint", "Compute", "Config", "ConfigDict", "Data", "Log", "Lora", "Mesh", "ModelOfInit", "Mup", "Optimizer", "Registries",
    "Schedule", "Tokenizer", "Train", "base", "column_entries", "complete", "defaults_of", "diff", "fingerprint", "flatten", "init_specs", "nearest_key",
    "override", "resolve", "schema", "set_section", "size_points", "to_dict", "weight_points",
]  # fmt: skip

Registries = dict[str, dict[str, type]]


def _to_dict(value: Any, annotation: Any) -> Any:
    if fields.nullable(annotation):
        return FieldReference(value, field_type=fields.strip_null(annotation))
    return value


def _section(config: Any) -> ConfigDict:
    hints = fields.annotations(type(config))
    tables = fields.tables(type(config))
    section = ConfigDict({key: _to_dict(getattr(config, key), hints[key]) for key in hints if key not in tables})
    for key in tables:
        section[key] = ConfigDict({name: _section(value) for name, value in getattr(config, key).items()})
    if hasattr(config, "name") and "name" not in hints:
        section.name = config.name
    return section


def base(*, model: Any = None, objective: Any, evals: dict[str, Any] | None = None, **sections: Any) -> ConfigDict:
    """The config of a run with every default filled in, for a recipe to change and the command line to override.

    `model`, `objective` and the values of `evals` are Config dataclasses of the package's tables, without `model` that of `init`; `sections` may
    replace run-level sections (train=Train(...), data=Data(...), ...) and the top-level keys seed and init.
    """
    unknown = set(sections) - set(SECTIONS) - set(TOP_LEVEL)
    if unknown:
        word = sorted(unknown)[0]
        raise ConfigError(f"base() got '{word}'; allowed: {', '.join((*TOP_LEVEL, *SECTIONS))}.{fields.nearest(word, (*TOP_LEVEL, *SECTIONS))}")
    defaults = {f.name: f.default for f in dataclasses.fields(Config) if f.metadata}
    config = ConfigDict(defaults | {key: value for key, value in sections.items() if key in defaults})
    config.model = _section(ModelOfInit() if model is None else model)
    config.objective = _section(objective)
    config.evals = ConfigDict({name: _section(value) for name, value in (evals or {}).items()})
    for name, cls in SECTIONS.items():
        section = sections[name] if name in sections else cls()
        if not isinstance(section, cls):
            raise ConfigError(f"base({name}=...) got a {type(section).__name__}; allowed: ptm.config.{cls.__name__}(...).")
        config[name] = _section(section)
    config.lock()
    return config


def set_section(config: ConfigDict, name: str, section: Any) -> None:
    """Puts a Config dataclass in the place of a section, in place."""
    with config.unlocked(), config.ignore_type():
        config[name] = _section(section)


def _require_section(section: Any, where: str) -> None:
    if not isinstance(section, ConfigDict | dict):
        raise ConfigError(f"{where}={section!r} is no section; allowed: keys with their values.")


def _as_config(stored: Any, where: str) -> ConfigDict:
    _require_section(stored, where)
    try:
        return ConfigDict(stored)
    except (AttributeError, TypeError, ValueError) as error:  # of a key with a dot, or one that the class has an attribute of
        raise ConfigError(f"{where} cannot be read: {error}") from None


def _class_of(section: ConfigDict, registries: Registries, kind: str, where: str) -> type:
    _require_section(section, where)
    if "name" not in section:
        raise ConfigError(f"{where} has no key 'name'; allowed: {', '.join(sorted(registries[kind]))}.")
    if kind == "model" and section["name"] == ModelOfInit.name:
        return ModelOfInit
    return fields.lookup(registries[kind], str(section["name"]), where + ".name")


def _declared(section: ConfigDict, cls: type, where: str, registries: Registries) -> dict[str, tuple[Any, dict]]:
    hints, tables = fields.annotations(cls), fields.tables(cls)
    keys = {f"{where}.{f.name}": (hints[f.name], dict(f.metadata)) for f in dataclasses.fields(cls) if f.name not in tables}
    for key, table in tables.items():
        for name, inner in section[key].items():
            path = f"{where}.{key}.{name}"
            keys |= _declared(inner, _class_of(inner, registries, table, path), path, registries)
    return keys


def schema(config: ConfigDict, registries: Registries) -> dict[str, tuple[Any, dict]]:
    """Every dotted key of `config` with its type and declaration; `registries` maps model, objective, eval to {name: Config class}."""
    classes = {**SECTIONS, "model": _class_of(config.model, registries, "model", "model")}
    classes["objective"] = _class_of(config.objective, registries, "objective", "objective")
    classes |= {f"evals.{name}": _class_of(config.evals[name], registries, "eval", f"evals.{name}") for name in config.evals}
    hints = fields.annotations(Config)
    keys = {f.name: (hints[f.name], dict(f.metadata)) for f in dataclasses.fields(Config) if f.metadata}
    for where, cls in classes.items():
        section = config.evals[where.removeprefix("evals.")] if where.startswith("evals.") else config[where]
        keys |= _declared(section, cls, where, registries)
    return keys


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """What a misspelt dotted key may mean: the same name in another section, a similar name in its own, or the names that its section has."""
    known, (section, _, leaf) = list(keys), key.rpartition(".")
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    inside = [other.rpartition(".")[2] for other in known if section and other.rpartition(".")[0] == section]
    if same or not inside:
        return fields.nearest(key, same) or fields.nearest(key, known)
    hint = fields.nearest(leaf, inside)
    return hint.replace(" '", f" '{section}.") if hint else f" Keys of {section}: {', '.join(inside)}."


def override(config: ConfigDict, key: str, text: str, registries: Registries) -> None:
    """Sets the leaf `key` (dotted) to the value that `text` stands for; refuses unknown keys and wrong types."""
    keys = schema(config, registries)
    if key not in keys:
        if key.endswith(".name") and key.split(".")[0] in ("model", "objective", "evals"):
            raise ConfigError(f"--config.{key} cannot be overridden: the keys beside it would not fit. Choose it in the recipe, or by the recipe's argument.")
        if any(known.startswith(key + ".") for known in keys):
            raise ConfigError(f"--config.{key} is a section; set one of: {', '.join(k for k in keys if k.startswith(key + '.'))}.")
        raise ConfigError(f"unknown key --config.{key}.{nearest_key(key, keys)} `--print_config` lists all keys.")
    value = fields.parse(text, keys[key][0], f"--config.{key}")
    *path, leaf = key.split(".")
    node = config
    for part in path:
        node = node[part]
    with node.ignore_type():
        if fields.nullable(keys[key][0]):
            node.get_ref(leaf).set(value, type_safe=False)
        else:
            node[leaf] = value


def _read_all(sections: ConfigDict, where: str, registries: Registries, kind: str) -> dict[str, Any]:
    _require_section(sections, where)
    for name in sections:
        if not untrusted.is_name(name) or "." in name:
            raise ConfigError(f"{where} has an entry named {name!r}; allowed: letters, digits, _, - and + (files and keys are named after it).")
    paths = {name: f"{where}.{name}" for name in sections}
    return {name: _read(sections[name], _class_of(sections[name], registries, kind, path), path, registries) for name, path in paths.items()}


def _read(section: Any, cls: type, where: str, registries: Registries) -> Any:
    _require_section(section, where)
    hints, tables = fields.annotations(cls), fields.tables(cls)
    given = dict(section)
    if "name" not in hints:
        given.pop("name", None)
    for key in given:
        if key not in hints:
            raise ConfigError(f"unknown key {where}.{key}.{fields.nearest(key, hints)} Allowed: {', '.join(hints)}.")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in given and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"missing key {where}.{missing[0]}.")
    inner = {key: _read_all(given[key], f"{where}.{key}", registries, table) for key, table in tables.items() if key in given}
    value = cls(**inner, **{key: fields.coerce(item, hints[key], f"{where}.{key}") for key, item in given.items() if key not in tables})
    fields.check(value, where)
    return value


def resolve(config: ConfigDict | dict, registries: Registries) -> Config:
    """The checked dataclasses of a config. Raises ConfigError on an unknown, missing, mistyped or out-of-range key."""
    config = _as_config(config, "the config")
    known = (*TOP_LEVEL, "model", "objective", "evals", *SECTIONS)
    for key in config:
        if key not in known:
            raise ConfigError(f"unknown key {key}.{fields.nearest(key, known)} Allowed: {', '.join(known)}.")
    missing = [key for key in known if key not in config]
    if missing:
        raise ConfigError(f"missing section {missing[0]}; make configs with ptm.config.base().")
    parts = {name: _read(config[name], cls, name, registries) for name, cls in SECTIONS.items()}
    parts["model"] = _read(config.model, _class_of(config.model, registries, "model", "model"), "model", registries)
    parts["objective"] = _read(config.objective, _class_of(config.objective, registries, "objective", "objective"), "objective", registries)
    parts["evals"] = _read_all(config.evals, "evals", registries, "eval")
    resolved = Config(**parts, **{key: config[key] for key in TOP_LEVEL})
    fields.check(resolved, "")
    return resolved


def complete(stored: dict[str, Any], registries: Registries) -> dict[str, Any]:
    """A config as it was stored by `to_dict`, perhaps long ago, with the keys and sections that were declared since, at their defaults.

    A key that is declared later must therefore mean by its default what was done before it. Raises ConfigError for a key that is not declared.
    """
    top = {f.name: f.default for f in dataclasses.fields(Config) if f.metadata}
    known = (*TOP_LEVEL, "model", "objective", "evals", *SECTIONS)
    for key in stored:
        if key not in known:
            raise ConfigError(f"unknown key {key}.{fields.nearest(key, known)} Allowed: {', '.join(known)}.")
    for key in ("model", "objective"):
        if key not in stored:
            raise ConfigError(f"the config has no {key}.")

    def entry(section: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
        return filled(section, _class_of(_as_config(section, where), registries, kind, where), where)

    def filled(section: dict[str, Any], cls: type, where: str) -> dict[str, Any]:
        _require_section(section, where)
        hints, tables = fields.annotations(cls), fields.tables(cls)
        for key in tables:
            if key in section:
                _require_section(section[key], f"{where}.{key}")
        for key in section:
            if key not in hints and key != "name":
                raise ConfigError(f"unknown key {where}.{key}.{fields.nearest(key, hints)} Allowed: {', '.join(hints)}.")
        added = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in section and f.default is not dataclasses.MISSING}
        inner = {
            key: {name: entry(part, table, f"{where}.{key}.{name}") for name, part in section[key].items()} if key in section else {}
            for key, table in tables.items()
        }
        return {**section, **inner, **{key: list(value) if isinstance(value, tuple) else value for key, value in added.items()}}

    if "evals" in stored:
        _require_section(stored["evals"], "evals")
    sections = {name: filled(stored[name] if name in stored else {}, cls, name) for name, cls in SECTIONS.items()}
    parts = {name: entry(stored[name], name, name) for name in ("model", "objective")}
    evals = {name: entry(section, "eval", f"evals.{name}") for name, section in stored["evals"].items()} if "evals" in stored else {}
    return {**top, **stored, **parts, "evals": evals, **sections}


def to_dict(config: Any) -> dict[str, Any]:
    """A resolved Config (or one of its sections) as plain JSON-ready dicts, names of entries included."""
    out: dict[str, Any] = {"name": config.name} if hasattr(config, "name") else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, dict):
            value = {name: to_dict(item) for name, item in value.items()}
        elif dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        out[f.name] = value
    return out


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> value of a resolved Config or of its dict."""
    tree = config if isinstance(config, dict) else to_dict(config)
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= {f"{key}.{k}": v for k, v in flatten(value).items()} if isinstance(value, dict) else {key: value}
    return out


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new); a key missing on one side is None there."""
    before, after = flatten(old), flatten(new)
    keys = list(dict.fromkeys([*before, *after]))
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def fingerprint(config: Any) -> str:
    """First 16 hex digits of the sha256 of a config (or section) in canonical JSON."""
    tree = config if isinstance(config, dict) else to_dict(config)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _defaults(config: Any) -> Any:
    return type(config)(**{key: {name: _defaults(part) for name, part in getattr(config, key).items()} for key in fields.tables(type(config))})


def defaults_of(config: Config) -> Config:
    """`base()` for the same model, objective and evals: what a config's difference is told against."""
    top = {f.name: f.default for f in dataclasses.fields(Config) if f.metadata}
    evals = {name: _defaults(options) for name, options in config.evals.items()}
    sections = {name: cls() for name, cls in SECTIONS.items()}
    return Config(model=_defaults(config.model), objective=_defaults(config.objective), evals=evals, **top, **sections)
