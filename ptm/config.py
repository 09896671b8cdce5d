"""The config of a run: its run-level sections, `base()` for recipes, overrides, and the way back to checked dataclasses.

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

from ptm import fields
from ptm.fields import ConfigError, field

Registries = dict[str, dict[str, type]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Length and size of a run."""

    steps: int = field(1000, low=1, unit="steps", doc="Optimizer steps of the whole run.")
    batch_size: int = field(32, low=1, unit="rows", doc="Rows of one optimizer step, over all devices and microbatches.")
    microbatches: int = field(1, low=1, doc="Parts of a batch computed one after the other; gradients are those of the whole batch.")
    ema_decay: float | None = field(None, low=0.0, high=1.0, doc="Decay per step of an exponential moving average of the parameters; None keeps none.")
    skip_sigma: float | None = field(
        None, low=0.0, doc="Skip steps whose loss or gradient norm is not finite or so far above the window's mean; None = never.", unit="deviations"
    )
    skip_window: int = field(128, low=2, unit="steps", doc="Window of the mean and deviation that skip_sigma refers to.")
    max_skips: int = field(8, low=1, unit="steps", doc="Stop when so many steps in a row were skipped.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Where token ids come from."""

    kind: str = field("sentencepiece", doc="Entry of ptm.text.TOKENIZERS: bytes, chars, sentencepiece, wordpiece, bpe or file.")
    path: str | None = field(None, doc="Vocabulary file or folder; None builds it from the run's own training data and keeps it in the workdir.")
    vocab_size: int = field(4096, low=1, unit="pieces", doc="Size of a vocabulary that is trained.")
    algorithm: str = field("unigram", choices=("unigram", "bpe"), doc="Model of a sentencepiece vocabulary that is trained.")
    lowercase: bool = field(False, doc="Lower-case the text (wordpiece, and sentencepiece that is trained).")
    train_bytes: int = field(10_000_000, low=1, unit="bytes", doc="Text taken from the training split to train a vocabulary.")
    sentinels: int = field(0, low=0, unit="pieces", doc="Sentinels <extra_id_N> for span corruption; a trained vocabulary gets them on top of vocab_size.")
    extra: str | None = field(None, doc="File of pieces that extend the vocabulary, one a line; with init they begin as the mean of the pieces they replace.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where documents come from and how they become rows."""

    source: tuple[str, ...] = field(("python_docs:",), doc="FORMAT:PATH, ...: text, jsonl, csv, tsv, array_record, tfds, python_docs (what every Python has).")
    weights: tuple[float, ...] = field((), low=0.0, doc="Share of drawn documents per source, before packing; empty = all equal.")
    columns: tuple[str, ...] = field(("text=text",), doc="Map of fields to columns of the source, as FIELD=COLUMN.")
    document: str = field("line", choices=("line", "paragraph", "file"), doc="What one document of a text source is; a paragraph ends at an empty line.")
    validation_source: tuple[str, ...] = field((), doc="Sources of the validation split; empty holds out a part of `source`.")
    holdout: float = field(0.05, low=0.0, high=0.5, doc="Share held out of `source` for validation.")
    holdout_by: str = field("document", choices=("document", "tail"), doc="Hold out documents by a hash of their text, or the last characters of each.")
    length: int = field(128, low=2, unit="tokens", doc="Length of a row (of the decoder's row for encoder-decoders).")
    packing: str = field(
        "default", choices=("default", "concat", "first_fit", "window", "none"),
        doc="How examples become rows; default = as the objective wants it, window = a random window of a document at each visit.",
    )  # fmt: skip
    packing_bins: int = field(32, low=1, unit="rows", doc="Rows that first-fit packing keeps open in each stream.")
    max_record_tokens: int = field(65_536, low=2, unit="tokens", doc="Longer documents are split, with ids ID#0, ID#1, ...")
    max_bad_records: int = field(100, low=0, unit="records", doc="Records that cannot be read are named and skipped; one more than this stops the run.")
    streams: int | None = field(None, low=1, doc="Logical streams S; divides train.batch_size. None = the greatest common divisor of train.batch_size and 64.")
    shuffle: bool = field(True, doc="Visit documents in a new random order each epoch.")
    prefetch: int = field(2, low=0, unit="batches", doc="Batches prepared ahead in a background thread; 0 = none.")

    def check(self, where: str) -> None:
        if not self.source:
            raise ConfigError(f"{where}.source is empty; give at least one source such as text:corpus/*.txt.")
        for key, entries in (("source", self.source), ("validation_source", self.validation_source)):
            for entry in entries:
                if ":" not in entry:
                    raise ConfigError(f"{where}.{key}={fields.unparse(entries)}: '{entry}' is not of the form FORMAT:PATH, such as text:corpus/*.txt.")
        if self.weights and (len(self.weights) != len(self.source) or not sum(self.weights)):
            given = f"{where}.weights={fields.unparse(self.weights)}"
            raise ConfigError(f"{given} must hold one weight for each of the {len(self.source)} entries of {where}.source, not all 0.")
        for entry in self.columns:
            if entry.count("=") != 1 or entry.startswith("=") or entry.endswith("="):
                raise ConfigError(f"{where}.columns={fields.unparse(self.columns)}: '{entry}' is not of the form FIELD=COLUMN, such as text=body.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Update rule; patterns are regular expressions matched against whole parameter paths such as decoder/layers/mlp/wi/kernel."""

    name: str = field("adamw", doc="Entry of ptm.optim.OPTIMIZERS: adamw, adafactor, lamb, lion, sgd, muon.")
    learning_rate: float = field(1e-3, low=0.0, doc="Peak learning rate.")
    weight_decay: float = field(0.01, low=0.0, doc="Decoupled weight decay, multiplied by the learning rate.")
    no_decay: tuple[str, ...] = field((".*/bias", ".*/scale", ".*norm.*"), doc="Patterns of parameters that are not decayed.")
    b1: float = field(0.9, low=0.0, high=1.0, doc="Decay of the first moment (momentum of sgd and muon).")
    b2: float = field(0.999, low=0.0, high=1.0, doc="Decay of the second moment.")
    eps: float = field(1e-8, low=0.0, doc="Added to the root of the second moment.")
    clip_norm: float | None = field(1.0, low=0.0, doc="Largest global norm of the gradient; None never clips.")
    layerwise_decay: float = field(1.0, low=0.0, high=1.0, doc="Factor of the learning rate from each layer to the one below it (ELECTRA, appendix); 1 = none.")
    freeze: tuple[str, ...] = field((), doc="Patterns of parameters that stay as they are.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the steps, as a factor of the peak."""

    name: str = field("cosine", doc="Entry of ptm.optim.SCHEDULES: constant, linear, cosine, rsqrt, wsd.")
    warmup_steps: int = field(0, low=0, unit="steps", doc="Linear warm-up from 0.")
    final_factor: float = field(0.0, low=0.0, high=1.0, doc="Factor of the peak at the last step (linear, cosine, wsd).")
    decay_share: float = field(0.2, low=0.0, high=1.0, doc="Share of the run that wsd decays over.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices and how arrays lie on them; the product of the axes is the number of devices, one axis may be -1."""

    preset: str = field("fsdp+tp", doc="Row of ptm.parallel.RULES: dp, fsdp, tp, fsdp+tp, sp.")
    data: int = field(-1, low=-1, unit="devices", doc="Axis over which only the batch is split.")
    fsdp: int = field(1, low=-1, unit="devices", doc="Axis over which the batch and the parameters are split.")
    tensor: int = field(1, low=-1, unit="devices", doc="Axis over which heads, feed-forward and vocabulary are split.")
    sequence: int = field(1, low=-1, unit="devices", doc="Axis over which the length is split.")

    def check(self, where: str) -> None:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "preset"}
        if 0 in sizes.values() or sum(size == -1 for size in sizes.values()) > 1:
            given = ", ".join(f"{where}.{axis}={size}" for axis, size in sizes.items())
            raise ConfigError(f"{given}; allowed: positive numbers, and -1 (the devices that are left) at most once.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the same mathematics is computed; nothing here changes what a run means."""

    dtype: str = field("float32", choices=("float32", "bfloat16"), doc="Type of activations; parameters and losses stay float32.")
    attention: str = field("auto", choices=("auto", "xla", "chunked", "cudnn"), doc="Attention backend; auto picks by device, mask and length.")
    attention_chunk: int = field(512, low=1, unit="tokens", doc="Queries computed at once by the chunked backend.")
    scan_layers: bool = field(True, doc="Compile one layer and loop, or unroll all layers (slower to compile, often faster to run).")
    remat: str = field("none", choices=("none", "dots", "full"), doc="What the backward pass recomputes of a layer: nothing, all but matrix products, all.")
    loss_chunk: int = field(4096, low=1, unit="tokens", doc="Positions whose vocabulary logits exist at once.")
    cache: str | None = field("auto", doc="Folder of the persistent compile cache; auto = in the user's cache folder; None = none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept of a run. The last step is always saved."""

    every: int = field(500, low=1, unit="steps", doc="Save each time so many steps are done.")
    keep_latest: int = field(2, low=1, unit="checkpoints", doc="Newest checkpoints that are kept.")
    keep_best: int = field(1, low=0, unit="checkpoints", doc="Best checkpoints by `metric` that are kept besides.")
    metric: str = field("validation/loss", doc="Eval metric that keep_best compares.")
    mode: str = field("min", choices=("min", "max"), doc="Whether a smaller or a larger metric is better.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What is written while a run goes on."""

    every: int = field(10, low=1, unit="steps", doc="Write a row of metrics each time so many steps are done.")
    writers: tuple[str, ...] = field(("tensorboard",), doc="Writers besides metrics.jsonl: entries of ptm.log.WRITERS.")
    norms: bool = field(False, doc="Norms of gradient, parameters and update per parameter group in each row.")
    profile: tuple[int, ...] = field((), low=0, unit="steps", doc="First and last step of a profiler trace; empty = none.")

    def check(self, where: str) -> None:
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            raise ConfigError(f"{where}.profile={fields.unparse(self.profile)}; allowed: two steps FIRST,LAST with FIRST <= LAST, or nothing.")


SECTIONS: dict[str, type] = {
    "train": Train, "data": Data, "tokenizer": Tokenizer, "optimizer": Optimizer, "schedule": Schedule,
    "mesh": Mesh, "compute": Compute, "checkpoint": Checkpoint, "log": Log,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run, resolved: `model`, `objective` and the values of `evals` are the Config dataclasses of their entries."""

    seed: int = field(0, low=0, high=2**31 - 1, doc="Seed of initialisation, data order, masking and dropout.")
    init: str = field("scratch", doc="Where parameters start: scratch, ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR, hub:ORG/NAME[@REVISION].")
    model: Any
    objective: Any
    evals: dict[str, Any]
    train: Train
    data: Data
    tokenizer: Tokenizer
    optimizer: Optimizer
    schedule: Schedule
    mesh: Mesh
    compute: Compute
    checkpoint: Checkpoint
    log: Log


TOP_LEVEL = tuple(f.name for f in dataclasses.fields(Config) if f.metadata)


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


def base(*, model: Any, objective: Any, evals: dict[str, Any] | None = None, **sections: Any) -> ConfigDict:
    """The config of a run with every default filled in, for a recipe to change and the command line to override.

    `model`, `objective` and the values of `evals` are Config dataclasses of the package's tables; `sections` may replace run-level
    sections (train=Train(...), data=Data(...), ...) and the top-level keys seed and init.
    """
    unknown = set(sections) - set(SECTIONS) - set(TOP_LEVEL)
    if unknown:
        word = sorted(unknown)[0]
        raise ConfigError(f"base() got '{word}'; allowed: {', '.join((*TOP_LEVEL, *SECTIONS))}.{fields.nearest(word, (*TOP_LEVEL, *SECTIONS))}")
    defaults = {f.name: f.default for f in dataclasses.fields(Config) if f.metadata}
    config = ConfigDict(defaults | {key: value for key, value in sections.items() if key in defaults})
    config.model = _section(model)
    config.objective = _section(objective)
    config.evals = ConfigDict({name: _section(value) for name, value in (evals or {}).items()})
    for name, cls in SECTIONS.items():
        section = sections[name] if name in sections else cls()
        if not isinstance(section, cls):
            raise ConfigError(f"base({name}=...) got a {type(section).__name__}; allowed: ptm.config.{cls.__name__}(...).")
        config[name] = _section(section)
    config.lock()
    return config


def _class_of(section: ConfigDict, registries: Registries, kind: str, where: str) -> type:
    if not isinstance(section, ConfigDict):
        raise ConfigError(f"{where}={section!r} is no section; allowed: keys with their values.")
    if "name" not in section:
        raise ConfigError(f"{where} has no key 'name'; allowed: {', '.join(sorted(registries[kind]))}.")
    return fields.lookup(registries[kind], section.name, where + ".name")


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
    paths = {name: f"{where}.{name}" for name in sections}
    return {name: _read(sections[name], _class_of(sections[name], registries, kind, path), path, registries) for name, path in paths.items()}


def _read(section: Any, cls: type, where: str, registries: Registries) -> Any:
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
    inner = {key: _read_all(given[key], f"{where}.{key}", registries, table) for key, table in tables.items()}
    value = cls(**inner, **{key: fields.coerce(item, hints[key], f"{where}.{key}") for key, item in given.items() if key not in tables})
    fields.check(value, where)
    return value


def resolve(config: ConfigDict | dict, registries: Registries) -> Config:
    """The checked dataclasses of a config. Raises ConfigError on an unknown, missing, mistyped or out-of-range key."""
    config = ConfigDict(config)
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
