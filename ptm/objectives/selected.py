"""What objectives share that predict few positions of a row: these are listed, so that vocabulary logits exist there alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Example, keyed_rng
from ptm.models import Model
from ptm.nn.stack import Output
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.tokens import TokenObjective


def take(x: jax.Array, index_BS: jax.Array) -> jax.Array:
    """Values [B, S, ...] at some positions of [B, L, ...]; 0 where the position is L."""
    return jnp.take_along_axis(x, index_BS.reshape(*index_BS.shape, *(1,) * (x.ndim - 2)), axis=1, mode="fill", fill_value=0)


class SelectedObjective(TokenObjective):
    """Base of objectives with S predicted positions of a row, those of positive weight."""

    lengths: dict[str, int]

    def finish(self, row: Example) -> Example:
        """Adds target_index_BS, the chosen positions (L where there is none); what overflows S is dropped at random, its weight set to 0."""
        length, room = len(row["weights_BL"]), self.lengths["S"]
        chosen = np.flatnonzero(row["weights_BL"])
        dropped = np.float32(max(0, len(chosen) - room))
        weights_L = row["weights_BL"]
        if dropped:
            kept = np.sort(keyed_rng("overflow", row["tokens_BL"].tobytes().hex()).permutation(chosen)[:room])
            weights_L = np.zeros_like(weights_L)
            weights_L[kept] = row["weights_BL"][kept]
            chosen = kept
        index_S = np.full(room, length, np.int32)
        index_S[: len(chosen)] = chosen
        return {**row, "weights_BL": weights_L, "target_index_BS": index_S, "dropped_B": dropped}

    def select(self, hidden_BLD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        index_BS = batch["target_index_BS"]
        return take(hidden_BLD, index_BS), take(batch["targets_BL"], index_BS), take(batch["weights_BL"], index_BS)

    def predicted(self, batch: Batch) -> jax.Array:
        return batch["target_index_BS"]

    def token_terms(self, model: Model, params: Any, batch: Batch, out: Output) -> tuple[dict[str, jax.Array], Aux]:
        totals, aux = super().token_terms(model, params, batch, out)
        dropped = jnp.sum(batch["dropped_B"])
        return totals, aux.replace(ratios={**aux.ratios, "dropped_share": (dropped, dropped + jnp.sum(batch["weights_BL"]))})
