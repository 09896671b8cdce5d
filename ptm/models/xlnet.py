"""XLNet (Yang et al. 2019): a post-norm encoder with relative positions, memory, and a second stream that predicts tokens in any order."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.fields import ConfigError, field
from ptm.nn.context import Context
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import Headed, MLMHead
from ptm.nn.linear import contract
from ptm.nn.masks import Mask, self_mask
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.shape import BlockConfig, block_flops, check_heads
from ptm.nn.stack import Output
from ptm.nn.two_stream import TwoStreamStack, View, empty_memory, two_stream_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of an XLNet model."""

    name: ClassVar[str] = "xlnet"
    kind: ClassVar[str] = "encoder"
    heads: ClassVar[tuple[str, ...]] = ("lm", "mlm", "classify", "tag", "qa")
    summary: ClassVar[str] = "last"  # position whose hidden state stands for a row
    max_length: ClassVar[None] = None  # relative positions: any length
    num_types: ClassVar[int] = 3  # segment types of published inputs, A, B and cls; the model only sees which are equal

    vocab_size: int | None = field(None, low=1, unit="pieces", doc="Rows of the token table; None = the tokenizer's size.")
    num_layers: int = field(12, low=1, high=4096, doc="Layers.")
    width: int = field(768, low=2, doc="Width of the residual stream; even.")
    num_heads: int = field(12, low=1, doc="Attention heads; divides width.")
    mlp_width: int | None = field(None, low=1, doc="Width of the feed-forward; None = 4 x width.")
    attn_type: str = field("bi", choices=("bi", "uni"), doc="Whom a position may see: both sides (XLNet), or the left alone (Transformer-XL).")
    clamp_len: int | None = field(None, low=1, unit="tokens", doc="Larger distances count as this one; None = all distances differ.")
    activation: str = field("gelu", choices=tuple(ACTIVATIONS), doc="Activation of the feed-forward.")
    tie_embeddings: bool = field(True, doc="Project on the token table instead of a table of the head's own.")
    norm_eps: float = field(1e-12, low=0.0, doc="Added to variances.")
    dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout of all but attention weights: embeddings, encodings, sublayers, feed-forward, output.")
    attention_dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout of attention weights.")
    init_std: float = field(0.02, low=0.0, doc="Standard deviation of initial kernels, tables and attention biases.")

    def check(self, where: str) -> None:
        if self.width % 2:
            raise ConfigError(f"{where}.width={self.width} is odd; encodings of distances are half sines and half cosines. Allowed: even widths.")
        check_heads(where, width=self.width, num_heads=self.num_heads)

    def block(self) -> BlockConfig:
        std, head_dim = self.init_std, self.width // self.num_heads
        return BlockConfig(
            width=self.width, num_heads=self.num_heads, head_dim=head_dim, mlp_width=self.mlp_width or 4 * self.width, prenorm=False,
            norm_eps=self.norm_eps, biases=("mlp", "norm"), activation=self.activation, scale=head_dim**-0.5, dropout=self.dropout,
            attention_dropout=self.attention_dropout, mlp_dropout=self.dropout,
            query_std=std, key_std=std, attention_out_std=std, mlp_in_std=std, mlp_out_std=std,
        )  # fmt: skip

    def forward_flops(self, lengths: dict[str, int], positions: int, heads: tuple[str, ...] = ("lm",)) -> float:
        """FLOPs of one row's forward pass; `lm` runs the query stream at S positions, with M remembered ones, and has logits at `positions`."""
        length, width, block = lengths["L"], self.width, self.block()
        if "lm" in heads:
            layer = two_stream_flops(block, length=length, queries=lengths["S"], memory=lengths["M"])
            return self.num_layers * layer + 2 * positions * width * self.vocab_size
        layer = block_flops(block, length=length, keys=length) + 2 * length * 2 * length * width
        return self.num_layers * layer + (2 * positions * width * (width + self.vocab_size) if "mlm" in heads else 0)


# Yang et al. 2019, appendix A.4 (large; base has BERT's shape).
SIZES: dict[str, dict[str, Any]] = {
    "base": {"num_layers": 12, "width": 768, "num_heads": 12},
    "large": {"num_layers": 24, "width": 1024, "num_heads": 16},
}


