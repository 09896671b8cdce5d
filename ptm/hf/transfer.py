"""A family's table read in both directions: a directory's tensors become our parameters, our parameters become tensors."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ptm import config as config_lib
from ptm import fields, models, parallel, tree
from ptm.fields import ConfigError
from ptm.hf import files
from ptm.hf.tables import ALWAYS, Architecture, Family, Ignored, blank, named
from ptm.nn.context import Context
from ptm.nn.heads import head_names, split_head

MAX_LINES = 40
LAYERS, MOST_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), 4096
MOST_SIZE, SIZE_ALLOWED = 4, 10**8  # parameters of a config for each number in its files, and so many in any case: less is told tensor by tensor
LABELLED = ("classify", "tag")  # heads whose outputs have names


class Source:
    """The tensors of a directory under the names that rules use."""

    def __init__(self, family: Family, directory: files.Directory) -> None:
        self.directory = directory
        self.stored: dict[str, str] = {}
        for name in directory.tensors:
            if (first := self.stored.setdefault(self._renamed(family, name), name)) != name:
                raise ConfigError(f"'{directory.folder}' holds a tensor under two names, {first} and {name}; only one can be read, remove the other.")
        prefixes = sorted({architecture.prefix for architecture in family.architectures} - {""}, key=len, reverse=True)
        self.prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in self.stored)), "")

    @staticmethod
    def _renamed(family: Family, name: str) -> str:
        for pattern, today in family.renames:
            name = re.sub(pattern, today, name)
        return name

    def __contains__(self, name: str) -> bool:
        return named(name, self.prefix) in self.stored

    def tensor(self, name: str) -> files.Tensor:
        """Type and shape of a tensor."""
        return self.directory.tensors[self.stored[named(name, self.prefix)]]

    def read(self, name: str) -> np.ndarray:
        """A tensor's array; float32 unless it is of integers."""
        array = self.directory.read(self.stored[named(name, self.prefix)])
        return array.astype(np.float32) if self.tensor(name).dtype in files.FLOATS else array


class Imported(NamedTuple):
    """What a directory holds, in our terms. `notes` are what a user should know, `labels` the names of what a head `classify:N` or `tag:N` gives."""

    family: Family
    config: Any
    heads: tuple[str, ...]
    params: dict[str, Any]
    notes: list[str]
    labels: tuple[str, ...] = ()


@functools.cache
def layout() -> parallel.Layout:
    """One device."""
    return parallel.make_layout(config_lib.Mesh(data=1), devices=jax.local_devices()[:1])


def model(config: Any, heads: tuple[str, ...]) -> models.Model:
    """The model of a config on one device, computing in float32."""
    return models.make(config, context=Context(layout=layout()), heads=heads)


