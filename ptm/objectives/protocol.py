"""What an objective is: the only place where data meets model."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np

from ptm.data.batch import Document, Featurizer
from ptm.models import Model

Batch = dict[str, jax.Array]
Ratio = tuple[jax.Array, jax.Array]  # (sum, weight)


@flax.struct.dataclass
class Aux:
    """What a loss reports besides its terms: ratios as (sum, weight), which add up over microbatches and batches, and maxima.

    `sources` are ratios of what comes from one source (ptm.objectives.sources), which a batch may hold nothing of.
    """

    ratios: dict[str, Ratio]
    maxima: dict[str, jax.Array]
    sources: dict[str, Ratio] = flax.struct.field(default_factory=dict)


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


@runtime_checkable
class Task(Objective, Protocol):
    """An objective that answers questions about records: fine-tuning.

    Answers are made from rows of one example each. `features` accepts documents without what is to be predicted, as `ptm predict` has them.
    """

    columns: tuple[str, ...]  # fields besides `text` that records must have to train
    metrics: tuple[str, ...]  # entries of ptm.metrics.METRICS that answers are measured by

    def outputs(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """What `answer` needs of a batch of rows, arrays of [rows, ...]; compiled once for each shape of a batch."""
        ...

    def answer(self, doc: Document, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The answer about a document, ready for JSON, from the outputs of its examples in the order of `features`: `prediction` is what metrics compare."""
        ...

    def reference(self, doc: Document) -> Any:
        """What metrics compare an answer's `prediction` with; None if the record does not tell."""
        ...
