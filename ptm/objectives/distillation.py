"""Distillation: a student learns from another model's soft labels and hidden states, besides the labels of its own objective.

Hinton et al. 2015, section 2; Sanh et al. 2019, section 2 (DistilBERT); Jiao et al. 2020, section 3.1 (TinyBERT's hidden states).
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ptm.fields import ConfigError, field
from ptm.models import Model
from ptm.nn.losses import divergence
from ptm.nn.stack import Output
from ptm.objectives import mixture
from ptm.objectives.mixture import Mixture
from ptm.objectives.protocol import Aux, Batch, Objective
from ptm.objectives.tokens import TokenObjective

SPECS = ("ckpt:", "hf:", "hub:")
NO_TEACHER = "the loss compares the student with its teacher; give the model one with ptm.teacher.attach."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mixture.Config):
    """Options of distillation. `parts` are the objectives whose examples and hard labels are used: one, or several as in a mixture."""

    name: ClassVar[str] = "distillation"

    teacher: str = field("", doc="The teacher: ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR or hub:ORG/NAME[@REVISION]. It is needed to train and to evaluate.")
    temperature: float = field(2.0, low=1e-3, doc="Temperature of soft labels; their term is multiplied by its square.")
    soft: float = field(1.0, low=0.0, doc="Coefficient of soft labels, the divergence from the teacher's predictions; DistilBERT: 5.")
    hard: float = field(1.0, low=0.0, doc="Coefficient of the parts' own terms; DistilBERT: 2.")
    hidden: float = field(0.0, low=0.0, doc="Coefficient of the distance from the teacher's hidden states; DistilBERT: 1.")
    hidden_distance: str = field("cosine", choices=("cosine", "mse"), doc="Distance of hidden states: 1 - cosine (DistilBERT), mean squared error (TinyBERT).")
    hidden_layers: str = field(
        "last", choices=("last", "all"), doc="What is compared: the last hidden states, or embeddings and states after each layer, with those after every k-th of the teacher."
    )  # fmt: skip
    projection: int | None = field(
        None, low=1, doc="Width of the teacher's hidden states that a learned map of the student's leads to (TinyBERT); None compares them as they are."
    )  # fmt: skip
    init_layers: bool = field(False, doc="Begin with the teacher's parameters, of its layers with every k-th (DistilBERT), where init is scratch.")

    def check(self, where: str) -> None:
        super().check(where)
        if self.teacher and not self.teacher.startswith(SPECS):
            raise ConfigError(f"{where}.teacher={self.teacher}; allowed: ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR, hub:ORG/NAME[@REVISION].")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of the longest rows. Raises ConfigError where teacher or parts are missing."""
        if not self.teacher:
            raise ConfigError("objective.teacher is empty; name the model that the student learns from, such as --config.objective.teacher=ckpt:WORKDIR.")
        return super().lengths(length)


class Distillation(Mixture):
    """The parts of a mixture, each taught; a single one needs no name in metrics."""

    def __init__(self, config: Config, *, objectives: dict[str, Objective]) -> None:
        super().__init__(config, objectives={name: Taught(part, config=config) for name, part in objectives.items()})
        self.parts = self.parts if len(self.parts) > 1 else ()