def shapes(config: Any, heads: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of all parameters of a model."""
    lengths = {"L": 2, "I": 2} if config.kind == "encoder_decoder" else {"L": 2}
    drawn = jax.eval_shape(functools.partial(model(config, heads).init, lengths=lengths), jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in tree.paths(drawn).items()}


def _refuse(what: str, problems: list[str], advice: str) -> None:
    if problems:
        more = [f"... and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        raise ConfigError("\n  ".join([what, *problems[:MAX_LINES], *more, advice]))


def read_config(family: Family, theirs: Mapping[str, Any], source: Source | None = None) -> tuple[Any, list[str]]:
    """Our config of their config.json, or None, and the problems."""
    keys: dict[str, Any] = {}
    problems = []
    for key in LAYERS:
        if key in theirs and isinstance(theirs[key], int) and theirs[key] > MOST_LAYERS:  # tables make lists of so many
            return None, [f"config     {key}={theirs[key]} is not supported; supported: up to {MOST_LAYERS}"]
    for alias, name in family.aliases.items():
        if alias in theirs:
            if name in theirs and theirs[name] != theirs[alias]:
                problems.append(f"config     {name}={theirs[name]!r} and {alias}={theirs[alias]!r} mean the same key; they must be equal")
            theirs = {**theirs, name: theirs[alias]}
    for entry in (*ALWAYS, *family.keys):
        try:
            keys |= entry.read_from(theirs)
        except ConfigError as error:
            problems.append(f"config     {error}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of a value that is no number, no list, no table
            problems.append(f"config     a value has another form than the reference gives it ({type(error).__name__}: {error})")
    if problems:
        return None, problems
    try:
        if source is not None:
            family.adjust(source, keys)
        cls = models.MODELS[family.name].config
        hints = fields.annotations(cls)
        made = fields.tables(cls)  # read by tables of their own
        config = cls(**{key: value if key in made else fields.coerce(value, hints[key], f"model.{key}") for key, value in keys.items()})
        fields.check(config, "model")
    except ConfigError as error:
        return None, [f"config     {error}"]
    return config, []


def with_implied(family: Family, heads: Sequence[str]) -> tuple[str, ...]:
    """Heads, and those whose parameters they need."""
    needed = [family.implies[split_head(head)[0]] for head in heads if split_head(head)[0] in family.implies]
    return tuple(dict.fromkeys([*heads, *needed]))


def found_heads(family: Family, source: Source) -> tuple[str, ...]:
    """Heads of a directory: those whose tensors are there, and those of its class that have none. Of heads that share a tensor, the class's, else the first."""
    theirs = source.directory.config
    named = theirs["architectures"] if isinstance(theirs.get("architectures"), list) else []
    known = [architecture for architecture in family.architectures if architecture.name in named] or family.architectures[:1]
    declared = [head for architecture in known for head in architecture.heads]
    heads, taken = [head for head in declared if head not in family.signs], set()
    for head in sorted(family.signs, key=lambda head: head not in declared):
        sign = family.signs[head]
        if sign in source and sign not in taken:
            taken.add(sign)
            heads.append(f"{head}:{source.tensor(sign).shape[0]}" if head in LABELLED else head)
    return with_implied(family, heads)


def label_names(theirs: Mapping[str, Any], heads: Sequence[str]) -> tuple[str, ...]:
    """Names of the outputs of a head `classify:N` or `tag:N` by their id2label; LABEL_0, ... as the reference calls those that it does not name."""
    count = next((size for name, size in map(split_head, heads) if name in LABELLED), 0)
    given = theirs["id2label"] if isinstance(theirs.get("id2label"), dict) else {}
    names = tuple(str(given[str(n)]) if str(n) in given else f"LABEL_{n}" for n in range(count))
    return names if len(set(names)) == count else tuple(f"LABEL_{n}" for n in range(count))


def read(family: Family, directory: files.Directory) -> Imported:
    """The model of a directory. Raises one ConfigError that lists everything that is missing, left over, of another shape or type, or not supported."""
    source = Source(family, directory)
    config, problems = read_config(family, directory.config, source)
    advice = "Nothing was converted."
    what = f"'{directory.folder}' (model_type {family.model_type}) cannot be read:"
    if config is None:
        _refuse(what, problems, advice)
    heads = found_heads(family, source)
    wanted, used = _affordable(config, heads, directory), set()
    params: dict[str, np.ndarray] = {}
    rules, mapped = family.rules(config, heads), set()
    for rule in rules:
        if unknown := [path for path in rule.paths if path not in wanted]:
            problems.append(f"unmapped   {', '.join(unknown)} of {rule.theirs}: the model has no such parameter")
            continue
        mapped |= set(rule.paths)
        full = [wanted[path] for path in rule.paths]
        own = [shape[1:] for shape in full] if rule.layered else full
        expected = rule.transform.write(tuple(map(blank, own))).shape
        names = rule.names(full[0][0] if rule.layered else 1, source.prefix)
        used |= {*names.values(), *(named(copy, source.prefix) for copy in rule.copies)}
        wrong = []
        for name in names.values():
            if name not in source:
                wrong.append(f"missing    {name} {expected}")
            elif source.tensor(name).shape != expected:
                wrong.append(f"shape      {name} expected {expected}, got {source.tensor(name).shape}")
            elif source.tensor(name).dtype not in files.FLOATS:
                wrong.append(f"dtype      {name} is {source.tensor(name).dtype}; allowed: {', '.join(files.FLOATS)}")
        problems += wrong
        if problems:
            continue
        if not rule.layered:
            params |= zip(rule.paths, rule.transform.read(source.read(names[0]), own))
            continue
        for path, shape in zip(rule.paths, full):
            params[path] = np.empty(shape, np.float32)
            for layer, value in rule.absent.items():
                params[path][layer] = value
        for layer, name in names.items():
            for path, leaf in zip(rule.paths, rule.transform.read(source.read(name), own)):
                params[path][layer] = leaf
    problems += [f"unmapped   {path} {wanted[path]}: no tensor of theirs is for it" for path in wanted if path not in mapped]
    problems += _left_over(family, source, used)
    _refuse(what, problems, advice)
    notes = ["auto_map of config.json is ignored: no code that a directory names is run."] if "auto_map" in directory.config else []
    return Imported(family, config, heads, tree.unflatten({path: np.asarray(leaf, np.float32) for path, leaf in params.items()}), notes, label_names(directory.config, heads))


def _affordable(config: Any, heads: tuple[str, ...], directory: files.Directory) -> dict[str, tuple[int, ...]]:
    """The shapes of a model that its files could fill; a config.json of a few bytes may claim any size."""
    held = sum(math.prod(tensor.shape) for tensor in directory.tensors.values())
    try:
        wanted = shapes(config, heads)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"'{directory.folder}': {files.CONFIG} describes no model that can be made ({' '.join(str(error).split())[:200]}).") from None
    size = sum(map(math.prod, wanted.values()))
    if size > MOST_SIZE * held + SIZE_ALLOWED:
        told = f"describes {size:,} parameters, but its files hold {held:,} numbers"
        raise ConfigError(f"'{directory.folder}': {files.CONFIG} {told}. Fetch all files of the model.")
    return wanted


