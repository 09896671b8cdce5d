"""ALBERT (Lan et al. 2020): BERT with a narrow token table and layers that share parameters."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ptm.fields import ConfigError, field
from ptm.models.bert import BertConfig
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import Headed, MLMHead
from ptm.nn.layers import Sharing
from ptm.nn.linear import Linear
from ptm.nn.masks import self_mask
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.norm import Norm
from ptm.nn.shape import block_flops
from ptm.nn.stack import Output, Stack

# What is shared -> parts of a layer. The norm that follows a part's residual belongs to the part.
SHARED: dict[str, tuple[str, ...]] = {
    "all": ("attention", "attention_norm", "mlp", "mlp_norm"),
    "attention": ("attention", "attention_norm"),
    "mlp": ("mlp", "mlp_norm"),
    "none": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """Shape of an ALBERT model: BERT's, with factorised embeddings and shared layers."""

    name: ClassVar[str] = "albert"

    embed_width: int = field(128, low=1, doc="Width of the embeddings, which a dense map takes to `width` (section 3.1).")
    num_groups: int = field(1, low=1, doc="Groups of layers; those of a group share parameters. Layer n is in group int(n / (num_layers / num_groups)).")
    inner_layers: int = field(1, low=1, doc="Blocks with parameters of their own that a layer runs one after the other.")
    share: str = field(
        "all", choices=tuple(SHARED), doc="Parts that layers of a group share, each with the norm behind it (table 4); all layers have the rest to themselves."
    )
    activation: str = field("gelu_tanh", choices=tuple(ACTIVATIONS), doc="Activation of the feed-forward and the MLM head.")
    dropout: float = field(0.0, low=0.0, high=1.0, doc="Dropout of embeddings and sublayers; the released models of version 2 have none.")
    attention_dropout: float = field(0.0, low=0.0, high=1.0, doc="Dropout of attention weights.")
    classify_dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout before the maps of classification and tagging.")

    def check(self, where: str) -> None:
        super().check(where)
        if self.num_groups > self.num_layers:
            raise ConfigError(f"{where}.num_groups={self.num_groups} exceeds {where}.num_layers={self.num_layers}; allowed: 1 to {self.num_layers}.")
        if self.share == "none" and self.num_groups > 1:
            raise ConfigError(f"{where}.num_groups={self.num_groups} has no meaning with {where}.share=none, where nothing is shared; leave it at 1.")

    @property
    def applications(self) -> int:
        """Blocks that a forward pass runs, one after the other."""
        return self.num_layers * self.inner_layers

    def sharing(self) -> Sharing | None:
        """Which blocks share what."""
        if self.share == "none":
            return None
        # As floats, with their rounding: the published rule, by which released weights are to be read.
        groups = [int(n / (self.num_layers / self.num_groups)) for n in range(self.num_layers)]
        return Sharing(tuple(group * self.inner_layers + inner for group in groups for inner in range(self.inner_layers)), SHARED[self.share])

    def forward_flops(self, lengths: dict[str, int], positions: int) -> float:
        """FLOPs of one row's forward pass, with the MLM head at `positions` positions."""
        length = lengths["L"]
        head = 2 * positions * self.embed_width * (self.width + self.vocab_size)
        return 2 * length * self.embed_width * self.width + self.applications * block_flops(self.block(), length=length, keys=length) + head


# Table 1; the number of heads from the released models.
SIZES: dict[str, dict[str, Any]] = {
    "base": {"num_layers": 12, "width": 768, "num_heads": 12},
    "large": {"num_layers": 24, "width": 1024, "num_heads": 16},
    "xlarge": {"num_layers": 24, "width": 2048, "num_heads": 16},
    "xxlarge": {"num_layers": 12, "width": 4096, "num_heads": 64},
}


class Albert(Headed):
    """tokens_BL (and types_BL) -> hidden_BLD."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.token_embed = Embed(self.context, c.vocab_size, c.embed_width, c.init_std)
        self.position_embed = Embed(self.context, c.max_length, c.embed_width, c.init_std)
        self.type_embed = Embed(self.context, c.num_types, c.embed_width, c.init_std)
        self.embed_norm = Norm("layer", c.norm_eps)
        self.embed_dropout = Dropout(c.dropout)
        self.embed_projection = Linear(self.context, (c.embed_width,), (c.width,), c.init_std)
        self.encoder = Stack(c.block(), self.context, c.applications, sharing=c.sharing())
        if "mlm" in self.heads:
            self.mlm_head = MLMHead(self.context, c.width, c.embed_width, c.vocab_size, c.activation, "layer", c.norm_eps, c.init_std, tied=c.tie_embeddings)
        self.make_heads(width=c.width, std=c.init_std, dropout=c.classify_dropout, activation=None, pooled=True)

    def __call__(self, batch: dict[str, jax.Array], *, mask: str = "full", states: bool = False, maps: bool = False, train: bool = False) -> Output:
        """Hidden states of a batch, `states` after each block; a batch without types_BL is all of type 0."""
        tokens_BL = batch["tokens_BL"]
        types_BL = batch["types_BL"] if "types_BL" in batch else jnp.zeros_like(tokens_BL)
        x_BLE = self.token_embed(tokens_BL) + self.position_embed(batch["positions_BL"]) + self.type_embed(types_BL)
        x_BLE = self.embed_dropout(self.embed_norm(x_BLE), deterministic=not train)
        x_BLD = self.context.layout.constrain(self.embed_projection(x_BLE), "batch", "residual_length", "residual")
        return self.encoder(x_BLD, mask=self_mask(mask, batch), states=states, maps=maps, train=train)

    def mlm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.mlm_head(hidden, self.token_embed)
