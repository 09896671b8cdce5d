"""T5 (Raffel et al. 2020; 1.1: Shazeer 2020): a pre-norm encoder-decoder with RMS norm, relative buckets, no biases."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ptm.fields import field
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import Headed
from ptm.nn.linear import Linear
from ptm.nn.masks import cached_mask, cross_mask, empty_seen, encoder_mask, self_mask
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.position import RelativeConfig
from ptm.nn.shape import BlockConfig, block_flops
from ptm.nn.stack import Output, Stack, empty_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a T5 model; the defaults are T5 1.0's, `SIZES` entries beginning with v1_1 are T5 1.1's."""

    name: ClassVar[str] = "t5"
    kind: ClassVar[str] = "encoder_decoder"
    heads: ClassVar[tuple[str, ...]] = ("lm", "classify", "tag", "qa")
    max_length: ClassVar[None] = None  # relative positions: any length

    vocab_size: int | None = field(None, low=1, unit="pieces", doc="Rows of the token table; None = the tokenizer's size.")
    num_layers: int = field(12, low=1, high=4096, doc="Layers of the encoder.")
    decoder_layers: int | None = field(None, low=1, high=4096, doc="Layers of the decoder; None = as the encoder.")
    width: int = field(768, low=1, doc="Width of the residual stream.")
    num_heads: int = field(12, low=1, doc="Attention heads.")
    head_dim: int = field(64, low=1, doc="Width of a head.")
    mlp_width: int = field(3072, low=1, doc="Width of the feed-forward.")
    activation: str = field("relu", choices=tuple(ACTIVATIONS), doc="Activation of the feed-forward; 1.1: gelu_tanh.")
    gated: bool = field(False, doc="Gated feed-forward; 1.1: true.")
    tie_embeddings: bool = field(True, doc="Project on the token table (1.0) instead of a head of its own (1.1).")
    num_buckets: int = field(32, low=4, doc="Buckets of relative positions.")
    max_distance: int = field(128, low=2, unit="tokens", doc="Distances beyond share the last bucket.")
    norm_eps: float = field(1e-6, low=0.0, doc="Added to mean squares.")
    dropout: float = field(0.1, low=0.0, high=1.0, doc="Dropout of embeddings, sublayers, attention weights and the feed-forward's hidden layer.")
    init_factor: float = field(1.0, low=0.0, doc="Factor of all initial standard deviations.")

    def block(self, *, cross: bool) -> BlockConfig:
        # Logits are not scaled by 1/sqrt(head_dim): the query's initialisation is (Raffel et al. 2020, published code).
        width, factor, inner = self.width, self.init_factor, self.num_heads * self.head_dim
        return BlockConfig(
            width=width, num_heads=self.num_heads, head_dim=self.head_dim, mlp_width=self.mlp_width, prenorm=True, norm="rms",
            norm_eps=self.norm_eps, biases=(), activation=self.activation, gated=self.gated, cross=cross, scale=1.0,
            dropout=self.dropout, attention_dropout=self.dropout, mlp_dropout=self.dropout,
            query_std=factor * (width * self.head_dim) ** -0.5, key_std=factor * width**-0.5, attention_out_std=factor * inner**-0.5,
            mlp_in_std=factor * width**-0.5, mlp_out_std=factor * self.mlp_width**-0.5,
        )  # fmt: skip

    def forward_flops(self, lengths: dict[str, int], positions: int) -> float:
        """FLOPs of one row's forward pass, with vocabulary logits at `positions` positions of the decoder."""
        length, inputs = lengths["L"], lengths["I"]
        encoder = self.num_layers * block_flops(self.block(cross=False), length=inputs, keys=inputs)
        decoder = (self.decoder_layers or self.num_layers) * block_flops(self.block(cross=True), length=length, keys=length, memory=inputs)
        return encoder + decoder + 2 * positions * self.width * self.vocab_size


# Raffel et al. 2020, section 3.7; 1.1 as released.
_V1 = {
    "small": {"num_layers": 6, "width": 512, "num_heads": 8, "mlp_width": 2048},
    "base": {"num_layers": 12, "width": 768, "num_heads": 12, "mlp_width": 3072},
    "large": {"num_layers": 24, "width": 1024, "num_heads": 16, "mlp_width": 4096},
    "3b": {"num_layers": 24, "width": 1024, "num_heads": 32, "head_dim": 128, "mlp_width": 16384},
    "11b": {"num_layers": 24, "width": 1024, "num_heads": 128, "head_dim": 128, "mlp_width": 65536},
}
_V1_1 = {"activation": "gelu_tanh", "gated": True, "tie_embeddings": False}
SIZES: dict[str, dict[str, Any]] = {
    **_V1,
    "v1_1_small": {"num_layers": 8, "width": 512, "num_heads": 6, "mlp_width": 1024, **_V1_1},
    "v1_1_base": {"num_layers": 12, "width": 768, "num_heads": 12, "mlp_width": 2048, **_V1_1},
    "v1_1_large": {"num_layers": 24, "width": 1024, "num_heads": 16, "mlp_width": 2816, **_V1_1},
    "v1_1_xl": {"num_layers": 24, "width": 2048, "num_heads": 32, "mlp_width": 5120, **_V1_1},
    "v1_1_xxl": {"num_layers": 24, "width": 4096, "num_heads": 64, "mlp_width": 10240, **_V1_1},
    # Xue et al. 2021 (mT5) has the shapes of 1.1 with a vocabulary of 250,112; Xue et al. 2022, table 1 (ByT5, over bytes).
    "byt5_small": {"num_layers": 12, "decoder_layers": 4, "width": 1472, "num_heads": 6, "mlp_width": 3584, **_V1_1},
    "byt5_base": {"num_layers": 18, "decoder_layers": 6, "width": 1536, "num_heads": 12, "mlp_width": 3968, **_V1_1},
    "byt5_large": {"num_layers": 36, "decoder_layers": 12, "width": 1536, "num_heads": 16, "mlp_width": 3840, **_V1_1},
    "byt5_xl": {"num_layers": 36, "decoder_layers": 12, "width": 2560, "num_heads": 32, "mlp_width": 6720, **_V1_1},
    "byt5_xxl": {"num_layers": 36, "decoder_layers": 12, "width": 4672, "num_heads": 64, "mlp_width": 12352, **_V1_1},
}


