"""Encoder-decoders made of pretrained models (Rothe et al. 2020): an encoder of BERT's or RoBERTa's shape, a decoder of theirs or GPT's with new cross-attention.

Parameters lie below `encoder` and `decoder` as they lie in the model that the side is made of, so that its checkpoints fit; each side has its own
embeddings, as in the reference library (the paper's BERT2BERT shares the table). A BERT that decodes predicts with its MLM head.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ptm.fields import ConfigError, field, sections
from ptm.models import bert, gpt
from ptm.nn.heads import Headed
from ptm.nn.masks import cross_mask, empty_seen
from ptm.nn.shape import block_flops
from ptm.nn.stack import Output, empty_cache

GIVE_PARTS = "give encoder and decoder in the recipe: encoder_decoder.Config(parts={'encoder': bert.BertConfig(), 'decoder': bert.BertConfig()})."
ENCODERS, DECODERS = (bert.BertConfig,), (bert.BertConfig, gpt.Config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The two sides, by the Config of the model that each is made of."""

    name: ClassVar[str] = "encoder_decoder"
    kind: ClassVar[str] = "encoder_decoder"
    heads: ClassVar[tuple[str, ...]] = ("lm",)

    parts: dict[str, Any] = sections("model", doc="The sides: `encoder` (bert, roberta) and `decoder` (bert, roberta, gpt).")
    vocab_size: int | None = field(None, low=1, unit="pieces", doc="Rows of both token tables; None = the tokenizer's size.")
    share: bool = field(False, doc="One set of parameters for both sides, but for cross-attention (BERTSHARE); the sides must be equal.")

    def __hash__(self) -> int:
        return hash((*self.parts.items(), self.vocab_size, self.share))

    def check(self, where: str) -> None:
        if not self.parts:
            return  # no model, as `max_length` says, but the defaults of the others may be looked at
        if set(self.parts) != {"encoder", "decoder"}:
            raise ConfigError(f"{where}.parts has {', '.join(self.parts)}; {GIVE_PARTS}")
        for side, allowed in (("encoder", ENCODERS), ("decoder", DECODERS)):
            part = self.parts[side]
            if not isinstance(part, allowed):
                known = ", ".join(dict.fromkeys(cls.name for cls in (*allowed, bert.RobertaConfig)))
                raise ConfigError(f"{where}.parts.{side} is a {part.name}; allowed: {known}.")
            if part.vocab_size is not None:
                raise ConfigError(f"{where}.parts.{side}.vocab_size={part.vocab_size}; both sides have {where}.vocab_size pieces: leave it None.")
        encoder, decoder = self.parts["encoder"], self.parts["decoder"]
        if encoder.width != decoder.width:
            given = f"{where}.parts.encoder.width={encoder.width} and {where}.parts.decoder.width={decoder.width}"
            raise ConfigError(f"{given}; they must be equal: the decoder attends to the encoder's hidden states.")
        if self.share and encoder != decoder:
            raise ConfigError(f"{where}.share=true needs two equal sides; make {where}.parts.encoder and {where}.parts.decoder the same, or set it to false.")

    def side(self, name: str) -> Any:
        """The config of a side with the size of the vocabulary."""
        return dataclasses.replace(self.parts[name], vocab_size=self.vocab_size)

    @property
    def position_offset(self) -> int:
        """Rows of the encoder's position table before the first position."""
        return self.parts["encoder"].position_offset

    @property
    def max_length(self) -> int:
        """The longest row that both sides have positions for. Raises ConfigError where there are no sides."""
        if not self.parts:
            raise ConfigError(f"model.parts has nothing; {GIVE_PARTS}")
        return min(part.max_length for part in self.parts.values())

    def forward_flops(self, lengths: dict[str, int], positions: int) -> float:
        """FLOPs of one row's forward pass, with vocabulary logits at `positions` positions of the decoder."""
        decoder = self.side("decoder")
        sizes = {"length": lengths["L"], "keys": lengths["L"], "memory": lengths["I"]}
        cross = block_flops(dataclasses.replace(decoder.block(), cross=True), **sizes) - block_flops(decoder.block(), **sizes)
        sides = self.side("encoder").forward_flops({"L": lengths["I"]}, 0) + decoder.forward_flops({"L": lengths["L"]}, positions)
        return sides + decoder.num_layers * cross


