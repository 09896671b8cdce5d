"""ELECTRA (Clark et al. 2020): a small generator proposes replacements of tokens, the discriminator tells them from the original ones."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.fields import ConfigError, field
from ptm.models.bert import BertConfig
from ptm.nn.context import Context
from ptm.nn.dropout import Dropout
from ptm.nn.embed import Embed
from ptm.nn.heads import ClassifyHead, Headed, MLMHead, head_names
from ptm.nn.linear import Linear
from ptm.nn.masks import self_mask
from ptm.nn.norm import Norm
from ptm.nn.shape import BlockConfig, block_flops
from ptm.nn.stack import Output, Stack

EMBEDDINGS = ("token_embed", "position_embed", "type_embed", "embed_norm")
# What generator and discriminator have in common -> parts of the generator's embeddings that are the discriminator's.
TIED: dict[str, tuple[str, ...]] = {"none": (), "tokens": ("token_embed",), "embeddings": EMBEDDINGS, "all": EMBEDDINGS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """Shape of an ELECTRA model: the discriminator's is BERT's, the generator's a fraction of it."""

    name: ClassVar[str] = "electra"
    heads: ClassVar[tuple[str, ...]] = ("mlm", "rtd", "restore", "classify", "tag", "qa")

    embed_width: int | None = field(None, low=1, doc="Width of the embeddings; where an encoder has another, a dense map leads to it. None = width.")
    generator_fraction: float = field(
        0.25, low=0.0, high=1.0, doc="Width, heads and feed-forward of the generator by those of the discriminator (section 3.2)."
    )
    tie_embeddings: str = field(
        "embeddings", choices=tuple(TIED),
        doc="What generator and discriminator share: embeddings = tables and their norm, as published; all = the encoder too (generator_fraction=1).",
    )  # fmt: skip

    def check(self, where: str) -> None:
        super().check(where)
        width, heads = self.generator_shape()[:2]
        if width < 1 or width % heads:
            parts = [n for n in range(1, 17) if round(self.width / n) % max(1, round(self.num_heads / n)) == 0 and round(self.width / n)]
            fits = ", ".join(f"1/{n}" if n > 1 else "1" for n in parts)
            raise ConfigError(
                f"{where}.generator_fraction={self.generator_fraction:g} gives the generator a width of {width} and {heads} heads, which must divide it; "
                f"fractions that fit: {fits}."
            )
        if self.tie_embeddings == "all" and self.generator_fraction != 1:
            raise ConfigError(
                f"{where}.tie_embeddings=all shares the encoder too, so that the generator must be as large as the discriminator, yet "
                f"{where}.generator_fraction={self.generator_fraction:g}; set it to 1, or {where}.tie_embeddings=embeddings."
            )

    def generator_shape(self) -> tuple[int, int, int]:
        """(width, heads, width of the feed-forward) of the generator, rounded; one head at least."""
        sizes = (self.width, self.num_heads, self.mlp_width or 4 * self.width)
        width, heads, mlp_width = (round(size * self.generator_fraction) for size in sizes)
        return width, max(1, heads), mlp_width

    def generator_block(self) -> BlockConfig:
        """The shape of the generator's layers."""
        width, heads, mlp_width = self.generator_shape()
        return dataclasses.replace(self.block(), width=width, num_heads=heads, head_dim=width // heads, mlp_width=mlp_width, scale=(width // heads) ** -0.5)

    def forward_flops(self, lengths: dict[str, int], positions: int, heads: tuple[str, ...] = ("mlm", "rtd")) -> float:
        """FLOPs of one row's forward pass through what these heads need; `mlm` and `restore` have logits at `positions` positions.

        `restore` beside `rtd`, which then is its copy mechanism, has them everywhere.
        """
        length, embed_width = lengths["L"], self.embed_width or self.width
        total = 0.0
        for block in [self.generator_block()] * ("mlm" in heads) + [self.block()] * (heads != ("mlm",)):
            projection = 2 * length * embed_width * block.width if block.width != embed_width else 0
            total += projection + self.num_layers * block_flops(block, length=length, keys=length)
        for head, width in (("mlm", self.generator_shape()[0]), ("restore", self.width)):
            predicted = length if head == "restore" and "rtd" in heads else positions
            total += 2 * predicted * embed_width * (width + self.vocab_size) if head in heads else 0
        return total + (2 * length * self.width * (self.width + 1) if "rtd" in heads else 0)


# Clark et al. 2020, table 6.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"num_layers": 12, "width": 256, "num_heads": 4, "embed_width": 128, "generator_fraction": 1 / 4},
    "base": {"num_layers": 12, "width": 768, "num_heads": 12, "generator_fraction": 1 / 3},
    "large": {"num_layers": 24, "width": 1024, "num_heads": 16, "generator_fraction": 1 / 4},
}


def _make_embeddings(config: Config, context: Context) -> dict[str, nn.Module]:
    width = config.embed_width or config.width
    sizes = {"token_embed": config.vocab_size, "position_embed": config.max_length, "type_embed": config.num_types}
    return {**{name: Embed(context, size, width, config.init_std) for name, size in sizes.items()}, "embed_norm": Norm("layer", config.norm_eps)}


