"""Log-likelihoods of texts, token by token: of decoders given what stands before, of masked language models given all else.

The pseudo-log-likelihood of a text is the sum over its tokens of log p(token | all others) (Salazar et al. 2020, section 2.1): a score, not the logarithm of
a probability of the text. Figures of the two kinds cannot be compared with each other, nor those of models with different tokenizers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.analysis import inputs
from ptm.analysis.inputs import Row
from ptm.fields import ConfigError
from ptm.models import Model

MASKED_ROWS, CAUSAL_ROWS = 64, 8  # rows of a batch: one vocabulary's logits are made for each of the former, one for each token of the latter


class TooLong(ValueError):
    """A text that does not fit into the model."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model with its parameters and tokenizer, as a judge of texts: decoders by head `lm`, encoders by head `mlm` (of ELECTRA: the generator's)."""

    model: Model
    params: Any
    tokenizer: Any
    trained_mask: str = "full"

    def __post_init__(self) -> None:
        config = self.model.config
        if config.kind == "encoder_decoder" or self.head not in self.model.module.heads:
            has = ", ".join(self.model.module.heads) or "none"
            raise ConfigError(
                f"likelihoods need a decoder with the head lm or an encoder with the head mlm; this model is {config.name} ({config.kind}), with the heads: {has}."
            )
        if self.masked and self.tokenizer.mask_id is None:
            raise ConfigError("pseudo-log-likelihoods need a tokenizer with a mask piece; this one has none.")

    @property
    def head(self) -> str:
        return "lm" if self.model.config.kind == "decoder" else "mlm"

    @property
    def masked(self) -> bool:
        """Whether texts are judged by pseudo-log-likelihood."""
        return self.model.config.kind == "encoder"

    @property
    def measure(self) -> str:
        """What the scores are."""
        return "pseudo-log-likelihood" if self.masked else "log-likelihood"

    def row(self, text: str) -> Row:
        """A text as the model reads it. Raises TooLong if it cannot."""
        row = inputs.framed(self.tokenizer, self.model.config, self.tokenizer.encode(text))
        if not inputs.fits(row, self.model.config):
            raise TooLong(f"{len(row.tokens_L)} tokens, and the model reads {self.model.config.max_length}")
        return row

    def tokens(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Log-probability of every token of each text, nats; a decoder's first token has none, 0, where the vocabulary has nothing to begin with."""
        if not self.masked:
            return self._causal(rows)
        places = [(row, index) for row in rows for index in range(row.body.start, row.body.stop)]
        found = iter(self.at_blanks([(row, (index,), index) for row, index in places]))
        return [np.array([next(found) for _ in range(row.body.start, row.body.stop)]) for row in rows]

    def at_blanks(self, questions: Sequence[tuple[Row, Sequence[int], int]]) -> np.ndarray:
        """For each (row, indices to mask, index): the log-probability, nats, of the token at `index` when the tokens at the indices are masked."""
        rows = []
        for row, masked, _ in questions:
            tokens_L = row.tokens_L.copy()
            tokens_L[list(masked)] = self.tokenizer.mask_id
            rows.append(dataclasses.replace(row, tokens_L=tokens_L))
        found = np.zeros(len(rows))
        for numbers, batch in inputs.batches(rows, self.model.config, count=inputs.rows_at_once(self.model, MASKED_ROWS)):
            index_B1, target_B1 = (np.zeros((len(batch["tokens_BL"]), 1), np.int32) for _ in range(2))
            index_B1[: len(numbers), 0] = [questions[n][2] for n in numbers]
            target_B1[: len(numbers), 0] = [questions[n][0].tokens_L[questions[n][2]] for n in numbers]
            found[numbers] = np.asarray(self._log_probs(self.params, batch, index_B1, target_B1))[: len(numbers), 0]
        return found

    def _causal(self, rows: Sequence[Row]) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        for numbers, batch in inputs.batches(rows, self.model.config, count=inputs.rows_at_once(self.model, CAUSAL_ROWS)):
            tokens_BL = batch["tokens_BL"]
            index_BL = np.broadcast_to(np.arange(tokens_BL.shape[1] - 1, dtype=np.int32), (len(tokens_BL), tokens_BL.shape[1] - 1))
            log_probs_BL = np.asarray(self._log_probs(self.params, batch, index_BL, tokens_BL[:, 1:]), np.float64)
            for place, n in enumerate(numbers):
                body = rows[n].body
                log_probs_L = np.concatenate([[0.0], log_probs_BL[place]])  # of each token of the row, but for the first
                found[n] = log_probs_L[body]
        return found

    @functools.cached_property
    def _log_probs(self) -> Any:
        model, head, mask = self.model, self.head, inputs.mask_of(self.model, self.trained_mask)

        def log_probs(params: Any, batch: dict[str, jax.Array], index_BS: jax.Array, target_BS: jax.Array) -> jax.Array:
            hidden_BLD = model.hidden(params, batch, mask=mask, head=head).hidden_BLD
            logits_BSV = model.logits(params, jnp.take_along_axis(hidden_BLD, index_BS[..., None], axis=1), head=head)
            chosen_BS = jnp.take_along_axis(logits_BSV, target_BS[..., None], axis=-1)[..., 0]
            return chosen_BS - jax.nn.logsumexp(logits_BSV, axis=-1)

        return jax.jit(log_probs, out_shardings=model.module.context.layout.replicated())