class Taught:
    """An objective of tokens with two terms more: `soft` at the positions that it predicts, `hidden` at all that are no padding.

    A term whose coefficient is 0 is not there, and where neither is, the loss is that of the objective.
    """

    def __init__(self, part: Objective, *, config: Config) -> None:
        if not isinstance(part, TokenObjective) or type(part).loss is not TokenObjective.loss:
            raise ConfigError(
                f"objective distillation has a part {type(part).__name__}, whose loss is more than that of tokens read off one pass of the model; "
                "distil with parts such as causal, mlm or span_corruption."
            )
        self.part, self.config = part, config
        self.kinds, self.mask, self.fields, self.lengths, self.packing = part.kinds, part.mask, part.fields, part.lengths, part.packing
        self.raw_length, self.max_segments, self.visits, self.target_positions = part.raw_length, part.max_segments, part.visits, part.target_positions
        self.features, self.finish, self.init_carry = part.features, part.finish, part.init_carry
        added = {"soft": config.soft, "hidden": config.hidden}
        self.coefficients = {term: config.hard * c for term, c in part.coefficients.items()} | {term: c for term, c in added.items() if c}
        projected = config.projection is not None and "hidden" in self.coefficients
        self._projection = (f"hidden_projection:{config.projection}",) if projected else ()
        self.heads = (*part.heads, *self._projection)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        counted = {"soft": lambda: batch["weights_BL"], "hidden": lambda: _real(batch)}
        return self.part.weights(batch) | {term: jnp.sum(of()) for term, of in counted.items() if term in self.coefficients}

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        options = {"states": True} if "hidden" in self.coefficients else {}
        hidden = functools.partial(Model.hidden, batch=batch, mask=self.mask, head=self.heads[0], **options)
        out = hidden(model, params, train=train, rng=rng)
        totals, aux = self.part.token_terms(model, params, batch, out)
        if len(self.coefficients) > 1:  # whose tokens are one term among others, whatever they are of the part
            aux = aux.replace(sources={name.replace("loss_", "loss/tokens_"): ratio for name, ratio in aux.sources.items()})
        if {"soft", "hidden"} & set(self.coefficients):
            assert model.teacher is not None and model.teacher_params is not None, NO_TEACHER
            taught = hidden(model.teacher, model.teacher_params)
        if "soft" in self.coefficients:
            totals["soft"] = self._soft(model, params, batch, out, taught)
        if "hidden" in self.coefficients:
            totals["hidden"] = self._hidden(model, params, batch, out, taught)
        return totals, aux, carry

    def _soft(self, model: Model, params: Any, batch: Batch, out: Output, taught: Output) -> jax.Array:
        hidden, _, weights = self.part.select(out.hidden_BLD, batch)
        teacher_hidden = self.part.select(taught.hidden_BLD, batch)[0]
        ours = functools.partial(model.logits, params, head=self.heads[0])
        theirs = functools.partial(model.teacher.logits, model.teacher_params, head=self.heads[0])
        context = model.module.context
        return divergence(ours, theirs, hidden, teacher_hidden, weights, temperature=self.config.temperature, chunk=context.loss_chunk, layout=context.layout)

    def _hidden(self, model: Model, params: Any, batch: Batch, out: Output, taught: Output) -> jax.Array:
        """Sum over real positions of the mean distance of the layers compared."""
        layers, teacher_layers = len(out.states_NBLD) - 1, len(taught.states_NBLD) - 1
        chosen = range(layers + 1) if self.config.hidden_layers == "all" else [layers]
        ours = out.states_NBLD[jnp.array(chosen)]
        theirs = taught.states_NBLD[jnp.array([n * teacher_layers // layers for n in chosen])].astype(jnp.float32)
        if self._projection:
            ours = model.logits(params, ours, head=self._projection[0])
        if ours.shape[-1] != theirs.shape[-1]:
            raise ConfigError(
                f"hidden states of the student have a width of {ours.shape[-1]}, those of the teacher {theirs.shape[-1]}; "
                f"set --config.objective.projection={theirs.shape[-1]} for a learned map between them, or --config.objective.hidden=0."
            )
        distance = {"cosine": _one_minus_cosine, "mse": _squared_error}[self.config.hidden_distance]
        return jnp.sum(jnp.mean(distance(ours.astype(jnp.float32), theirs), axis=0) * _real(batch))


def _real(batch: Batch) -> jax.Array:
    return (batch["segments_BL"] > 0).astype(jnp.float32)


def _squared_error(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(ours - theirs), axis=-1)


def _one_minus_cosine(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    # Under one root, with a floor: padding may be 0, where the root has no gradient.
    squares = jnp.sum(jnp.square(ours), axis=-1) * jnp.sum(jnp.square(theirs), axis=-1)
    return 1 - jnp.sum(ours * theirs, axis=-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
