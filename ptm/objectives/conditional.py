"""What objectives share that give a model one text and ask for another: inputs and targets of an encoder-decoder, or one row under the prefix mask."""

import abc
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.objectives.tokens import TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPairConfig:
    """Options that all of them have, and the lengths that follow."""

    input_length: int = field(512, low=4, unit="tokens", doc="Length of the encoder's row; a decoder has none.")
    z_loss: float = field(0.0, low=0.0, doc="Coefficient of the squared log-normaliser.")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row: decoder L, encoder I (only where there is an encoder beside the decoder)."""
        return {"L": length, "I": self.input_length}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionalConfig(TextPairConfig):
    """Options of those that make input and target of one piece of text, and how long that may be."""

    visits: int | None = field(None, low=1, unit="epochs", doc="Different corruptions of a document; None = fresh each epoch.")

    def example_lengths(self, num_tokens: int) -> tuple[int, int]:
        """Largest lengths of (input, target) that a piece of `num_tokens` gives, with one end token each."""
        raise NotImplementedError

    def total_length(self, num_tokens: int) -> int:
        """Largest length of input and target together."""
        return sum(self.example_lengths(num_tokens))

    def raw_length(self, length: int, *, paired: bool = True, extra: int = 0) -> int:
        """The longest piece of text whose input fits the encoder's row and whose target the decoder's or, not `paired`, that fit one row together.

        `extra` tokens stand before an input (or are missing, where negative). Raises ConfigError where nothing fits.
        """

        def fits(num_tokens: int) -> bool:
            if not paired:
                return self.total_length(num_tokens) + extra - 1 <= length  # the last token is read by no one
            inputs, targets = self.example_lengths(num_tokens)
            return inputs + extra <= self.input_length and targets <= length

        sizes = list(itertools.takewhile(fits, range(2, self.input_length * paired + length + 2)))
        if not sizes:
            rows = f"objective.input_length={self.input_length} and data.length={length}" if paired else f"data.length={length}"
            raise ConfigError(f"no text fits {rows}; make {'them' if paired else 'it'} longer.")
        return sizes[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneRowConfig(TextPairConfig):
    """Options of those that also train a decoder (or an encoder) on input and target in one row (Raffel et al. 2020, section 3.2.1)."""

    mask: str = field("prefix", choices=("prefix", "causal"), doc="Attention within one row: the input sees itself whole, or only what came before.")
    counted: str = field("target", choices=("target", "all"), doc="What is predicted of one row: the target, or the input too (causal mask only).")

    def check(self, where: str) -> None:
        if self.counted == "all" and self.mask == "prefix":
            raise ConfigError(f"{where}.counted=all with {where}.mask=prefix would predict tokens that are seen; set --config.{where}.mask=causal.")


class TextPair(TokenObjective):
    """An input and its target: a row of the encoder and one of the decoder, or one row, the input first.

    An encoder-decoder's texts end with eos, and its decoder begins with the padding token (Raffel et al. 2020, published code); where a vocabulary has no eos,
    as BERT's, they end with sep and the decoder begins with cls (Rothe et al. 2020, section 3).
    """

    def __init__(
        self,
        config: TextPairConfig,
        *,
        tokenizer: Any,
        length: int,
        packing: str,
        model_config: Any,
        before: tuple[int, ...] = (),
        between: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        mask: str = "causal",
        counted: str = "target",
        smoothing: float = 0.0,
    ) -> None:
        """`before` stands before every input; in one row `between` stands behind it and `after` behind the target, in two `end_id` behind each."""
        if packing in ("window", "concat"):
            raise ConfigError(f"data.packing={packing} does not keep inputs beside their targets; allowed with {config.name}: default, first_fit, none.")
        super().__init__(z_loss=config.z_loss, token_bytes=tokenizer.token_bytes, smoothing=smoothing)
        self.config, self.tokenizer = config, tokenizer
        self.packing = "first_fit" if packing == "default" else packing
        self.paired = model_config.kind == "encoder_decoder"
        self.mask = "causal" if self.paired else mask
        self.heads = ("mlm",) if model_config.kind == "encoder" else ("lm",)
        self.target_positions = length
        named = tokenizer.eos_id is not None
        self.start_id, self.end_id = (tokenizer.pad_id, tokenizer.eos_id) if named else (tokenizer.cls_id, tokenizer.sep_id)
        if self.paired and None in (tokenizer.pad_id, self.start_id, self.end_id):
            raise ConfigError(
                f"objective {config.name} needs a tokenizer with pad and eos, or pad, cls and sep; this one has pad={tokenizer.pad_id}, "
                f"eos={tokenizer.eos_id}, cls={tokenizer.cls_id}, sep={tokenizer.sep_id}."
            )
        self._before, self._input_end, self._target_end = before, between, after
        if self.paired:
            self._input_end = self._target_end = (self.end_id,)
        self._counts_input = counted == "all"
        self.lengths = {dim: size for dim, size in config.lengths(length).items() if dim != "I" or self.paired}
        tokens = Field(is_tokens=True, pad=tokenizer.pad_id) if self.paired else Field(is_tokens=True)
        self.fields = {"inputs_BI": tokens} if self.paired else {}
        self.fields |= {"tokens_BL": tokens, "targets_BL": tokens, "weights_BL": Field(np.float32, 0.0)}
        if self.mask == "prefix":
            self.fields["prefix_BL"] = Field()

    def example(self, inputs: np.ndarray, targets: np.ndarray) -> Example:
        """The example of an input and a target, with what stands before and behind them."""
        inputs = np.concatenate([self._before, inputs, self._input_end]).astype(np.int32)
        targets = np.concatenate([targets, self._target_end]).astype(np.int32)
        return self._two_rows(inputs, targets) if self.paired else self._one_row(inputs, targets)

    def _two_rows(self, inputs: np.ndarray, targets: np.ndarray) -> Example:
        return {
            "inputs_BI": inputs,
            "tokens_BL": np.concatenate([[self.start_id], targets[:-1]]).astype(np.int32),
            "targets_BL": targets,
            "weights_BL": np.ones(len(targets), np.float32),
        }

    def _one_row(self, inputs: np.ndarray, targets: np.ndarray) -> Example:
        whole = np.concatenate([inputs, targets])
        place = np.arange(len(whole) - 1)
        # The input's last token predicts the target's first one; no token of the prefix sees beyond the prefix.
        counted = np.ones(len(place), bool) if self._counts_input else place >= len(inputs) - 1
        example = {"tokens_BL": whole[:-1], "targets_BL": whole[1:], "weights_BL": counted.astype(np.float32)}
        return {**example, "prefix_BL": (place < len(inputs)).astype(np.int32)} if "prefix_BL" in self.fields else example


class Conditional(TextPair, abc.ABC):
    """Input and target made of one piece of text."""

    def __init__(
        self,
        config: ConditionalConfig,
        *,
        tokenizer: Any,
        length: int,
        model_config: Any,
        before: tuple[int, ...] = (),
        separated: bool = True,
        ended: bool = True,
        **options: Any,
    ) -> None:
        """In one row an eos stands between input and target if they are `separated`, behind the target if `ended`; other options as in TextPair."""
        end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        between, after = (end if wanted else () for wanted in (separated, ended))
        super().__init__(config, tokenizer=tokenizer, length=length, model_config=model_config, before=before, between=between, after=after, **options)
        self.visits = config.visits
        extra = len(self._before) + len(self._input_end) + len(self._target_end) - 2
        self.raw_length = config.raw_length(length, paired=self.paired, extra=extra)

    @abc.abstractmethod
    def pair(self, tokens_L: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(input, target) of a piece of two tokens or more, without what stands before and behind them."""

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        if len(doc.tokens_L) < 2:
            return
        yield self.example(*self.pair(doc.tokens_L, rng))
