"""Recipes: Python files whose `get_config(argument)` returns what ptm.config.base() gave it, changed as they like."""

import importlib.util
import os
import traceback
from typing import Any, NamedTuple

from ptm import config as config_lib
from ptm import fields
from ptm.config import ConfigDict
from ptm.fields import ConfigError


def load(spec: str) -> ConfigDict:
    """The ConfigDict of `FILE.py[:ARGUMENT]`, by calling the file's `get_config(argument)`.

    Raises ConfigError if there is no such file or function, or with the line of the file if a config refused what the recipe did.
    """
    config = call(spec, function="get_config", what="recipe")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config of recipe '{spec.partition(':')[0]}' returned a {type(config).__name__}; it must return what ptm.config.base() gave it.")
    return config


def call(spec: str, *, function: str, what: str) -> Any:
    """What the function of the file `FILE.py[:ARGUMENT]` returns for the argument; `what` is such a file called.

    Raises ConfigError if there is no such file or function, or with the line of the file that went wrong.
    """
    path, _, argument = spec.partition(":")
    if not os.path.isfile(path):
        folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
        known = sorted(f for f in os.listdir(folder) if f.endswith(".py")) if os.path.isdir(folder) else []
        raise ConfigError(f"no {what} '{path}'. In {folder}: {', '.join(known) or 'no .py file'}.{fields.nearest(os.path.basename(path), known)}")
    module_spec = importlib.util.spec_from_file_location(f"ptm_{what}", path)
    if module_spec is None:
        raise ConfigError(f"{what} '{path}' is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{what} '{path}', line {error.lineno}: {error.msg}.") from error
    except (AttributeError, ImportError, KeyError, NameError, TypeError) as error:
        raise ConfigError(f"{what} '{path}', line {_line(error, path)}: {_reason(error)}") from error
    if not hasattr(module, function):
        raise ConfigError(f"{what} '{path}' has no function {function}(argument).")
    try:
        return getattr(module, function)(argument)
    except (AttributeError, KeyError, NameError, TypeError) as error:
        raise ConfigError(f"{what} '{path}', line {_line(error, path)}: {_reason(error)}") from error


def _line(error: Exception, path: str) -> int:
    """The innermost line of the recipe that an error came from; 1 if it came from the call itself."""
    return [1, *(frame.lineno for frame in traceback.extract_tb(error.__traceback__) if os.path.abspath(frame.filename) == os.path.abspath(path))][-1]


def _reason(error: Exception) -> str:
    """An error's message without the values of a whole section that ml_collections puts between the reason and the nearest key."""
    text = str(error.args[0] if error.args else type(error).__name__)
    text = text.replace("\\n", "\n").replace("\\'", "'")  # of an attribute it tells the repr of what it tells of a key
    text = text[1:-1] if text[:1] == text[-1:] == "'" else text
    reason, others, rest = text.partition(" Other fields present:")
    text = f"{reason} {rest.splitlines()[-1]}" if others else text.replace("'\n", "'. ")
    return f"no key {text}" if text.startswith("'") else text


class Words(NamedTuple):
    """The words of a recipe's argument, one of each kind; an empty string where none was given."""

    recipe: str
    objective: str
    scale: str


def words(
    argument: str, *, recipes: tuple[str, ...], objectives: tuple[str, ...] = (), scales: tuple[str, ...] = ("tiny",), extras: tuple[str, ...] = ()
) -> Words:
    """A recipe's argument: comma-separated words in any order, at most one of each kind; the first recipe is the default.

    Extras are words that may stand beside all others; who declares them looks for them in the argument.
    """
    known = {"recipe": recipes, "objective": objectives, "scale": scales, "extra": extras}
    chosen = dict.fromkeys(Words._fields, "")
    for word in filter(None, argument.split(",")):
        kinds = [kind for kind, names in known.items() if word in names]
        if not kinds:
            listed = " ".join(f"{kind.capitalize()}s: {', '.join(names)}." for kind, names in known.items() if names)
            hint = fields.nearest(word, [name for names in known.values() for name in names])
            raise ConfigError(f"unknown word '{word}' in the recipe's argument ':{argument}'. {listed}{hint}")
        if kinds[0] == "extra":
            continue
        if chosen[kinds[0]]:
            raise ConfigError(f"':{argument}' names two {kinds[0]}s, '{chosen[kinds[0]]}' and '{word}'; give one at most.")
        chosen[kinds[0]] = word
    return Words(**{**chosen, "recipe": chosen["recipe"] or recipes[0]})


def tiny(config: ConfigDict, *, model: Any = None, length: int = 32) -> ConfigDict:
    """Makes the config a smoke run of seconds, in place: the same families, objective, optimizer and schedule at the smallest sizes, on bytes.

    `model` is that of a recipe which takes its own from init; `length` is of rows and of an encoder's input.
    """
    if model is not None:
        config_lib.set_section(config, "model", model)

    def lower(section: ConfigDict, sizes: dict[str, Any]) -> None:
        for key, size in sizes.items():
            if key in section and section[key] is not None:
                section[key] = size

    lower(config.model, {"num_layers": 2, "decoder_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 64, "embed_width": 16})
    lower(config.objective, {"input_length": length})
    config.train.update(steps=20, batch_size=8, microbatches=1)
    config.data.length = length
    config.tokenizer.update(kind="bytes", lowercase=False)
    config.schedule.warmup_steps = 2
    config.checkpoint.every, config.log.every = 10, 5
    for options in config.evals.values():
        lower(options, {"every": 10, "batch_size": 8})
    return config
