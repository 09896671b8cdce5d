"""What an objective is: the only place where data meets model."""

from typing import Any, Protocol

import flax.struct
import jax

from ptm.data.batch import Featurizer
from ptm.models import Model

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class Aux:
    """What a loss reports besides its terms: ratios as (sum, weight), which add up over microbatches and batches, and maxima."""

    ratios: dict[str, tuple[jax.Array, jax.Array]]
    maxima: dict[str, jax.Array]


class Objective(Featurizer, Protocol):
    """Host half (Featurizer) and device half of an objective.

    The loss of a batch is the sum over terms of coefficients[k] * totals[k] / weights[k]; a term without weight adds nothing. `weights`
    depends on the batch alone, so that the loop can add it up over microbatches and devices before the backward pass.
    """

    kinds: tuple[str, ...]  # kinds of models it can train: decoder, encoder, encoder_decoder
    heads: tuple[str, ...]  # heads it needs
    mask: str  # kind of attention mask
    coefficients: dict[str, float]  # of the terms
    target_positions: int  # positions of a row with vocabulary logits, for counting FLOPs

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Weight W_k of each term."""
        ...

    def init_carry(self, model: Model, batch_size: int) -> Any:
        """The memory before the first batch, leaves of [rows, ...] whose zeros mean that there is none; None for an objective without memory."""
        ...

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        """Sum of each term over the batch, what else is reported, and the carry for the next batch."""
        ...
