"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): post-norm encoders with learned positions, segment types and an MLM head."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ptm.fields import field
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import Headed, MLMHead
from ptm.nn.masks import Mask, cached_mask, self_mask
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.norm import Norm
from ptm.nn.shape import BlockConfig, block_flops, check_heads
from ptm.nn.stack import Output, Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shape of a BERT model."""

    name: ClassVar[str] = "bert"
    kind: ClassVar[str] = "encoder"
    heads: ClassVar[tuple[str, ...]] = ("mlm", "pooled", "pair", "classify", "tag", "qa")
    summary: ClassVar[str] = "first"  # position whose hidden state stands for a row
    position_offset: ClassVar[int] = 0  # rows of the position table before the first position
    head_activation: ClassVar[str | None] = None  # of the MLM head; None = that of the feed-forward
    classify_activation: ClassVar[str | None] = None  # None: classification reads the pooler

    vocab_size: int | None = field(None, low=1, unit="pieces", doc="Rows of the token table; None = the tokenizer's size.")
    num_layers: int = field(12, low=1, high=4096, doc="Layers.")
    width: int = field(768, low=1, doc="Width of the residual stream.")
    num_heads: int = field(12, low=1, doc="Attention heads; divides width.")
    mlp_width: int | None = field(None, low=1, doc="Width of the feed-forward; None = 4 x width.")
    max_length: int = field(512, low=1, unit="tokens", doc="Rows of the position table.")
    num_types: int = field(2, low=1, doc="Rows of the segment-type table.")
    activation: str = field("gelu", choices=tuple(ACTIVATIONS), doc="Activation of the feed-forward, and of the MLM head but for RoBERTa's.")
    tie_embeddings: bool = field(True, doc="Project on the token table in the MLM head instead of a table of its own.")
    norm_eps: float = field(1e-12, low=0.0, doc="Added to variances.")
    dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout of embeddings and sublayers.")
    attention_dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout of attention weights.")
    init_std: float = field(0.02, low=0.0, doc="Standard deviation of initial kernels and tables.")

    def check(self, where: str) -> None:
        check_heads(where, width=self.width, num_heads=self.num_heads)

    def block(self) -> BlockConfig:
        std, head_dim = self.init_std, self.width // self.num_heads
        return BlockConfig(
            width=self.width, num_heads=self.num_heads, head_dim=head_dim, mlp_width=self.mlp_width or 4 * self.width, prenorm=False,
            norm_eps=self.norm_eps, activation=self.activation, scale=head_dim**-0.5, dropout=self.dropout,
            attention_dropout=self.attention_dropout, query_std=std, key_std=std, attention_out_std=std, mlp_in_std=std, mlp_out_std=std,
        )  # fmt: skip

    def forward_flops(self, lengths: dict[str, int], positions: int) -> float:
        """FLOPs of one row's forward pass, with the MLM head at `positions` positions."""
        length = lengths["L"]
        head = 2 * positions * self.width * (self.width + self.vocab_size)
        return self.num_layers * block_flops(self.block(), length=length, keys=length) + head


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Shape of a RoBERTa model: BERT's, with positions that begin after the padding piece's, one segment type and no pair task."""

    name: ClassVar[str] = "roberta"
    heads: ClassVar[tuple[str, ...]] = ("mlm", "pooled", "classify", "tag", "qa")
    position_offset: ClassVar[int] = 2  # the padding piece has id 1, and position 1
    head_activation: ClassVar[str | None] = "gelu"
    classify_activation: ClassVar[str | None] = "tanh"

    num_types: int = field(1, low=1, doc="Rows of the segment-type table; RoBERTa tells no segments apart, its released checkpoints hold one row.")
    norm_eps: float = field(1e-5, low=0.0, doc="Added to variances.")


# Devlin et al. 2019, section 3; the smaller ones from Turc et al. 2019, table 1.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "width": 128, "num_heads": 2},
    "mini": {"num_layers": 4, "width": 256, "num_heads": 4},
    "small": {"num_layers": 4, "width": 512, "num_heads": 8},
    "medium": {"num_layers": 8, "width": 512, "num_heads": 8},
    "base": {"num_layers": 12, "width": 768, "num_heads": 12},
    "large": {"num_layers": 24, "width": 1024, "num_heads": 16},
}


# Liu et al. 2019, section 4; Conneau et al. 2020, appendix (XLM-R).
ROBERTA_SIZES: dict[str, dict[str, Any]] = {name: SIZES[name] for name in ("base", "large")}


class Bert(Headed):
    """tokens_BL (and types_BL) -> hidden_BLD. One with `cross` also decodes, as a side of an encoder-decoder."""

    config: BertConfig
    cross: bool = False

    def setup(self) -> None:
        c = self.config
        self.token_embed = Embed(self.context, c.vocab_size, c.width, c.init_std)
        self.position_embed = Embed(self.context, c.max_length + c.position_offset, c.width, c.init_std)
        self.type_embed = Embed(self.context, c.num_types, c.width, c.init_std)
        self.embed_norm = Norm("layer", c.norm_eps)
        self.embed_dropout = Dropout(c.dropout)
        self.encoder = Stack(dataclasses.replace(c.block(), cross=self.cross), self.context, c.num_layers)
        if "mlm" in self.heads:
            self.mlm_head = MLMHead(
                self.context, c.width, c.width, c.vocab_size, c.head_activation or c.activation, "layer", c.norm_eps, c.init_std, tied=c.tie_embeddings
            )
        self.make_heads(
            width=c.width, std=c.init_std, dropout=c.dropout, activation=c.classify_activation, pooled=c.classify_activation is None
        )  # fmt: skip

    def __call__(
        self, batch: dict[str, jax.Array], *, mask: str = "full", memory_BID: Any = None, memory_mask: Mask | None = None, cache: Any = None,
        states: bool = False, maps: bool = False, train: bool = False,
    ) -> Output:  # fmt: skip
        """Hidden states of a batch; a batch without types_BL is all of type 0. Memory and cache are those of a decoder."""
        tokens_BL = batch["tokens_BL"]
        types_BL = batch["types_BL"] if "types_BL" in batch else jnp.zeros_like(tokens_BL)
        positions_BL = batch["positions_BL"] + self.config.position_offset
        x_BLD = self.token_embed(tokens_BL) + self.position_embed(positions_BL) + self.type_embed(types_BL)
        x_BLD = self.embed_dropout(self.embed_norm(x_BLD), deterministic=not train)
        options = {"memory_BID": memory_BID, "memory_mask": memory_mask, "states": states, "maps": maps, "train": train}
        if cache is None:
            return self.encoder(x_BLD, mask=self_mask(mask, batch), **options)
        decode_mask, seen = cached_mask(mask, batch, cache["seen"])
        out = self.encoder(x_BLD, mask=decode_mask, cache=cache["layers"], **options)
        return out.replace(cache={"layers": out.cache, "seen": seen})

    def memory(self, encoded: Output) -> tuple[dict[str, jax.Array], ...]:
        """What each layer reads of an encoder's hidden states, once and for all tokens."""
        return self.encoder.memory(encoded.hidden_BLD)

    def mlm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.mlm_head(hidden, self.token_embed)