def _sides(encoder: Any, decoder: Any, **options: Any) -> dict[str, Any]:
    return {"parts": {"encoder": encoder, "decoder": decoder}, **options}


_BERT, _ROBERTA = bert.BertConfig(**bert.SIZES["base"]), bert.RobertaConfig(**bert.ROBERTA_SIZES["base"])
_GPT = gpt.Config(**gpt.SIZES["small"])
# Rothe et al. 2020, section 3; all of base size.
SIZES: dict[str, dict[str, Any]] = {
    "bert2bert": _sides(_BERT, _BERT),
    "bertshare": _sides(_BERT, _BERT, share=True),
    "bert2gpt": _sides(_BERT, _GPT),
    "roberta2roberta": _sides(_ROBERTA, _ROBERTA),
    "robertashare": _sides(_ROBERTA, _ROBERTA, share=True),
    "roberta2gpt": _sides(_ROBERTA, _GPT),
}


def positions_of(segments_BL: jax.Array) -> jax.Array:
    """Positions of packed rows, which begin anew with each segment."""
    index_L = jnp.arange(segments_BL.shape[1])
    begins_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1]) != 0
    return index_L - jax.lax.cummax(jnp.where(begins_BL, index_L, 0), axis=1)


class EncoderDecoder(Headed):
    """inputs_BI, tokens_BL -> hidden_BLD of the decoder; head `lm`: logits_BLV."""

    config: Config

    def setup(self) -> None:
        encoder, decoder = self.config.side("encoder"), self.config.side("decoder")
        predicts = "lm" in self.heads
        if isinstance(decoder, gpt.Config):
            self.decoder = gpt.GPT(("lm",) * predicts, self.context, decoder, cross=True)
        else:
            self.decoder = bert.Bert(("mlm",) * predicts, self.context, decoder, cross=True)
        if not self.config.share:
            self.encoder = bert.Bert((), self.context, encoder)
        self.make_common_heads(width=decoder.width, std=decoder.init_std)

    def encode(self, batch: dict[str, jax.Array], *, states: bool = False, maps: bool = False, train: bool = False) -> Output:
        """Hidden states of the encoder, hidden_BLD with L = I."""
        segments_BI = batch["input_segments_BI"]
        inputs = {"tokens_BL": batch["inputs_BI"], "segments_BL": segments_BI, "positions_BL": positions_of(segments_BI)}
        encoder = self.decoder if self.config.share else self.encoder
        return encoder(inputs, mask="full", states=states, maps=maps, train=train)

    def decode(
        self, batch: dict[str, jax.Array], encoded: Output | tuple, *, mask: str = "causal", cache: Any = None, states: bool = False, maps: bool = False,
        train: bool = False,
    ) -> Output:  # fmt: skip
        """Hidden states of the decoder given the encoder's, or its `memory` of them; with a cache, the batch continues the rows that the cache holds."""
        whole = isinstance(encoded, Output)
        out = self.decoder(
            batch, mask=mask, memory_BID=encoded.hidden_BLD if whole else encoded, memory_mask=cross_mask(batch), cache=cache, states=states, maps=maps,
            train=train,
        )  # fmt: skip
        tops = [side.attention_max for side in (encoded, out) if isinstance(side, Output) and side.attention_max is not None]
        return out.replace(attention_max=jnp.max(jnp.stack(tops)) if tops else None)

    def memory(self, encoded: Output) -> tuple[dict[str, jax.Array], ...]:
        """What each layer of the decoder reads of the encoder's hidden states, once and for all tokens."""
        return self.decoder.memory(encoded)

    def __call__(self, batch: dict[str, jax.Array], *, mask: str = "causal", states: bool = False, maps: bool = False, train: bool = False) -> Output:
        """Hidden states of the decoder."""
        return self.decode(batch, self.encode(batch, train=train), mask=mask, states=states, maps=maps, train=train)

    def lm_logits(self, hidden: jax.Array, train: bool) -> jax.Array:
        return self.decoder.lm_logits(hidden, train) if isinstance(self.decoder, gpt.GPT) else self.decoder.mlm_logits(hidden, train)

    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        """A cache for decoding `length` tokens of `rows` rows."""
        decoder = self.config.side("decoder")
        return {"layers": empty_cache(decoder.block(), self.context, num_layers=decoder.num_layers, rows=rows, length=length), "seen": empty_seen(rows, length)}
