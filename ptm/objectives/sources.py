"""Losses by source. A batch of a mixture says of each position which source its text is from, one-hot in source_BLG; other batches have no such field."""

import re

import jax
import jax.numpy as jnp

from ptm.data.batch import SOURCE
from ptm.objectives.protocol import Batch, Ratio

OF_SOURCE = re.compile(r"(^|/)loss(/\w+)?_\d+$")  # names of such losses in metrics


def by_source(batch: Batch, term: str, nats_BX: jax.Array, weights_BX: jax.Array, index_BX: jax.Array | None = None) -> dict[str, Ratio]:
    """Ratios TERM_N of what comes from source N, as (sum of weighted nats, sum of weights); none where a batch does not tell its sources.

    X are the positions of a row, or those that `index_BX` names (L where there is none). No gradient is taken of them.
    """
    if SOURCE not in batch:
        return {}
    source = batch[SOURCE] if index_BX is None else jnp.take_along_axis(batch[SOURCE], index_BX[..., None], axis=1, mode="fill", fill_value=0)
    source_BXG = source.astype(jnp.float32)
    weights_BX = weights_BX.astype(jnp.float32)
    totals_G, weights_G = (jnp.einsum("bx,bxg->g", values, source_BXG) for values in (jax.lax.stop_gradient(nats_BX) * weights_BX, weights_BX))
    return {f"{term}_{n}": (totals_G[n], weights_G[n]) for n in range(source_BXG.shape[-1])}