class LMHead(nn.Module):
    """Projection on the token table or a kernel of its own, and a bias."""

    context: Context
    width: int
    vocab_size: int
    std: float
    tied: bool

    @nn.compact
    def __call__(self, hidden: jax.Array, table: Embed) -> jax.Array:
        bias_V = self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
        if self.tied:
            return table.attend(hidden) + bias_V
        kernel = self.param("kernel", nn.initializers.normal(self.std), (self.width, self.vocab_size), jnp.float32)
        path = "/".join((*self.path, "kernel"))
        kernel = self.context.layout.gathered(path, kernel.astype(self.context.dtype))
        return contract(self.context.scaled(hidden, path), kernel, dims=1, context=self.context, dtype=self.context.logits) + bias_V


class XLNet(Headed):
    """tokens_BL (and types_BL) -> hidden_BLD; with target_index_BS under the mask `permutation` also query_BSD, which head `lm` reads.

    `classify` reads the hidden state of the last position of a text, where XLNet's inputs have their cls token.
    """

    config: Config

    def setup(self) -> None:
        c = self.config
        self.token_embed = Embed(self.context, c.vocab_size, c.width, c.init_std)
        self.mask_embed = self.param("mask_embed", nn.initializers.normal(c.init_std), (c.width,), jnp.float32)
        self.embed_dropout = Dropout(c.dropout)
        self.encoder = TwoStreamStack(c.block(), self.context, c.num_layers, c.clamp_len)
        if "lm" in self.heads:
            self.lm_head = LMHead(self.context, c.width, c.vocab_size, c.init_std, c.tie_embeddings)
        if "mlm" in self.heads:
            self.mlm_head = MLMHead(self.context, c.width, c.width, c.vocab_size, c.activation, "layer", c.norm_eps, c.init_std, tied=c.tie_embeddings)
        self.make_heads(width=c.width, std=c.init_std, dropout=c.dropout, activation="tanh")

    def __call__(
        self, batch: dict[str, jax.Array], *, mask: str = "full", cache: Any = None, states: bool = False, maps: bool = False, train: bool = False
    ) -> Output:
        """Hidden states of a batch; with a memory as `cache`, its rows continue those that were remembered.

        A batch without types_BL is all of one type; what is remembered is of type 0. reversed_BL is 1 where text stands in reverse order.
        """
        content_BLD = self.embed_dropout(self.token_embed(batch["tokens_BL"]), deterministic=not train)
        content_mask = self_mask(mask, batch)
        if cache is not None:
            content_mask = content_mask.behind(cache["valid_BM"])
        if self.config.attn_type == "uni":
            content_mask = content_mask.replace(window=(content_mask.key_segments_BT.shape[1], 0))
        streams, views = (content_BLD,), (_view(batch, content_mask, None),)
        if mask == "permutation" and "target_index_BS" in batch:
            index_BS = batch["target_index_BS"]
            query_BSD = jnp.broadcast_to(self.mask_embed.astype(content_BLD.dtype), (*index_BS.shape, self.config.width))
            query_BSD = self.context.layout.constrain(query_BSD, "batch", None, "residual")
            streams += (self.embed_dropout(query_BSD, deterministic=not train),)
            views += (_view(batch, content_mask.at(index_BS), index_BS),)
        return self.encoder(streams, views, segments_BL=batch["segments_BL"], cache=cache, states=states, maps=maps, train=train)

    def lm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.lm_head(hidden, self.token_embed)

    def mlm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.mlm_head(hidden, self.token_embed)

    def forward_flops(self, lengths: dict[str, int], positions: int, heads: tuple[str, ...]) -> float:
        return self.config.forward_flops(lengths, positions, heads)

    def empty_cache(self, rows: int, length: int) -> dict[str, jax.Array]:
        """An empty memory of `length` positions for `rows` rows."""
        return empty_memory(self.config.block(), num_layers=self.config.num_layers, rows=rows, length=length)


def _view(batch: dict[str, jax.Array], mask: Mask, index_BS: jax.Array | None) -> View:
    """How queries see a batch, at the positions `index_BS` or everywhere."""

    def own(x_BL: jax.Array) -> jax.Array:
        return x_BL if index_BS is None else jnp.take_along_axis(x_BL, index_BS, axis=1, mode="fill", fill_value=0)

    differs_BLT = sign_BL = None
    if "types_BL" in batch:
        types_BL = batch["types_BL"]
        types_BT = jnp.pad(types_BL, [(0, 0), (mask.key_segments_BT.shape[1] - types_BL.shape[1], 0)])
        differs_BLT = own(types_BL)[:, :, None] != types_BT[:, None, :]
    if "reversed_BL" in batch:
        sign_BL = 1 - 2 * own(batch["reversed_BL"])
    return View(mask, differs_BLT, sign_BL)
