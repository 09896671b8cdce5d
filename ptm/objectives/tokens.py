"""What all objectives that predict tokens share: one cross-entropy term, accuracy and bits per byte."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import SOURCE, Example
from ptm.models import Model
from ptm.nn.losses import cross_entropy_and, token_nats, uniform_nats
from ptm.nn.stack import Output
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.sources import by_source


class TokenObjective:
    """Base of objectives whose terms are `tokens` (negative log-likelihood, nats) and, if asked for, `z` (Chowdhery et al. 2022, section 5) and `smoothing`.

    A target smoothed by s is the true token with 1 - s and all tokens alike with s (Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4), whose
    cross entropy is (1 - s) * tokens + s * smoothing. So `tokens` is the likelihood of the text whatever s is, and perplexities stay comparable.
    """

    mask: str
    heads: tuple[str, ...]
    max_segments: int | None = None

    def __init__(self, *, z_loss: float, token_bytes: np.ndarray, smoothing: float = 0.0) -> None:
        self.coefficients = {"tokens": 1.0 - smoothing, **({"z": z_loss} if z_loss else {}), **({"smoothing": smoothing} if smoothing else {})}
        self._token_bytes = token_bytes

    def finish(self, row: Example) -> Example:
        return row

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return dict.fromkeys(self.coefficients, jnp.sum(batch["weights_BL"]))

    def select(self, hidden_BLD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(hidden, targets, weights) of the positions that get vocabulary logits: all of the row, unless overridden."""
        return hidden_BLD, batch["targets_BL"], batch["weights_BL"]

    def predicted(self, batch: Batch) -> jax.Array | None:
        """Their places in the row, [B, S]; None for all."""
        return None

    def loss_name(self, term: str) -> str:
        """What metrics call a term of the loss."""
        return f"loss/{term}" if len(self.coefficients) > 1 else "loss"

    def init_carry(self, model: Model, batch_size: int) -> Any:
        return None

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        out = model.hidden(params, batch, mask=self.mask, head=self.heads[0], train=train, rng=rng)
        return *self.token_terms(model, params, batch, out), carry

    def token_terms(self, model: Model, params: Any, batch: Batch, out: Output) -> tuple[dict[str, jax.Array], Aux]:
        """Sums of the terms of tokens, and what else is reported, of a batch whose hidden states are given."""
        hidden, targets, weights = self.select(out.hidden_BLD, batch)
        logits_of = functools.partial(model.logits, params, head=self.heads[0])
        smoothed, sourced = "smoothing" in self.coefficients, SOURCE in batch

        def read(logits: jax.Array, given: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
            uniform = {"uniform": uniform_nats(logits, given[0])} if smoothed else {}
            return uniform | ({"nats": token_nats(jax.lax.stop_gradient(logits), given[1])} if sourced else {})

        context = model.module.context
        sums, seen = cross_entropy_and(
            lambda given: logits_of(given[0]), (hidden, targets), targets, weights, chunk=context.loss_chunk, layout=context.layout, read=read
        )
        totals = {"tokens": sums.nll, **({"z": sums.log_z_squared} if "z" in self.coefficients else {})}
        if smoothed:
            totals["smoothing"] = jnp.sum(seen["uniform"] * weights)
        sources = by_source(batch, self.loss_name("tokens"), seen["nats"], weights, self.predicted(batch)) if sourced else {}
        # Bits per byte: a token's bytes are those of the text that it stands for; special tokens stand for none.
        num_bytes = jnp.sum(jnp.asarray(self._token_bytes, jnp.float32)[targets] * weights)
        ratios = {"accuracy": (sums.correct, jnp.sum(weights)), "bits_per_byte": (sums.nll / jnp.log(2.0), num_bytes)}
        maxima = {} if out.attention_max is None else {"attention_logit": out.attention_max}
        return totals, Aux(ratios=ratios, maxima=maxima, sources=sources)
