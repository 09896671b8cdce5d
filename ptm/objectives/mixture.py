"""Mixtures of objectives: those of equal signature share batches example by example (Tay et al. 2022), others take turns batch by batch.

Two objectives have the same signature if a batch of one can hold examples of the other and their losses are the same function of it: fields,
mask, heads, terms and their coefficients, packing and visits are equal. Their lengths may differ, where one has room for the other's examples.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field, nearest, parse, sections, unparse
from ptm.models import Model
from ptm.nn.heads import head_names
from ptm.objectives.protocol import Aux, Batch, Objective
from ptm.objectives.tokens import TokenObjective

TASK_HEADS = ("classify", "tag", "qa")  # heads whose outputs mean what one task says


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a mixture of objectives."""

    name: ClassVar[str] = "mixture"

    parts: dict[str, Any] = sections("objective", doc="The objectives by a name of their own, which metrics bear.")
    weights: tuple[str, ...] = field((), doc="Shares of drawn examples, before packing, as NAME=WEIGHT; a part that is not named has the weight 1.")

    def check(self, where: str) -> None:
        for name, part in self.parts.items():
            if not name.isidentifier() or name == "name":
                raise ConfigError(f"{where}.parts.{name}: the name of a part has letters, digits and _ alone; 'name' itself is taken.")
            if isinstance(part, Config):
                raise ConfigError(f"{where}.parts.{name} is a mixture itself; give its parts to the mixture that it is in.")
        for entry in self.weights:
            name, _, weight = entry.partition("=")
            given = f"{where}.weights={unparse(self.weights)}: '{entry}'"
            if name not in self.parts:
                known = ", ".join(self.parts)
                raise ConfigError(f"{given} is not of the form PART=WEIGHT with PART one of: {known}.{nearest(name, self.parts)}")
            if not 0 < parse(weight, float, f"{where}.weights: {name}") < math.inf:
                raise ConfigError(f"{given} is no weight; allowed: numbers above 0. To leave a part out, take it from the recipe.")

    def weight(self, name: str) -> float:
        """The weight of a part."""
        given = dict(entry.split("=") for entry in self.weights)
        return float(given[name]) if name in given else 1.0

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of the longest rows. Raises ConfigError for a mixture of nothing."""
        if not self.parts:
            example = f"{self.name}.Config(parts={{'spans': span_corruption.Config(), ...}})"
            raise ConfigError(f"objective {self.name} has no parts; give them in the recipe: {example}.")
        return longest([part.lengths(length) for part in self.parts.values()])


def longest(lengths: Sequence[dict[str, int]]) -> dict[str, int]:
    """The largest size of each dimension."""
    return {dim: max(sizes.get(dim, 0) for sizes in lengths) for sizes_of in lengths for dim in sizes_of}


class Part(NamedTuple):
    """An objective in a mixture, the name that metrics give it, and its share among the others."""

    name: str
    objective: Objective
    weight: float


class Blend:
    """Objectives of equal signature as one: each piece of text goes to one of them, drawn by weight; the loss is that of them all.

    A part takes as much of what is left of a document as it can use, and all of it where its raw length is None. Metrics `share/NAME` are the shares
    of predicted tokens, of the parts of a name together.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        lengths = longest([part.objective.lengths for part in parts])
        # Only what is said of a row as a whole depends on lengths, and so on the one with the longest rows.
        self._lead = next(part.objective for part in parts if part.objective.lengths == lengths)
        self._names = list(dict.fromkeys(part.name for part in parts))
        self._shares = np.array([part.weight for part in parts]) / sum(part.weight for part in parts)
        self.lengths, self.packing, self.visits, self.raw_length = lengths, self._lead.packing, self._lead.visits, None
        self.max_segments = self._lead.max_segments
        self.heads, self.mask, self.coefficients = self._lead.heads, self._lead.mask, self._lead.coefficients
        self.target_positions = self._lead.target_positions
        self.fields = {**self._lead.fields, **({"part_BL": Field()} if len(self._names) > 1 else {})}

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        start, number = 0, 0
        while start < len(doc.tokens_L):
            part = self._parts[rng.choice(len(self._parts), p=self._shares)]
            size = part.objective.raw_length or len(doc.tokens_L)
            piece = dataclasses.replace(doc, id=f"{doc.id}@{number}", tokens_L=doc.tokens_L[start : start + size])
            for example in part.objective.features(piece, rng=rng, draw=draw):
                if "part_BL" in self.fields:
                    example = {**example, "part_BL": np.full(len(example["tokens_BL"]), self._names.index(part.name), np.int32)}
                yield example
            start, number = start + size, number + 1

    def finish(self, row: Example) -> Example:
        return self._lead.finish(row)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return self._lead.weights(batch)

    def init_carry(self, model: Model, batch_size: int) -> Any:
        return None  # registry.check refuses parts with memory

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        totals, aux, carry = self._lead.loss(model, params, batch, rng=rng, carry=carry, train=train)
        if "part_BL" not in self.fields:
            return totals, aux, carry
        weights_BL = batch["weights_BL"]
        shares = {f"share/{name}": (jnp.sum(weights_BL * (batch["part_BL"] == n)), jnp.sum(weights_BL)) for n, name in enumerate(self._names)}
        return totals, aux.replace(ratios={**aux.ratios, **shares}), carry

    def by_name(self) -> tuple[Part, ...]:
        """Each name's parts alone, for evaluation."""
        groups = {name: [part for part in self._parts if part.name == name] for name in self._names}
        return tuple(Part(name, group[0].objective if len(group) == 1 else Blend(group), sum(part.weight for part in group)) for name, group in groups.items())


