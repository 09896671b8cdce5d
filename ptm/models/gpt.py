"""GPT-2 (Radford et al. 2019), and with `prenorm` off GPT (Radford et al. 2018): decoders with learned positions and tied embeddings."""

import dataclasses
from typing import Any, ClassVar

import jax

from ptm.fields import field
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import Headed
from ptm.nn.linear import Linear
from ptm.nn.masks import Mask, cached_mask, empty_seen, self_mask
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.shape import BIASED, BlockConfig, block_flops, check_heads
from ptm.nn.stack import Output, Stack, empty_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a GPT or GPT-2 model."""

    name: ClassVar[str] = "gpt"
    kind: ClassVar[str] = "decoder"
    heads: ClassVar[tuple[str, ...]] = ("lm", "classify", "tag", "qa")
    summary: ClassVar[str] = "last"  # position whose hidden state stands for a row

    vocab_size: int | None = field(None, low=1, unit="pieces", doc="Rows of the token table; None = the tokenizer's size.")
    num_layers: int = field(12, low=1, high=4096, doc="Layers.")
    width: int = field(768, low=1, doc="Width of the residual stream.")
    num_heads: int = field(12, low=1, doc="Attention heads; divides width.")
    mlp_width: int | None = field(None, low=1, doc="Width of the feed-forward; None = 4 x width.")
    max_length: int = field(1024, low=1, unit="tokens", doc="Rows of the position table.")
    prenorm: bool = field(True, doc="Norm before each sublayer and a final one (GPT-2), or after each residual (GPT).")
    activation: str = field("gelu_tanh", choices=tuple(ACTIVATIONS), doc="Activation of the feed-forward.")
    use_bias: bool = field(True, doc="Biases in linear maps and norms.")
    tie_embeddings: bool = field(True, doc="Project on the token table instead of a head of its own.")
    scale_attention: bool = field(True, doc="Divide attention logits by the square root of the head's width.")
    scale_by_layer: bool = field(False, doc="Divide the attention logits of the n-th layer by n as well.")
    norm_eps: float = field(1e-5, low=0.0, doc="Added to variances.")
    dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout of embeddings and sublayers.")
    attention_dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout of attention weights.")
    init_std: float = field(0.02, low=0.0, doc="Standard deviation of initial kernels and tables.")
    residual_std: float | None = field(None, low=0.0, doc="That of kernels that write to the residual stream; None = init_std / sqrt(2 x layers).")

    def check(self, where: str) -> None:
        check_heads(where, width=self.width, num_heads=self.num_heads)

    def block(self) -> BlockConfig:
        residual_std = self.init_std / (2 * self.num_layers) ** 0.5 if self.residual_std is None else self.residual_std
        head_dim = self.width // self.num_heads
        return BlockConfig(
            width=self.width, num_heads=self.num_heads, head_dim=head_dim, mlp_width=self.mlp_width or 4 * self.width,
            prenorm=self.prenorm, norm_eps=self.norm_eps, biases=BIASED if self.use_bias else (), activation=self.activation,
            scale=head_dim**-0.5 if self.scale_attention else 1.0, scale_by_layer=self.scale_by_layer, dropout=self.dropout,
            attention_dropout=self.attention_dropout, query_std=self.init_std, key_std=self.init_std, attention_out_std=residual_std,
            mlp_in_std=self.init_std, mlp_out_std=residual_std,
        )  # fmt: skip

    def forward_flops(self, lengths: dict[str, int], positions: int) -> float:
        """FLOPs of one row's forward pass, with vocabulary logits at `positions` positions."""
        length = lengths["L"]
        return self.num_layers * block_flops(self.block(), length=length, keys=length) + 2 * positions * self.width * self.vocab_size


# Radford et al. 2018, section 4.1; Radford et al. 2019, table 2 (the smallest as released: 124 million parameters).
SIZES: dict[str, dict[str, Any]] = {
    "gpt1": {"num_layers": 12, "width": 768, "num_heads": 12, "max_length": 512, "prenorm": False, "residual_std": 0.02},
    "small": {"num_layers": 12, "width": 768, "num_heads": 12},
    "medium": {"num_layers": 24, "width": 1024, "num_heads": 16},
    "large": {"num_layers": 36, "width": 1280, "num_heads": 20},
    "xl": {"num_layers": 48, "width": 1600, "num_heads": 25},
}


class GPT(Headed):
    """tokens_BL -> hidden_BLD; head `lm`: logits_BLV. One with `cross` is a side of an encoder-decoder."""

    config: Config
    cross: bool = False

    def setup(self) -> None:
        c = self.config
        self.token_embed = Embed(self.context, c.vocab_size, c.width, c.init_std)
        self.position_embed = Embed(self.context, c.max_length, c.width, c.init_std)
        self.decoder = Stack(dataclasses.replace(c.block(), cross=self.cross), self.context, c.num_layers)
        self.embed_dropout = Dropout(c.dropout)
        if "lm" in self.heads and not c.tie_embeddings:
            self.lm_head = Linear(self.context, (c.width,), (c.vocab_size,), c.init_std, use_bias=False, dtype=self.context.logits)
        self.make_heads(width=c.width, std=c.init_std, dropout=c.dropout, activation=None, use_bias=False)

    def __call__(
        self, batch: dict[str, jax.Array], *, mask: str = "causal", memory_BID: Any = None, memory_mask: Mask | None = None, cache: Any = None,
        states: bool = False, maps: bool = False, train: bool = False,
    ) -> Output:  # fmt: skip
        """Hidden states of a batch; with a cache, the batch continues the rows that the cache holds."""
        x_BLD = self.token_embed(batch["tokens_BL"]) + self.position_embed(batch["positions_BL"])
        x_BLD = self.embed_dropout(x_BLD, deterministic=not train)
        options = {"memory_BID": memory_BID, "memory_mask": memory_mask, "states": states, "maps": maps, "train": train}
        if cache is None:
            return self.decoder(x_BLD, mask=self_mask(mask, batch), **options)
        decode_mask, seen = cached_mask(mask, batch, cache["seen"])
        out = self.decoder(x_BLD, mask=decode_mask, cache=cache["layers"], **options)
        return out.replace(cache={"layers": out.cache, "seen": seen})

    def memory(self, encoded: Output) -> tuple[dict[str, jax.Array], ...]:
        """What each layer reads of an encoder's hidden states, once and for all tokens."""
        return self.decoder.memory(encoded.hidden_BLD)

    def lm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.token_embed.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)

    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        """A cache for decoding `length` tokens of `rows` rows."""
        layers = empty_cache(self.config.block(), self.context, num_layers=self.config.num_layers, rows=rows, length=length)
        return {"layers": layers, "seen": empty_seen(rows, length)}
