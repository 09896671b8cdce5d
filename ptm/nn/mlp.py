"""Position-wise feed-forward layers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context
from ptm.nn.dropout import Dropout
from ptm.nn.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),  # jax.nn.gelu takes erfc, several times slower on CPU
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class MLP(nn.Module):
    """width -> hidden -> width; gated: activation(gate(x)) * wi(x) (Shazeer 2020)."""

    context: Context
    width: int
    hidden: int
    activation: str
    gated: bool
    use_bias: bool
    dropout: float
    in_std: float
    out_std: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array, *, train: bool) -> jax.Array:
        wide = (self.hidden,)
        y_BLF = Linear(self.context, (self.width,), wide, self.in_std, self.use_bias, name="wi")(x_BLD)
        if self.gated:
            gate_BLF = Linear(self.context, (self.width,), wide, self.in_std, self.use_bias, name="gate")(x_BLD)
            y_BLF = ACTIVATIONS[self.activation](gate_BLF) * y_BLF
        else:
            y_BLF = ACTIVATIONS[self.activation](y_BLF)
        y_BLF = self.context.layout.constrain(y_BLF, "batch", "length", "mlp")
        y_BLF = Dropout(self.dropout, deterministic=not train)(y_BLF)
        return Linear(self.context, wide, (self.width,), self.out_std, self.use_bias, name="wo")(y_BLF)