class Part(nn.Module):
    """An encoder with the map from the embeddings to its width, and embeddings as far as it has its `own`; others are given to it."""

    config: Config
    context: Context
    block: BlockConfig
    own: tuple[str, ...]

    def setup(self) -> None:
        c, embed_width = self.config, self.config.embed_width or self.config.width
        for name, module in _make_embeddings(c, self.context).items():
            if name in self.own:
                setattr(self, name, module)
        self.embed_dropout = Dropout(c.dropout)
        if embed_width != self.block.width:
            self.embed_projection = Linear(self.context, (embed_width,), (self.block.width,), c.init_std)
        self.encoder = Stack(self.block, self.context, c.num_layers)

    def embeddings(self, shared: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Tables and norm by name: its own ones, and of others those that are shared."""
        return {name: getattr(self, name) if name in self.own else shared[name] for name in EMBEDDINGS}

    def __call__(self, batch: dict[str, jax.Array], shared: dict[str, nn.Module], *, mask: str, states: bool, maps: bool, train: bool) -> Output:
        tokens_BL = batch["tokens_BL"]
        types_BL = batch["types_BL"] if "types_BL" in batch else jnp.zeros_like(tokens_BL)
        embed = self.embeddings(shared)
        x_BLD = embed["token_embed"](tokens_BL) + embed["position_embed"](batch["positions_BL"]) + embed["type_embed"](types_BL)
        x_BLD = self.embed_dropout(embed["embed_norm"](x_BLD), deterministic=not train)
        if x_BLD.shape[-1] != self.block.width:
            x_BLD = self.context.layout.constrain(self.embed_projection(x_BLD), "batch", "residual_length", "residual")
        return self.encoder(x_BLD, mask=self_mask(mask, batch), states=states, maps=maps, train=train)


class Electra(Headed):
    """tokens_BL (and types_BL) -> hidden_BLD of the generator or of the discriminator.

    Embeddings at the top of the tree are the discriminator's, and the generator's as far as they are tied. Where a parameter lies follows
    from the config alone; the heads only say which parts there are: `mlm` needs the generator, all others need the discriminator.
    """

    config: Config

    def setup(self) -> None:
        c = self.config
        embed_width, tied = c.embed_width or c.width, TIED[c.tie_embeddings]

        def mlm_head(width: int) -> MLMHead:
            return MLMHead(self.context, width, embed_width, c.vocab_size, c.activation, "layer", c.norm_eps, c.init_std)

        # What is never called has no parameters.
        for name, module in _make_embeddings(c, self.context).items():
            setattr(self, name, module)
        self.discriminator = Part(c, self.context, c.block(), ())
        self.generator = Part(c, self.context, c.generator_block(), tuple(name for name in EMBEDDINGS if name not in tied))
        self.mlm_head = mlm_head(c.generator_shape()[0])
        self.restore_head = mlm_head(c.width)
        self.rtd_head = ClassifyHead(self.context, c.width, 1, c.init_std, c.activation)
        self.make_heads(width=c.width, std=c.init_std, dropout=c.dropout, activation="gelu")

    def __call__(
        self, batch: dict[str, jax.Array], *, mask: str = "full", part: str | None = None, states: bool = False, maps: bool = False, train: bool = False
    ) -> Output:
        """Hidden states of a batch from the `generator` or the `discriminator`; by default from the latter, unless `mlm` is the only head.

        A batch without types_BL is all of type 0.
        """
        part = part or ("generator" if self.heads == ("mlm",) else "discriminator")
        encoder = self.generator if part == "generator" and self.config.tie_embeddings != "all" else self.discriminator
        return encoder(batch, self._embeddings(), mask=mask, states=states, maps=maps, train=train)

    def _embeddings(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in EMBEDDINGS}

    def mlm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        """Logits [..., V] of the generator's hidden states."""
        return self.mlm_head(hidden, self.generator.embeddings(self._embeddings())["token_embed"])

    def restore_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        """Logits [..., V] of the discriminator's hidden states: which token stood there before (section 3.4)."""
        return self.restore_head(hidden, self.token_embed)

    def rtd_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        """The logit [...] that a token was replaced."""
        return self.rtd_head(hidden, train=train)[..., 0]

    def part_for(self, head: str) -> dict[str, str]:
        return {"part": "generator" if head == "mlm" else "discriminator"}

    def forward_flops(self, lengths: dict[str, int], positions: int, heads: tuple[str, ...]) -> float:
        return self.config.forward_flops(lengths, positions, heads)

    def touch(self, batch: dict[str, jax.Array]) -> None:
        """Runs every part once, so that `init` makes all parameters."""
        if "mlm" in self.heads:
            self.logits(self(batch, part="generator").hidden_BLD[:, :1], "mlm")
        if self.heads != ("mlm",):
            self.touch_heads(self(batch, part="discriminator", states="layer_mix" in head_names(self.heads)), batch, besides=("mlm",))
