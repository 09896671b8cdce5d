"""Replaced-token detection (Clark et al. 2020) and the arms of its ablation (section 3.4)."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ptm.data.batch import SOURCE
from ptm.fields import ConfigError, field
from ptm.models import Model
from ptm.nn.losses import TokenSums, cross_entropy_and, token_nats
from ptm.objectives import mlm
from ptm.objectives.protocol import Aux, Batch, Ratio
from ptm.objectives.sources import by_source


class Arm(NamedTuple):
    """What the main model is asked: by which heads, in which term, and whether at all positions or only at the chosen ones."""

    heads: tuple[str, ...]
    term: str
    everywhere: bool


ARMS: dict[str, Arm] = {
    "electra": Arm(("mlm", "rtd"), "rtd", True),
    "fifteen": Arm(("mlm", "rtd"), "rtd", False),
    "replace_mlm": Arm(("mlm", "restore"), "restore", False),
    "all_tokens_mlm": Arm(("mlm", "restore", "rtd"), "restore", True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mlm.Config):
    """Options of replaced-token detection: MLM's for the generator, and what becomes of its samples."""

    name: ClassVar[str] = "rtd"

    arm: str = field(
        "electra", choices=tuple(ARMS),
        doc="electra = original or replaced, everywhere; fifteen = at the chosen positions only; replace_mlm = which token was there, at the chosen "
        "positions; all_tokens_mlm = everywhere, with a copy mechanism.",
    )  # fmt: skip
    coefficient: float = field(50.0, low=0.0, doc="Coefficient of the discriminator's term beside the generator's 1; tokens that are restored count 1.")
    temperature: float = field(1.0, low=0.0, doc="Logits of the generator are divided by it before sampling.")
    mask_share: float = field(
        0.85, low=0.0, high=1.0, doc="Share of chosen tokens that the generator reads as the mask token; all (1.0) in the text of the paper, 0.85 in its code."
    )  # fmt: skip
    random_share: float = field(0.0, low=0.0, high=1.0, doc="Share of chosen tokens that the generator reads as a random one; the rest stays.")

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads that a model must have."""
        return ARMS[self.arm].heads

    def check(self, where: str) -> None:
        super().check(where)
        if not self.temperature:
            raise ConfigError(f"{where}.temperature=0 leaves no chance to any token but the likeliest; allowed: above 0, such as 0.1.")


class RTD(mlm.MLM):
    """The generator fills the chosen positions with samples of its own; the discriminator says of each token whether it is the original one.

    A sample that hits the original counts as original. No gradient passes through the samples: generator and discriminator only meet in the
    parameters that they share. All real tokens count, those that frame a text too, as in the published code.
    """

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        super().__init__(config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config)
        self.arm = ARMS[config.arm]
        self.heads = self.arm.heads
        main = config.coefficient if self.arm.term == "rtd" else 1.0
        self.coefficients = {"mlm": 1.0, **({"z": config.z_loss} if config.z_loss else {}), self.arm.term: main}

    def counted(self, batch: Batch) -> jax.Array:
        """Weights [B, L] of the main model's term."""
        return (batch["segments_BL"] > 0).astype(jnp.float32) if self.arm.everywhere else batch["weights_BL"]

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        chosen = jnp.sum(batch["weights_BL"])
        return {**dict.fromkeys(self.coefficients, chosen), self.arm.term: jnp.sum(self.counted(batch))}

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        generator_rng, noise_rng, main_rng = (None, jax.random.key(0), None) if rng is None else jax.random.split(rng, 3)
        read = model.hidden(params, batch, mask=self.mask, part="generator", train=train, rng=generator_rng)
        sums, samples_BS, sources = self.generate(model, params, batch, read.hidden_BLD, rng=noise_rng)
        totals = {"mlm": sums.nll, **({"z": sums.log_z_squared} if "z" in self.coefficients else {})}
        chosen, dropped = jnp.sum(batch["weights_BL"]), jnp.sum(batch["dropped_B"])
        ratios = {"generator_accuracy": (sums.correct, chosen), "dropped_share": (dropped, dropped + chosen)}

        tokens_BL = replaced(batch, samples_BS)
        main = model.hidden(params, {**batch, "tokens_BL": tokens_BL}, mask=self.mask, part="discriminator", train=train, rng=main_rng)
        tell = self._detect if self.arm.term == "rtd" else self._restore
        totals[self.arm.term], found, main_sources = tell(model, params, batch, tokens_BL, main.hidden_BLD)
        tops = [out.attention_max for out in (read, main) if out.attention_max is not None]
        maxima = {"attention_logit": jnp.max(jnp.stack(tops))} if tops else {}
        return totals, Aux(ratios={**ratios, **found}, maxima=maxima, sources={**sources, **main_sources}), carry

    def generate(
        self, model: Model, params: Any, batch: Batch, hidden_BLD: jax.Array, *, rng: jax.Array
    ) -> tuple[TokenSums, jax.Array, dict[str, Ratio]]:
        """The generator's sums, a token sampled for each chosen position, and the loss by source.

        The noise of a position depends on `rng`, on what its row holds and on its place in the row: not on other rows, padding or devices.
        """
        hidden, targets_BS, weights_BS = self.select(hidden_BLD, batch)
        index_BS = batch["target_index_BS"]
        rows_BS = jnp.broadcast_to(_row_number(batch)[:, None], index_BS.shape)

        def sample(logits: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
            _, rows, index, targets = given

            def noise(row: jax.Array, place: jax.Array) -> jax.Array:
                return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(rng, row), place), logits.shape[-1:])

            scores = jax.lax.stop_gradient(logits) / self.config.temperature + jax.vmap(jax.vmap(noise))(rows, index)
            drawn = jnp.argmax(scores[..., : self.tokenizer.vocab_size], axis=-1).astype(jnp.int32)  # rows of the table beyond it are no tokens
            return drawn, token_nats(jax.lax.stop_gradient(logits), targets) if SOURCE in batch else None

        logits_of = functools.partial(model.logits, params, head="mlm")
        context = model.module.context
        given = (hidden, rows_BS, index_BS, targets_BS)
        sums, (samples_BS, nats_BS) = cross_entropy_and(
            lambda given: logits_of(given[0]), given, targets_BS, weights_BS, chunk=context.loss_chunk, layout=context.layout, read=sample
        )
        return sums, samples_BS, {} if nats_BS is None else by_source(batch, "loss/mlm", nats_BS, weights_BS, index_BS)

    def _detect(self, model: Model, params: Any, batch: Batch, tokens_BL: jax.Array, hidden_BLD: jax.Array) -> tuple[jax.Array, dict, dict]:
        weights_BL, replaced_BL = self.counted(batch), tokens_BL != batch["targets_BL"]
        logits_BL = model.logits(params, hidden_BLD, head="rtd")
        nll_BL = -jax.nn.log_sigmoid(jnp.where(replaced_BL, logits_BL, -logits_BL))
        said_BL = logits_BL > 0
        total, actual, said, both, right = (
            jnp.sum(weights_BL * x_BL) for x_BL in (1.0, replaced_BL, said_BL, replaced_BL & said_BL, replaced_BL == said_BL)
        )  # fmt: skip
        shares = {"discriminator_accuracy": (right, total), "precision": (both, said), "recall": (both, actual), "replaced_share": (actual, total)}
        return jnp.sum(weights_BL * nll_BL), shares, by_source(batch, "loss/rtd", nll_BL, weights_BL)

    def _restore(self, model: Model, params: Any, batch: Batch, tokens_BL: jax.Array, hidden_BLD: jax.Array) -> tuple[jax.Array, dict, dict]:
        weights_BL, replaced_BL = self.counted(batch), tokens_BL != batch["targets_BL"]
        logits_of = functools.partial(model.logits, params, head="restore")

        def copied(given: tuple[jax.Array, ...]) -> jax.Array:
            """Logs of the mixture of what was read and of any token: the weight of the latter is the probability that the token was replaced."""
            hidden, tokens, _ = given
            gate = model.logits(params, hidden, head="rtd")[..., None]
            new = jax.nn.log_sigmoid(gate) + jax.nn.log_softmax(logits_of(hidden))
            same = tokens[..., None] == jax.lax.broadcasted_iota(tokens.dtype, new.shape, new.ndim - 1)
            return jnp.where(same, jnp.logaddexp(new, jax.nn.log_sigmoid(-gate)), new)

        def read(logits: jax.Array, given: tuple[jax.Array, ...]) -> jax.Array | None:
            return token_nats(jax.lax.stop_gradient(logits), given[-1]) if SOURCE in batch else None

        if self.arm.everywhere:
            place, logits_from, given, targets, weights = None, copied, (hidden_BLD, tokens_BL, batch["targets_BL"]), batch["targets_BL"], weights_BL
        else:
            hidden, targets, weights = self.select(hidden_BLD, batch)
            place, logits_from, given = batch["target_index_BS"], lambda given: logits_of(given[0]), (hidden, targets)
        context = model.module.context
        sums, nats = cross_entropy_and(logits_from, given, targets, weights, chunk=context.loss_chunk, layout=context.layout, read=read)
        total, actual = jnp.sum(weights_BL), jnp.sum(weights_BL * replaced_BL)
        sources = {} if nats is None else by_source(batch, "loss/restore", nats, weights, place)
        return sums.nll, {"restore_accuracy": (sums.correct, total), "replaced_share": (actual, total)}, sources


def replaced(batch: Batch, samples_BS: jax.Array) -> jax.Array:
    """The original rows with the samples at their positions: what the discriminator reads."""

    def put(tokens_L: jax.Array, index_S: jax.Array, samples_S: jax.Array) -> jax.Array:
        return tokens_L.at[index_S].set(samples_S, mode="drop")  # where there is no target the index is beyond the row

    return jax.vmap(put)(batch["targets_BL"], batch["target_index_BS"], samples_BS)


def _row_number(batch: Batch) -> jax.Array:
    """A number [B] for what a row holds: the polynomial of its tokens modulo 2**32, in which padding counts nothing."""
    real_BL = (batch["segments_BL"] > 0).astype(jnp.uint32)
    powers_L = jnp.cumprod(jnp.full(real_BL.shape[1], 0x9E3779B1, jnp.uint32))  # odd, so that no power loses bits
    return jnp.sum(real_BL * (batch["tokens_BL"].astype(jnp.uint32) + 1) * powers_L, axis=1, dtype=jnp.uint32)
