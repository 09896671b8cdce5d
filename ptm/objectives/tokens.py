"""What all objectives that predict tokens share: one cross-entropy term, accuracy and bits per byte."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Example
from ptm.models import Model
from ptm.nn.losses import cross_entropy
from ptm.nn.stack import Output
from ptm.objectives.protocol import Aux, Batch


class TokenObjective:
    """Base of objectives whose terms are `tokens` (negative log-likelihood, nats) and, if asked for, `z` (Chowdhery et al. 2022, section 5)."""

    mask: str
    heads: tuple[str, ...]

    def __init__(self, *, z_loss: float, token_bytes: np.ndarray) -> None:
        self.coefficients = {"tokens": 1.0, **({"z": z_loss} if z_loss else {})}
        self._token_bytes = token_bytes

    def finish(self, row: Example) -> Example:
        return row

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return dict.fromkeys(self.coefficients, jnp.sum(batch["weights_BL"]))

    def select(self, hidden_BLD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(hidden, targets, weights) of the positions that get vocabulary logits: all of the row, unless overridden."""
        return hidden_BLD, batch["targets_BL"], batch["weights_BL"]

    def init_carry(self, model: Model, batch_size: int) -> Any:
        return None

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        out = model.hidden(params, batch, mask=self.mask, head=self.heads[0], train=train, rng=rng)
        return *self.token_terms(model, params, batch, out), carry

    def token_terms(self, model: Model, params: Any, batch: Batch, out: Output) -> tuple[dict[str, jax.Array], Aux]:
        """Sums of the terms of tokens, and what else is reported, of a batch whose hidden states are given."""
        hidden, targets, weights = self.select(out.hidden_BLD, batch)
        logits_of = functools.partial(model.logits, params, head=self.heads[0])
        sums = cross_entropy(logits_of, hidden, targets, weights, chunk=model.module.context.loss_chunk)
        totals = {"tokens": sums.nll, **({"z": sums.log_z_squared} if "z" in self.coefficients else {})}
        # Bits per byte: a token's bytes are those of the text that it stands for; special tokens stand for none.
        num_bytes = jnp.sum(jnp.asarray(self._token_bytes, jnp.float32)[targets] * weights)
        ratios = {"accuracy": (sums.correct, jnp.sum(weights)), "bits_per_byte": (sums.nll / jnp.log(2.0), num_bytes)}
        maxima = {} if out.attention_max is None else {"attention_logit": out.attention_max}
        return totals, Aux(ratios=ratios, maxima=maxima)
