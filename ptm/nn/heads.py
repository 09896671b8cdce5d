"""Small networks on top of hidden states, and the class that gives a model those that its objective asks for.

A head is named by a string, `classify:3` being the head `classify` with 3 outputs. Its parameters lie at the top of the model's tree.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.linear import Linear
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.norm import Norm
from ptm.nn.readers import BiLSTM, LayerMix
from ptm.nn.stack import Output

# Top-level names of parameters that belong to heads, ELECTRA's generator to `mlm`: what a pretrained body may lack when another head is put on it.
HEAD_PARAMS = (
    "lm_head", "mlm_head", "generator", "pooler", "pair_head", "rtd_head", "restore_head", "classify_head", "tag_head", "qa_head", "hidden_projection",
    "layer_mix", "bilstm",
)  # fmt: skip
READERS = ("layer_mix", "bilstm")  # no heads of their own: what task heads read the hidden states through (ptm.nn.readers)
TASK_HEADS = ("classify", "tag", "qa")
COMMON_HEADS = ("hidden_projection", *READERS)  # heads of every family


def split_head(head: str) -> tuple[str, int | None]:
    """(name, number of outputs or None) of a head: ("classify", 3) of `classify:3`."""
    name, _, size = head.partition(":")
    return name, int(size) if size else None


def head_names(heads: tuple[str, ...]) -> set[str]:
    """Names of heads, without their numbers of outputs."""
    return {split_head(head)[0] for head in heads}


class MLMHead(nn.Module):
    """Dense, activation, norm, projection on the token table or a table of its own, bias (Devlin et al. 2019, published code).

    The dense map leads from the hidden width to that of the table.
    """

    context: Context
    width: int
    table_width: int
    vocab_size: int
    activation: str
    norm: str
    norm_eps: float
    std: float
    dense_bias: bool = True
    norm_bias: bool = True
    bias: bool = True
    tied: bool = True

    @nn.compact
    def __call__(self, hidden: jax.Array, table: Embed) -> jax.Array:
        y = Linear(self.context, (self.width,), (self.table_width,), self.std, self.dense_bias, name="dense")(hidden)
        y = Norm(self.norm, self.norm_eps, self.norm_bias, name="norm")(ACTIVATIONS[self.activation](y))
        if self.tied:
            logits = table.attend(y)
        else:
            logits = Linear(self.context, (self.table_width,), (self.vocab_size,), self.std, use_bias=False, dtype=self.context.logits, name="decoder")(y)
        return logits + self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32) if self.bias else logits


class Pooler(nn.Module):
    """tanh(dense(x)): BERT's summary of a row, from the hidden state of its first position."""

    context: Context
    width: int
    std: float

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        return jnp.tanh(Linear(self.context, (self.width,), (self.width,), self.std, name="dense")(hidden))


class ClassifyHead(nn.Module):
    """Logits of a row from its summary, with a dense layer before them where there is an activation; dropout before each map."""

    context: Context
    width: int
    outputs: int
    std: float
    activation: str | None = None
    dropout: float = 0.0
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if self.activation is not None:
            x = Dropout(self.dropout, deterministic=not train)(x)
            x = ACTIVATIONS[self.activation](Linear(self.context, (self.width,), (self.width,), self.std, self.use_bias, name="dense")(x))
        x = Dropout(self.dropout, deterministic=not train)(x)
        return Linear(self.context, (self.width,), (self.outputs,), self.std, self.use_bias, dtype=jnp.float32, name="labels")(x)