def _signature(objective: Objective) -> Any:
    """What must be equal for objectives to share batches. One whose loss has more than the terms of tokens shares with none."""
    kind = type(objective)
    if not issubclass(kind, TokenObjective) or kind.loss is not TokenObjective.loss:
        return id(objective)
    functions = (kind.token_terms, kind.select, kind.finish, kind.weights)
    terms, fields = tuple(objective.coefficients.items()), tuple(objective.fields.items())
    return functions, terms, fields, objective.mask, objective.heads, objective.packing, objective.visits


class Mixture:
    """The branches of a mixture: objectives whose batches take turns, each alone or a blend, with the shares of their turns."""

    kinds = ("decoder", "encoder", "encoder_decoder")

    def __init__(self, config: Config, *, objectives: dict[str, Objective]) -> None:
        """`objectives` are those of the config's parts, by their names."""
        self.parts = tuple(Part(name, objective, config.weight(name)) for name, objective in objectives.items())
        for head in TASK_HEADS:
            sharing = [part.name for part in self.parts if head in head_names(part.objective.heads)]
            if len(sharing) > 1:
                raise ConfigError(
                    f"the parts {', '.join(sharing)} of objective.parts all need the head {head}, and a model has one of a name. Train one of them, or give all "
                    "of them to objective seq2seq as text, with a prefix that names the task (Raffel et al. 2020, section 2.4)."
                )
        groups: dict[Any, list[Part]] = {}
        for part in self.parts:
            groups.setdefault(_signature(part.objective), []).append(part)
        self.branches = tuple(
            group[0] if len(group) == 1 else Part("_".join(part.name for part in group), Blend(group), sum(part.weight for part in group))
            for group in groups.values()
        )
        names = [branch.name for branch in self.branches]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"the parts of objective.parts that share batches are called {twice} together, and so is another part; name that one otherwise.")


def branches(objective: Any) -> tuple[Part, ...]:
    """The objectives whose batches take turns in a run, by name and weight; where there is one, it has no name."""
    if not isinstance(objective, Mixture):
        return (Part("", objective, 1.0),)
    return objective.branches if len(objective.branches) > 1 else (objective.branches[0]._replace(name=""),)


def parts(objective: Any) -> tuple[Part, ...]:
    """What is evaluated on its own, with its share of the loss; nothing for an objective that is no mixture."""
    if isinstance(objective, Mixture):
        return objective.parts
    return objective.by_name() if isinstance(objective, Blend) else ()
