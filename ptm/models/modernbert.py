"""ModernBERT (Warner et al. 2024): a pre-norm encoder with rotary positions, gated feed-forward and alternating windows, without biases."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.fields import ConfigError, divisors, field
from ptm.nn.context import Context
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import Headed, MLMHead, split_head
from ptm.nn.linear import Linear
from ptm.nn.masks import self_mask
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.norm import Norm
from ptm.nn.position import RotaryConfig
from ptm.nn.shape import BlockConfig, LayerKind, block_flops
from ptm.nn.stack import Output, Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a ModernBERT model."""

    name: ClassVar[str] = "modernbert"
    kind: ClassVar[str] = "encoder"
    heads: ClassVar[tuple[str, ...]] = ("mlm", "classify", "tag", "qa")
    summary: ClassVar[str] = "first"  # position whose hidden state stands for a row

    vocab_size: int | None = field(None, low=1, unit="pieces", doc="Rows of the token table; None = the tokenizer's size.")
    num_layers: int = field(22, low=1, high=4096, doc="Layers.")
    width: int = field(768, low=1, doc="Width of the residual stream.")
    num_heads: int = field(12, low=1, doc="Attention heads; divides width.")
    mlp_width: int = field(1152, low=1, doc="Width of the gated feed-forward.")
    max_length: int | None = field(8192, low=1, unit="tokens", doc="Longest row that the model is meant for; None = any.")
    activation: str = field("gelu", choices=tuple(ACTIVATIONS), doc="Activation of the feed-forward.")
    head_activation: str = field("gelu", choices=tuple(ACTIVATIONS), doc="Activation of the heads.")
    window: int = field(128, low=2, unit="tokens", doc="A position sees so many positions around it, half on each side, in layers with a window.")
    global_every: int = field(3, low=1, unit="layers", doc="Layers 0, n, 2n, ... have no window.")
    global_theta: float = field(160000.0, low=1.0, doc="Base of the wavelengths of rotary positions in layers without a window.")
    local_theta: float = field(10000.0, low=1.0, doc="That in layers with a window.")
    tie_embeddings: bool = field(True, doc="Project on the token table in the MLM head instead of a table of its own.")
    attention_bias: bool = field(False, doc="Biases in attention.")
    mlp_bias: bool = field(False, doc="Biases in the feed-forward.")
    norm_bias: bool = field(False, doc="Biases in norms.")
    head_bias: bool = field(False, doc="Bias of the heads' dense layer.")
    decoder_bias: bool = field(True, doc="Bias of the vocabulary logits.")
    norm_eps: float = field(1e-5, low=0.0, doc="Added to variances.")
    dropout: float = field(0.0, low=0.0, high=1.0, doc="Dropout of embeddings, sublayers and heads.")
    attention_dropout: float = field(0.0, low=0.0, high=1.0, doc="Dropout of attention weights.")
    init_std: float = field(0.02, low=0.0, doc="Standard deviation of initial kernels and tables.")
    residual_std: float | None = field(None, low=0.0, doc="That of kernels that write to the residual stream; None = init_std / sqrt(2 x layers).")

    def check(self, where: str) -> None:
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            fits = [n for n in divisors(self.width) if (self.width // n) % 2 == 0]
            raise ConfigError(f"{where}.num_heads={self.num_heads} must divide {where}.width={self.width} into heads of even width; head counts that fit: {fits}.")

    def block(self) -> BlockConfig:
        residual_std = self.init_std / (2 * self.num_layers) ** 0.5 if self.residual_std is None else self.residual_std
        head_dim = self.width // self.num_heads
        parts = {"qkv": self.attention_bias, "out": self.attention_bias, "mlp": self.mlp_bias, "norm": self.norm_bias}
        return BlockConfig(
            width=self.width, num_heads=self.num_heads, head_dim=head_dim, mlp_width=self.mlp_width, prenorm=True, norm_eps=self.norm_eps,
            biases=tuple(part for part, biased in parts.items() if biased), activation=self.activation, gated=True,
            scale=head_dim**-0.5, rotary=RotaryConfig(self.global_theta, head_dim), dropout=self.dropout, attention_dropout=self.attention_dropout,
            query_std=self.init_std, key_std=self.init_std, attention_out_std=residual_std, mlp_in_std=self.init_std, mlp_out_std=residual_std,
        )  # fmt: skip

    def kinds(self) -> tuple[LayerKind, ...]:
        """Window and rotary base of each layer; the first reads the embedding norm's output and has no norm of its own before attention."""
        local = LayerKind(window=(self.window // 2, self.window // 2), rotary=RotaryConfig(self.local_theta, self.width // self.num_heads))
        kinds = [LayerKind() if n % self.global_every == 0 else local for n in range(self.num_layers)]
        return (dataclasses.replace(kinds[0], attention_norm=False), *kinds[1:])

    def forward_flops(self, lengths: dict[str, int], positions: int) -> float:
        """FLOPs of one row's forward pass, with the MLM head at `positions` positions; windows are not discounted."""
        length = lengths["L"]
        head = 2 * positions * self.width * (self.width + self.vocab_size)
        return self.num_layers * block_flops(self.block(), length=length, keys=length) + head


# Warner et al. 2024, table 3 (appendix).
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"num_layers": 28, "width": 1024, "num_heads": 16, "mlp_width": 2624},
}


class TaskHead(nn.Module):
    """Dense, activation, norm, dropout, logits."""

    config: Config
    context: Context
    outputs: int

    @nn.compact
    def __call__(self, hidden: jax.Array, *, train: bool) -> jax.Array:
        c = self.config
        y = Linear(self.context, (c.width,), (c.width,), c.init_std, c.head_bias, name="dense")(hidden)
        y = Norm("layer", c.norm_eps, c.norm_bias, name="norm")(ACTIVATIONS[c.head_activation](y))
        y = Dropout(c.dropout, deterministic=not train)(y)
        return Linear(self.context, (c.width,), (self.outputs,), c.init_std, dtype=jnp.float32, name="labels")(y)


class ModernBert(Headed):
    """tokens_BL -> hidden_BLD."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.token_embed = Embed(self.context, c.vocab_size, c.width, c.init_std)
        self.embed_norm = Norm("layer", c.norm_eps, c.norm_bias)
        self.embed_dropout = Dropout(c.dropout)
        self.encoder = Stack(c.block(), self.context, c.num_layers, kinds=c.kinds())
        named = dict(map(split_head, self.heads))
        if "mlm" in named:
            self.mlm_head = MLMHead(
                self.context, c.width, c.width, c.vocab_size, c.head_activation, "layer", c.norm_eps, c.init_std,
                dense_bias=c.head_bias, norm_bias=c.norm_bias, bias=c.decoder_bias, tied=c.tie_embeddings,
            )  # fmt: skip
        if "classify" in named:
            self.classify_head = TaskHead(c, self.context, named["classify"])
        if "tag" in named:
            self.tag_head = TaskHead(c, self.context, named["tag"])
        if "qa" in named:
            self.qa_head = TaskHead(c, self.context, 2)
        self.make_common_heads(width=c.width, std=c.init_std)

    def __call__(self, batch: dict[str, jax.Array], *, mask: str = "full", states: bool = False, maps: bool = False, train: bool = False) -> Output:
        """Hidden states of a batch."""
        x_BLD = self.embed_dropout(self.embed_norm(self.token_embed(batch["tokens_BL"])), deterministic=not train)
        return self.encoder(x_BLD, mask=self_mask(mask, batch), positions_BL=batch["positions_BL"], states=states, maps=maps, train=train)

    def mlm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.mlm_head(hidden, self.token_embed)

    def classify_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.classify_head(hidden, train=train)

    def tag_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.tag_head(hidden, train=train)

    def qa_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.qa_head(hidden, train=train)
