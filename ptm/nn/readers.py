"""What may stand between hidden states and a head that reads them: a mixture of all layers, and LSTMs in both directions.

So a frozen model serves as a feature extractor (Peters et al. 2018; Devlin et al. 2019, section 5.3).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context
from ptm.nn.linear import Linear


class LayerMix(nn.Module):
    """scale * sum over layers of softmax(weights) * states (Peters et al. 2018, equation 1), the embeddings among them: [N, B, L, D] -> [B, L, D]."""

    @nn.compact
    def __call__(self, states_NBLD: jax.Array) -> jax.Array:
        shares_N = jax.nn.softmax(self.param("weights", nn.initializers.zeros, (len(states_NBLD),), jnp.float32))
        scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
        return (scale * jnp.einsum("n,nbld->bld", shares_N, states_NBLD.astype(jnp.float32))).astype(states_NBLD.dtype)


class LSTM(nn.Module):
    """A layer of long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000) that begins anew where told.

    Forget gates begin open: 1 is added to their logits (Jozefowicz et al. 2015, section 4).
    """

    context: Context
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x_BLD: jax.Array, begins_BL: jax.Array) -> jax.Array:
        gates = (4 * self.hidden,)
        given_BLG = Linear(self.context, (self.width,), gates, self.width**-0.5, dtype=jnp.float32, name="input")(x_BLD)
        kernel = self.param("recurrent", nn.initializers.orthogonal(), (self.hidden, *gates), jnp.float32)

        def step(carry: tuple[jax.Array, jax.Array], item: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            given_BG, begins_B = item
            out_BH, cell_BH = (jnp.where(begins_B[:, None], 0.0, x) for x in carry)
            keep, forget, value, show = jnp.split(given_BG + out_BH @ kernel, 4, axis=1)
            cell_BH = jax.nn.sigmoid(forget + 1.0) * cell_BH + jax.nn.sigmoid(keep) * jnp.tanh(value)
            out_BH = jax.nn.sigmoid(show) * jnp.tanh(cell_BH)
            return (out_BH, cell_BH), out_BH

        start = (jnp.zeros((len(x_BLD), self.hidden), jnp.float32),) * 2
        _, out_LBH = jax.lax.scan(step, start, (jnp.swapaxes(given_BLG, 0, 1), begins_BL.T))
        return jnp.swapaxes(out_LBH, 0, 1).astype(x_BLD.dtype)


class BiLSTM(nn.Module):
    """`num_layers` layers of LSTMs in both directions, each half as wide as what it reads, side by side: [B, L, D] -> [B, L, D].

    In either direction a segment of a packed row begins with an empty state; padding gives 0.
    """

    context: Context
    width: int
    num_layers: int

    @nn.compact
    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
        layout, half = self.context.layout, self.width // 2
        x_BLD = layout.constrain(x_BLD, "batch", None, None)  # the loop goes over the whole length

        def begins(segments_BL: jax.Array) -> jax.Array:
            return jnp.diff(segments_BL, axis=1, prepend=-1) != 0

        for n in range(self.num_layers):
            forward = LSTM(self.context, self.width, half, name=f"forward_{n}")
            backward = LSTM(self.context, self.width, self.width - half, name=f"backward_{n}")
            there_BLH, back_BLH = forward(x_BLD, begins(segments_BL)), backward(x_BLD[:, ::-1], begins(segments_BL[:, ::-1]))[:, ::-1]
            x_BLD = jnp.concatenate([there_BLH, back_BLH], axis=-1)
        return layout.constrain(jnp.where(segments_BL[..., None] > 0, x_BLD, 0), "batch", "residual_length", "residual")


def bilstm_flops(*, width: int, num_layers: int, length: int) -> float:
    """Multiply-adds x 2 of the matrix products of a BiLSTM for one row."""
    return num_layers * 2.0 * length * sum(4 * hidden * (width + hidden) for hidden in (width // 2, width - width // 2))