class Headed(nn.Module):
    """Base of the models: heads that are the same everywhere, and how they are called.

    A model's setup calls `make_heads` or `make_common_heads`; a head of its own is a method `NAME_logits(hidden, train)`.
    """

    heads: tuple[str, ...]
    context: Context

    def make_heads(self, *, width: int, std: float, dropout: float, activation: str | None, pooled: bool = False, use_bias: bool = True) -> None:
        """Makes pooler, pair_head, classify_head, tag_head and qa_head, those that the heads need.

        `classify` reads the pooler's output where `pooled`; `activation` and `use_bias` are those of ClassifyHead.
        """
        named = dict(map(split_head, self.heads))
        self.classify_pooled = pooled
        if {"pooled", "pair"} & set(named) or (pooled and "classify" in named):
            self.pooler = Pooler(self.context, width, std)
        if "pair" in named:
            self.pair_head = Linear(self.context, (width,), (2,), std, dtype=jnp.float32)
        if "classify" in named:
            self.classify_head = ClassifyHead(self.context, width, named["classify"], std, activation, dropout, use_bias)
        if "tag" in named:
            self.tag_head = Linear(self.context, (width,), (named["tag"],), std, dtype=jnp.float32)
        if "qa" in named:
            self.qa_head = Linear(self.context, (width,), (2,), std, dtype=jnp.float32)
        self.head_dropout = Dropout(dropout)
        self.make_common_heads(width=width, std=std)

    def make_common_heads(self, *, width: int, std: float) -> None:
        """Makes those of COMMON_HEADS that are asked for: all that a family needs whose other heads are its own."""
        sizes = dict(map(split_head, self.heads))
        if "hidden_projection" in sizes:
            self.hidden_projection = Linear(self.context, (width,), (sizes["hidden_projection"],), std)
        if "layer_mix" in sizes:
            self.layer_mix = LayerMix()
        if "bilstm" in sizes:
            self.bilstm = BiLSTM(self.context, width, sizes["bilstm"])

    def logits(self, hidden: jax.Array, head: str, train: bool = False) -> jax.Array:
        """Output of a head for hidden states [..., D]: logits [..., V] of lm and mlm, [..., D] of pooled, [..., N] of the others."""
        assert head in self.heads, (head, self.heads)
        return getattr(self, f"{split_head(head)[0]}_logits")(hidden, train)

    def pooled_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.pooler(hidden)

    def pair_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.pair_head(self.pooler(hidden))

    def classify_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.classify_head(self.pooler(hidden) if self.classify_pooled else hidden, train=train)

    def tag_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.tag_head(self.head_dropout(hidden, deterministic=not train))

    def qa_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.qa_head(hidden)

    def hidden_projection_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.hidden_projection(hidden)

    def readers(self, head: str) -> set[str]:
        """Which of READERS a head has between the hidden states and itself."""
        return head_names(self.heads) & set(READERS) if split_head(head)[0] in TASK_HEADS else set()

    def refine(self, out: Output, segments_BL: jax.Array) -> jax.Array:
        """The hidden states [B, L, D] as task heads read them: the mixture of all layers instead of the last ones, and behind it the LSTMs."""
        names = head_names(self.heads)
        hidden_BLD = self.layer_mix(out.states_NBLD) if "layer_mix" in names else out.hidden_BLD
        return self.bilstm(hidden_BLD, segments_BL) if "bilstm" in names else hidden_BLD

    def part_for(self, head: str) -> dict[str, str]:
        """Options of the call that gives the hidden states which a head reads; a model of one encoder needs none."""
        return {}

    def forward_flops(self, lengths: dict[str, int], positions: int, heads: tuple[str, ...]) -> float:
        """FLOPs of one row's forward pass with vocabulary logits at `positions` positions; a model of several encoders counts those that `heads` need."""
        return self.config.forward_flops(lengths, positions)

    def touch(self, batch: dict[str, jax.Array]) -> None:
        """Runs every part once, so that `init` makes all parameters."""
        self.touch_heads(self(batch, states="layer_mix" in head_names(self.heads)), batch)

    def touch_heads(self, out: Output, batch: dict[str, jax.Array], *, besides: tuple[str, ...] = ()) -> None:
        """Runs all heads but some once, and what they read through."""
        hidden_BLD = self.refine(out, batch["segments_BL"])
        for head in self.heads:
            if head not in besides and split_head(head)[0] not in READERS:
                self.logits(hidden_BLD[:, :1], head)