class T5(Headed):
    """inputs_BI, tokens_BL -> hidden_BLD of the decoder; head `lm`: logits_BLV."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.token_embed = Embed(self.context, c.vocab_size, c.width, c.init_factor)
        std = c.init_factor * c.width**-0.5
        self.encoder = Stack(c.block(cross=False), self.context, c.num_layers, RelativeConfig(c.num_buckets, c.max_distance, True, std))
        self.decoder = Stack(
            c.block(cross=True), self.context, c.decoder_layers or c.num_layers, RelativeConfig(c.num_buckets, c.max_distance, False, std)
        )
        self.embed_dropout = Dropout(c.dropout)
        self.out_dropout = Dropout(c.dropout)
        if "lm" in self.heads and not c.tie_embeddings:
            self.lm_head = Linear(self.context, (c.width,), (c.vocab_size,), std, use_bias=False, dtype=self.context.logits)
        self.make_heads(width=c.width, std=std, dropout=c.dropout, activation="tanh")

    def encode(self, batch: dict[str, jax.Array], *, states: bool = False, maps: bool = False, train: bool = False) -> Output:
        """Hidden states of the encoder, hidden_BLD with L = I."""
        x_BID = self.embed_dropout(self.token_embed(batch["inputs_BI"]), deterministic=not train)
        out = self.encoder(x_BID, mask=encoder_mask(batch), states=states, maps=maps, train=train)
        return out.replace(hidden_BLD=self.out_dropout(out.hidden_BLD, deterministic=not train))

    def decode(
        self, batch: dict[str, jax.Array], encoded: Output | tuple, *, mask: str = "causal", cache: Any = None, states: bool = False, maps: bool = False,
        train: bool = False,
    ) -> Output:  # fmt: skip
        """Hidden states of the decoder given the encoder's, or its `memory` of them; with a cache, the batch continues the rows that the cache holds."""
        x_BLD = self.embed_dropout(self.token_embed(batch["tokens_BL"]), deterministic=not train)
        side_mask, seen = (self_mask(mask, batch), None) if cache is None else cached_mask(mask, batch, cache["seen"])
        out = self.decoder(
            x_BLD, mask=side_mask, memory_BID=encoded.hidden_BLD if isinstance(encoded, Output) else encoded, memory_mask=cross_mask(batch),
            cache=None if cache is None else cache["layers"], states=states, maps=maps, train=train,
        )  # fmt: skip
        if cache is not None:
            out = out.replace(cache={"layers": out.cache, "seen": seen})
        tops = [side.attention_max for side in (encoded, out) if isinstance(side, Output) and side.attention_max is not None]
        hidden_BLD = self.out_dropout(out.hidden_BLD, deterministic=not train)
        return out.replace(hidden_BLD=hidden_BLD, attention_max=jnp.max(jnp.stack(tops)) if tops else None)

    def memory(self, encoded: Output) -> tuple[dict[str, jax.Array], ...]:
        """What each layer of the decoder reads of the encoder's hidden states, once and for all tokens."""
        return self.decoder.memory(encoded.hidden_BLD)

    def __call__(self, batch: dict[str, jax.Array], *, mask: str = "causal", states: bool = False, maps: bool = False, train: bool = False) -> Output:
        """Hidden states of the decoder."""
        return self.decode(batch, self.encode(batch, train=train), mask=mask, states=states, maps=maps, train=train)

    def lm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        """Scaled by 1/sqrt(width) where embeddings are tied."""
        return self.token_embed.attend(hidden * self.config.width**-0.5) if self.config.tie_embeddings else self.lm_head(hidden)

    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        """A cache for decoding `length` tokens of `rows` rows."""
        c = self.config
        layers = empty_cache(c.block(cross=True), self.context, num_layers=c.decoder_layers or c.num_layers, rows=rows, length=length)
        return {"layers": layers, "seen": empty_seen(rows, length)}