def _left_over(family: Family, source: Source, used: set[str]) -> list[str]:
    problems = []
    for name in sorted(set(source.stored) - used):
        matching = [entry for entry in family.ignored if re.fullmatch(named(entry.pattern, re.escape(source.prefix)), name)]
        if not matching:
            problems.append(f"left over  {name} {source.tensor(name).shape}")
        elif not any(_holds(entry, name, source) for entry in matching):
            problems.append(f"left over  {name} {source.tensor(name).shape} is not {' or '.join(entry.what for entry in matching)}")
    return problems


def _holds(entry: Ignored, name: str, source: Source) -> bool:
    def other(of: str) -> np.ndarray:
        return source.read(of) if of in source else np.empty(0)

    return entry.check(source.read(name), other)


def architecture_for(family: Family, heads: tuple[str, ...]) -> Architecture:
    """The class that holds most of these heads and none else."""
    names = head_names(with_implied(family, heads))
    fitting = [architecture for architecture in family.architectures if names >= set(architecture.heads)]
    return max(fitting, key=lambda architecture: len(architecture.heads))


class Exported(NamedTuple):
    """A directory's content to be: config, tensors, the class, our heads that it holds, and what a user should know."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    architecture: Architecture
    heads: tuple[str, ...]
    notes: list[str]


def write_config(family: Family, config: Any, heads: tuple[str, ...]) -> dict[str, Any]:
    """Their config.json of our config. Raises one ConfigError that lists what has no counterpart."""
    theirs: dict[str, Any] = {"architectures": [architecture_for(family, heads).name], "model_type": family.model_type, "vocab_size": config.vocab_size}
    problems = []
    for entry in family.keys:
        try:
            theirs |= entry.write_to(config)
        except ConfigError as error:
            problems.append(f"config     {error}")
    _refuse(f"model {config.name} cannot be written as model_type {family.model_type}:", problems, "Nothing was written.")
    for count in filter(None, (split_head(head)[1] for head in heads)):
        theirs |= {"id2label": {str(n): f"LABEL_{n}" for n in range(count)}, "label2id": {f"LABEL_{n}": n for n in range(count)}}
    return theirs


def write(family: Family, config: Any, heads: tuple[str, ...], params: Mapping[str, Any]) -> Exported:
    """Their config and tensors (float32) of our parameters; heads that no class of theirs has together are left out, with a note."""
    architecture = architecture_for(family, heads)
    heads = with_implied(family, heads)
    kept = tuple(head for head in heads if split_head(head)[0] in architecture.heads)
    theirs = write_config(family, config, kept)
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in tree.paths(params).items()}
    dropped = [head for head in heads if head not in kept]
    notes = [f"{architecture.name} has no head for {', '.join(dropped)}: left out."] if dropped else []
    problems, tensors, mapped = [], {}, set()
    wanted = shapes(config, kept)
    for rule in family.rules(config, kept):
        if wrong := [path for path in rule.paths if path not in leaves or path not in wanted or leaves[path].shape != wanted[path]]:
            problems += [f"shape      {path} expected {wanted.get(path)}, got {leaves[path].shape if path in leaves else None}" for path in wrong]
            continue
        mapped |= set(rule.paths)
        ours = [leaves[path] for path in rule.paths]
        names = rule.names(len(ours[0]) if rule.layered else 1, architecture.prefix)
        for layer, name in names.items():
            tensors[name] = rule.transform.write(tuple(leaf[layer] for leaf in ours) if rule.layered else tuple(ours))
        tensors |= {named(copy, architecture.prefix): tensors[names[0]] for copy in rule.copies}
    problems += [f"unmapped   {path} {wanted[path]}: no tensor of theirs is for it" for path in wanted if path not in mapped]
    problems += [f"left over  {path} {leaves[path].shape}: the model has no such parameter" for path in leaves.keys() - shapes(config, heads).keys()]
    _refuse(f"model {config.name} cannot be written as {architecture.name}:", problems, "Nothing was written.")
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in family.unused(config).items()}
    return Exported(theirs, tensors, architecture, kept, notes)
