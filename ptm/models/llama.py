"""Modern decoders (Touvron et al. 2023, section 2.2, and after): rotary positions, RMS norm, gated feed-forward, grouped heads, windows.

One config reaches Llama 1 to 3, Mistral, Qwen 2 and 3, and with `parallel` and `norm` shapes like PaLM's: what ablations compare.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from ptm.fields import ConfigError, divisors, field
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import Headed
from ptm.nn.linear import Linear
from ptm.nn.masks import cached_mask, empty_seen, self_mask
from ptm.nn.mlp import ACTIVATIONS
from ptm.nn.position import RotaryConfig
from ptm.nn.shape import BlockConfig, LayerKind, block_flops
from ptm.nn.stack import Output, Stack, empty_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of a decoder of the Llama kind; the defaults are Llama 1's smallest."""

    name: ClassVar[str] = "llama"
    kind: ClassVar[str] = "decoder"
    heads: ClassVar[tuple[str, ...]] = ("lm", "classify", "tag", "qa")
    summary: ClassVar[str] = "last"  # position whose hidden state stands for a row

    vocab_size: int | None = field(None, low=1, unit="pieces", doc="Rows of the token table; None = the tokenizer's size.")
    num_layers: int = field(32, low=1, high=4096, doc="Layers.")
    width: int = field(4096, low=1, doc="Width of the residual stream.")
    num_heads: int = field(32, low=1, doc="Query heads.")
    num_kv_heads: int | None = field(None, low=1, doc="Key and value heads; divides num_heads; None = num_heads.")
    head_dim: int | None = field(None, low=2, doc="Width of a head; None = width / num_heads.")
    mlp_width: int = field(11008, low=1, doc="Width of the feed-forward.")
    max_length: int | None = field(2048, low=1, unit="tokens", doc="Longest row that the model is meant for; None = any.")
    activation: str = field("silu", choices=tuple(ACTIVATIONS), doc="Activation of the feed-forward.")
    gated: bool = field(True, doc="Gated feed-forward.")
    norm: str = field("rms", choices=("rms", "layer"), doc="Kind of norm.")
    norm_eps: float = field(1e-6, low=0.0, doc="Added to mean squares.")
    parallel: bool = field(False, doc="Attention and feed-forward side by side on one norm instead of one after the other.")
    qk_norm: bool = field(False, doc="RMS norm of each head's queries and keys (Qwen 3).")
    qkv_bias: bool = field(False, doc="Biases of queries, keys and values (Qwen 2).")
    out_bias: bool = field(False, doc="Bias of attention's output.")
    mlp_bias: bool = field(False, doc="Biases of the feed-forward.")
    norm_bias: bool = field(False, doc="Biases of layer norms.")
    rotary_theta: float = field(1e4, low=1.0, doc="Base of the wavelengths of rotary positions.")
    rotary_share: float = field(1.0, low=0.01, high=1.0, doc="Share of a head's dimensions that turn.")
    rotary_factor: float = field(1.0, low=1.0, doc="Stretches wavelengths, to reach longer contexts.")
    rotary_original_length: int | None = field(None, low=1, unit="tokens", doc="Stretch only waves that are long beside this context (Llama 3.1); None = all.")
    rotary_low: float = field(1.0, low=0.0, doc="Waves with fewer turns over the original context are stretched whole.")
    rotary_high: float = field(4.0, low=0.0, doc="Waves with more turns are not stretched.")
    window: int | None = field(None, low=1, unit="tokens", doc="A position sees itself and window - 1 positions before it; None = all before it.")
    window_from: int = field(0, low=0, unit="layers", doc="Layers before this one have no window.")
    global_every: int | None = field(None, low=1, unit="layers", doc="Every n-th layer has no window; None = all others have it.")
    tie_embeddings: bool = field(False, doc="Project on the token table instead of a head of its own.")
    dropout: float = field(0.0, low=0.0, high=1.0, doc="Dropout of embeddings and sublayers.")
    attention_dropout: float = field(0.0, low=0.0, high=1.0, doc="Dropout of attention weights.")
    init_std: float = field(0.02, low=0.0, doc="Standard deviation of initial kernels and tables.")
    residual_std: float | None = field(None, low=0.0, doc="That of kernels that write to the residual stream; None = init_std / sqrt(2 x layers).")

    def check(self, where: str) -> None:
        if self.head_dim is None and self.width % self.num_heads:
            fits = divisors(self.width)
            raise ConfigError(f"{where}.num_heads={self.num_heads} does not divide {where}.width={self.width}; head counts that fit: {fits}, or set head_dim.")
        if self.num_heads % (self.num_kv_heads or 1):
            fits = divisors(self.num_heads)
            raise ConfigError(f"{where}.num_kv_heads={self.num_kv_heads} does not divide {where}.num_heads={self.num_heads}; allowed: {fits}.")
        if self.rotary_dim() % 2:
            raise ConfigError(f"{where}: {self.rotary_dim()} turning dimensions of a head; their number must be even. Change head_dim or rotary_share.")
        if self.rotary_original_length is not None and self.rotary_low >= self.rotary_high:
            raise ConfigError(f"{where}.rotary_low={self.rotary_low} must be below {where}.rotary_high={self.rotary_high}: between them stretching fades out.")
        for key, value, unset in (("global_every", self.global_every, None), ("window_from", self.window_from, 0)):
            if value != unset and self.window is None:
                raise ConfigError(f"{where}.{key}={value} without {where}.window; set the window of the other layers.")

    def rotary_dim(self) -> int:
        """Dimensions of a head that turn."""
        return int((self.head_dim or self.width // self.num_heads) * self.rotary_share)

    def block(self) -> BlockConfig:
        residual_std = self.init_std / (2 * self.num_layers) ** 0.5 if self.residual_std is None else self.residual_std
        head_dim = self.head_dim or self.width // self.num_heads
        parts = {"qkv": self.qkv_bias, "out": self.out_bias, "mlp": self.mlp_bias, "norm": self.norm_bias}
        rotary = RotaryConfig(
            self.rotary_theta, self.rotary_dim(), self.rotary_factor, self.rotary_original_length, self.rotary_low, self.rotary_high
        )  # fmt: skip
        return BlockConfig(
            width=self.width, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=head_dim, mlp_width=self.mlp_width, prenorm=True,
            parallel=self.parallel, norm=self.norm, norm_eps=self.norm_eps, biases=tuple(part for part, biased in parts.items() if biased), activation=self.activation, gated=self.gated,
            scale=head_dim**-0.5, qk_norm=self.qk_norm, rotary=rotary, dropout=self.dropout, attention_dropout=self.attention_dropout,
            query_std=self.init_std, key_std=self.init_std, attention_out_std=residual_std, mlp_in_std=self.init_std, mlp_out_std=residual_std,
        )  # fmt: skip

    def kinds(self) -> tuple[LayerKind, ...]:
        """The window of each layer."""
        if self.window is None:
            return ()
        local, full = LayerKind(window=(self.window - 1, 0)), LayerKind()
        every = self.global_every or self.num_layers + 1
        return tuple(full if n < self.window_from or (n + 1) % every == 0 else local for n in range(self.num_layers))

    def forward_flops(self, lengths: dict[str, int], positions: int) -> float:
        """FLOPs of one row's forward pass, with vocabulary logits at `positions` positions; windows are not discounted."""
        length = lengths["L"]
        return self.num_layers * block_flops(self.block(), length=length, keys=length) + 2 * positions * self.width * self.vocab_size


_LLAMA3 = {"rotary_theta": 5e5, "norm_eps": 1e-5, "num_kv_heads": 8, "rotary_original_length": 8192, "max_length": 131072}
# Touvron et al. 2023 (1 and 2), Dubey et al. 2024 (3), Jiang et al. 2023 (Mistral), Yang et al. 2024 and 2025 (Qwen 2.5 and 3), as released.
SIZES: dict[str, dict[str, Any]] = {
    "7b": {},
    "2_7b": {"max_length": 4096, "norm_eps": 1e-5},
    "3.1_8b": {"mlp_width": 14336, "rotary_factor": 8.0, **_LLAMA3},
    "3.2_1b": {"num_layers": 16, "width": 2048, "mlp_width": 8192, "rotary_factor": 32.0, "tie_embeddings": True, **_LLAMA3},
    "mistral_7b": {"mlp_width": 14336, "num_kv_heads": 8, "norm_eps": 1e-5, "window": 4096, "max_length": 32768},
    "qwen2.5_0.5b": {
        "num_layers": 24, "width": 896, "num_heads": 14, "num_kv_heads": 2, "mlp_width": 4864, "rotary_theta": 1e6, "qkv_bias": True,
        "tie_embeddings": True, "max_length": 32768,
    },
    "qwen3_0.6b": {
        "num_layers": 28, "width": 1024, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "mlp_width": 3072, "rotary_theta": 1e6,
        "qk_norm": True, "tie_embeddings": True, "max_length": 40960,
    },
    "qwen3_8b": {
        "num_layers": 36, "num_kv_heads": 8, "head_dim": 128, "mlp_width": 12288, "rotary_theta": 1e6, "qk_norm": True, "max_length": 40960,
    },
}  # fmt: skip


class Llama(Headed):
    """tokens_BL -> hidden_BLD; head `lm`: logits_BLV."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.token_embed = Embed(self.context, c.vocab_size, c.width, c.init_std)
        self.decoder = Stack(c.block(), self.context, c.num_layers, kinds=c.kinds())
        self.embed_dropout = Dropout(c.dropout)
        if "lm" in self.heads and not c.tie_embeddings:
            self.lm_head = Linear(self.context, (c.width,), (c.vocab_size,), c.init_std, use_bias=False, dtype=self.context.logits)
        self.make_heads(width=c.width, std=c.init_std, dropout=c.dropout, activation=None, use_bias=False)

    def __call__(
        self, batch: dict[str, jax.Array], *, mask: str = "causal", cache: Any = None, states: bool = False, maps: bool = False, train: bool = False
    ) -> Output:
        """Hidden states of a batch; with a cache, the batch continues the rows that the cache holds."""
        x_BLD = self.embed_dropout(self.token_embed(batch["tokens_BL"]), deterministic=not train)
        positions_BL = batch["positions_BL"]
        if cache is None:
            return self.decoder(x_BLD, mask=self_mask(mask, batch), positions_BL=positions_BL, states=states, maps=maps, train=train)
        decode_mask, seen = cached_mask(mask, batch, cache["seen"])
        out = self.decoder(x_BLD, mask=decode_mask, positions_BL=positions_BL, cache=cache["layers"], states=states, maps=maps, train=train)
        return out.replace(cache={"layers": out.cache, "seen": seen})

    def lm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.token_embed.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)

    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        """A cache for decoding `length` tokens of `rows` rows."""
        layers = empty_cache(self.config.block(), self.context, num_layers=self.config.num_layers, rows=rows, length=length)
        return {"layers": layers, "seen": empty_seen(rows, length)}
