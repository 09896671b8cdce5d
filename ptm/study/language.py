"""What a study file says. `get_study(argument)` of experiments/NAME.py returns a Study: stages, arms that differ in declared ways, seeds, metrics, claims.

Keys are dotted config keys such as objective.rate; one of a later stage is written STAGE:KEY. Arms are written out, or made by `grid`,
`zipped`, `chain` and `sample`.
"""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptm import fields
from ptm.fields import ConfigError


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of every arm and seed: a recipe FILE.py[:WORDS] and what is overridden in it for all arms.

    `after` names the stage whose final checkpoint it starts from, of the same arm and seed; it has that one's model and tokenizer, whatever its recipe
    says of them, but for what is overridden.
    """

    name: str
    recipe: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: str | None = None


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: overrides of keys of the first stage, or of "STAGE:KEY"; `recipes` replace those of stages."""

    name: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of each run, "STAGE:EVAL/METRIC" at its last evaluation; `scale` is the factor of tables, and of what is published."""

    name: str
    higher: bool
    scale: float = 1.0
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """What a paper reports of an arm, in the units of its table."""

    arm: str
    metric: str
    value: float
    sd: float | None = None
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ordering:
    """A claim about two arms by a metric: one is better, or with relation "~" they do not differ."""

    better: str
    worse: str
    metric: str
    source: str = ""
    relation: str = ">"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving (Jamieson and Talwalkar 2016, section 3): after each rung, a step of the metric's stage, the share `keep` of the arms goes on.

    Arms are ranked by the mean of the metric over the seeds. The base always goes on.
    """

    metric: str
    rungs: tuple[int, ...]
    keep: float = 1 / 3


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Where a value is drawn from: between `low` and `high`, both included, or among `values`. Kinds: uniform, log_uniform, integers, choice."""

    kind: str
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()

    def draw(self, rng: random.Random) -> Any:
        """One value."""
        if self.kind == "choice":
            return rng.choice(self.values)
        if self.kind == "integers":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return rng.uniform(self.low, self.high)
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.values or (self.low, self.high)))})"


def uniform(low: float, high: float) -> Distribution:
    """Any number between two."""
    return _between("uniform", low, high)


def log_uniform(low: float, high: float) -> Distribution:
    """Any number between two positive ones, each order of magnitude as often as another."""
    if not (isinstance(low, int | float) and low > 0):
        raise ConfigError(f"log_uniform({low}, {high}) begins at {low}; allowed: numbers above 0.")
    return _between("log_uniform", low, high)


def integers(low: int, high: int) -> Distribution:
    """Any integer between two, both included."""
    if not isinstance(low, int) or not isinstance(high, int):
        raise ConfigError(f"integers({low}, {high}) is not between integers.")
    return _between("integers", low, high)


def choice(values: Iterable[Any]) -> Distribution:
    """Any of some values."""
    listed = _listed("choice", "values", values)
    if not listed:
        raise ConfigError("choice([]) has no value to choose from; give some, as in choice(['adamw', 'lamb']).")
    return Distribution("choice", values=tuple(listed))


def _between(kind: str, low: float, high: float) -> Distribution:
    if not low < high:
        raise ConfigError(f"{kind}({low}, {high}) holds no number; the first must be below the second.")
    return Distribution(kind, low=low, high=high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Arms that Optuna asks for, one after the other, each run under all seeds: key -> distribution, how many, and the metric that they are to improve."""

    space: Mapping[str, Distribution]
    trials: int
    metric: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A claim and the runs that test it.

    `base` is the arm that differences are told from; `differs` are the keys, or prefixes such as "objective.*", in which arms may differ from it.
    """

    claim: str
    paper: str
    stages: Sequence[Stage]
    arms: Sequence[Arm]
    base: str
    differs: Sequence[str]
    seeds: Sequence[int]
    metrics: Sequence[Metric]
    published: Sequence[Published] = ()
    orderings: Sequence[Ordering] = ()
    halving: Halving | None = None
    search: Search | None = None


def split_key(key: str, study: Study) -> tuple[str, str]:
    """The stage and the dotted key that "STAGE:KEY", or a key of the first stage, names."""
    stage, colon, own = key.partition(":")
    return (stage, own) if colon else (study.stages[0].name, key)


# Combinators.


def grid(values: Mapping[str, Iterable[Any]]) -> list[Arm]:
    """An arm for every combination of values of the keys; the last key changes fastest."""
    listed = {key: _listed("grid", key, items) for key, items in values.items()}
    return _arms("grid", tuple(listed), itertools.product(*listed.values()))


def zipped(values: Mapping[str, Iterable[Any]]) -> list[Arm]:
    """An arm for the first values of all keys, one for the second ones, and so on. Raises ConfigError for lists of different lengths."""
    listed = {key: _listed("zipped", key, items) for key, items in values.items()}
    if len({len(items) for items in listed.values()}) > 1:
        raise ConfigError(f"zipped() has lists of different lengths: {', '.join(f'{key} {len(items)}' for key, items in listed.items())}; make them equal.")
    return _arms("zipped", tuple(listed), zip(*listed.values(), strict=True))


def sample(space: Mapping[str, Distribution], *, count: int, seed: int) -> list[Arm]:
    """`count` arms with values drawn at random, the same for the same seed."""
    for key, distribution in space.items():
        if not isinstance(distribution, Distribution):
            raise ConfigError(f"sample(): {key}={distribution!r} is no distribution; allowed: uniform, log_uniform, integers, choice.")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"sample(count={count}); allowed: 1 or more arms.")
    draws = {key: random.Random(f"{seed}/{key}") for key in space}  # a key more changes none of the others
    return _arms("sample", tuple(space), [[distribution.draw(draws[key]) for key, distribution in space.items()] for _ in range(count)])


def chain(*lists: Iterable[Arm]) -> list[Arm]:
    """The arms of some lists, one after the other; of equal ones, which override the same, the first."""
    found: list[Arm] = []
    for arm in itertools.chain(*lists):
        if not any(arm.overrides == other.overrides and arm.recipes == other.recipes for other in found):
            found.append(arm)
    return found


def _listed(what: str, key: str, items: Iterable[Any]) -> list[Any]:
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise ConfigError(f"{what}(): {key}={items!r} is no list of values; write [{items!r}].")
    return list(items)


def _arms(what: str, keys: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> list[Arm]:
    short = _short(keys)
    made = [Arm(",".join(f"{name}={_shown(value)}" for name, value in zip(short, row)), dict(zip(keys, row))) for row in map(tuple, rows)]
    if not made or not keys:
        raise ConfigError(f"{what}() makes no arm; give keys with values, as in {what}({{'objective.rate': [0.15, 0.5]}}).")
    return made


def _short(keys: tuple[str, ...]) -> list[str]:
    """Of each key as many of its last parts as tell it from the others."""
    parts = [re.split("[.:]", key) for key in keys]
    counts = [next((n for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in parts) == 1), len(own)) for own in parts]
    return [".".join(own[-n:]) for own, n in zip(parts, counts)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "+".join(map(_shown, value)) if isinstance(value, list | tuple) else fields.unparse(value)
