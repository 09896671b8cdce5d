"""Text to text: translation, summarization, and any task put into words (Sutskever et al. 2014; Raffel et al. 2020, section 2.4), answered by generating."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.generate.options import Options
from ptm.generate.search import generate
from ptm.generate.text import Frame as PromptFrame
from ptm.metrics import metric_of
from ptm.models import Model
from ptm.nn.stack import Output
from ptm.objectives.conditional import OneRowConfig, TextPair
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.rows import Frame

TARGET = "target"  # the column with the text that is asked for
LISTED = ("squad", "cmrc")  # metrics whose reference is a list of right answers
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OneRowConfig):
    """Options of text to text. A record's text is the input, its field `target` what is asked for: data.columns=text=A,target=B.

    Targets are cut to data.length of an encoder-decoder; of a decoder, input and target share a row of that length, and an answer has half of it.
    """

    name: ClassVar[str] = "seq2seq"

    input_length: int = field(
        512, low=4, unit="tokens", doc="Longest input with prefix and special tokens: an encoder's row, or what leaves a decoder's row to the answer."
    )  # fmt: skip
    mask: str = field("causal", choices=("prefix", "causal"), doc="Attention in a decoder's row: the input sees itself whole, or only what came before.")
    prefix: str = field("", doc='Text before every input ("translate English to German: "), tokenized by itself; a template of data.columns is not.')
    truncate: bool = field(True, doc="Cut what is too long at its end, and tell the share; else such a record is an error.")
    label_smoothing: float = field(
        0.0, low=0.0, high=1.0, doc="Share of the target that is spread over all pieces (Vaswani et al. 2017: 0.1); the term `tokens` stays the likelihood."
    )  # fmt: skip
    max_new_tokens: int | None = field(None, low=1, unit="tokens", doc="Longest answer; None = data.length of an encoder-decoder, half of it of a decoder.")
    beams: int = field(1, low=1, doc="Answers that are followed at once while one is looked for; 1 = the likeliest token each time.")
    length_penalty: float = field(1.0, doc="With beams: scores are log-probabilities divided by length to this power (0.6 in Vaswani et al. 2017).")
    metrics: tuple[str, ...] = field(("bleu",), doc="Entries of ptm.metrics.METRICS that answers are measured by: bleu, chrf, rouge, accuracy, squad, ...")

    def check(self, where: str) -> None:
        super().check(where)
        for metric in self.metrics:
            metric_of(metric)

    def new_tokens(self, length: int, *, paired: bool) -> int:
        """Tokens of the longest answer. Raises ConfigError where it leaves a decoder's input no room, or is longer than any target was in training."""
        longest = length if paired else length - 4
        new = self.max_new_tokens or (length if paired else length // 2)
        if new > longest:
            room = "targets" if paired else "input and answer together"
            raise ConfigError(f"objective.max_new_tokens={new} does not fit data.length={length}, which is for {room}; allowed: 1 to {longest}.")
        return new

    def raw_length(self, length: int, *, paired: bool = True) -> None:
        """Documents are whole; refuses lengths that leave no room for one."""
        self.new_tokens(length, paired=paired)


class Seq2Seq(TextPair):
    """prefix input eos -> target eos of an encoder-decoder; in a decoder's row bos prefix input sep target eos, learned from the target on.

    sep is eos where the tokenizer has none, and an encoder-decoder made of two models reads cls before its input. What is cut to fit does not
    depend on the target, so that a decoder's question is the same with and without it.
    """

    kinds = ("encoder_decoder", "decoder")
    columns = (TARGET,)
    raw_length = max_segments = visits = None
    config: Config

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if one_row := model_config.kind == "decoder":
            frame = Frame.of(tokenizer, model_config, objective=config.name)
            around = {"before": frame.before, "between": frame.between, "after": frame.after}
        else:
            # An encoder that was pretrained by itself has learned to read cls first.
            around = {"before": (tokenizer.cls_id,) if hasattr(model_config, "parts") and tokenizer.cls_id is not None else ()}
        super().__init__(
            config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config, mask=config.mask, counted=config.counted,
            smoothing=config.label_smoothing, **around,
        )  # fmt: skip
        if one_row:
            self.fields["prefix_BL"] = Field()  # whatever the mask: tells the question from its answer
        self.fields["truncated_BL"] = Field()
        self.metrics = config.metrics
        self.new_tokens = config.new_tokens(length, paired=self.paired)
        self._prefix = np.asarray(tokenizer.encode(config.prefix) if config.prefix else [], np.int32)
        longest = config.input_length if self.paired else min(config.input_length, length - self.new_tokens)
        self._room = longest - len(self._before) - len(self._prefix) - len(self._input_end)
        if self._room < 1:
            raise ConfigError(
                f"inputs have {longest} tokens (objective.input_length{'' if self.paired else ', data.length less objective.max_new_tokens'}), which "
                f"the prefix of {len(self._prefix)} and special tokens fill; make them longer or objective.prefix shorter."
            )
        self._cut_told = False

    # Host.

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        inputs_L = np.concatenate([self._prefix, doc.tokens_L[: self._room]])
        cut = self._cut(doc, "input", len(doc.tokens_L), self._room)
        target = self._target(doc)
        if target is None:
            example = self._asked(inputs_L)
        else:
            targets_L = self.tokenizer.encode(target)
            taken = 0 if self.paired else len(self._before) + len(inputs_L) + len(self._input_end) - 1  # the last token is read by no one
            room = self.lengths["L"] - taken - len(self._target_end)
            cut |= self._cut(doc, "target", len(targets_L), room)
            if len(targets_L) > room:
                targets_L = targets_L[:room]
            example = self.example(inputs_L, targets_L)
        example["truncated_BL"] = np.zeros(len(example["tokens_BL"]), np.int32)
        example["truncated_BL"][0] = cut
        yield example

    def _asked(self, inputs_L: np.ndarray) -> Example:
        """The example of an input whose target is not known."""
        example = self.example(inputs_L, np.zeros(0 if self.paired else 1, np.int32))
        if not self.paired:  # no more than the question
            size = int(example["prefix_BL"].sum())
            example = {name: values[:size] for name, values in example.items()}
        return {**example, "weights_BL": np.zeros_like(example["weights_BL"])}

    def _cut(self, doc: Document, what: str, size: int, room: int) -> bool:
        if size <= room:
            return False
        if not self.config.truncate:
            raise ConfigError(
                f"the {what} of record {doc.id} has {size} tokens, and {room} fit: raise data.length{'' if what == 'target' else ' or objective.input_length'} "
                "or set --config.objective.truncate=true."
            )
        if not self._cut_told:
            _log.warning("texts that are too long are cut at their end: the %s of %s has %d tokens, %d fit; see truncated_share.", what, doc.id, size, room)
            self._cut_told = True
        return True

    def _target(self, doc: Document) -> str | None:
        references = self._references(doc)
        return None if references is None else references[0]

    def _references(self, doc: Document) -> list[str] | None:
        given = doc.columns[TARGET] if TARGET in doc.columns else None
        if given is None or isinstance(given, str):
            return None if given is None else [given]
        if isinstance(given, list | tuple) and given and all(isinstance(text, str) for text in given):
            return list(given)
        if isinstance(given, int | float):
            return [str(given)]
        raise ConfigError(f"the target of record {doc.id} is {str(given)[:60]!r}; allowed: a text, or a list of texts that are all right. See data.columns.")

    def finish(self, row: Example) -> Example:
        """truncated_BL becomes truncated_B, the number of a row's examples that were cut."""
        kept = {name: values for name, values in row.items() if name != "truncated_BL"}
        return {**kept, "truncated_B": np.float32(row["truncated_BL"].sum())}

    def answer(self, doc: Document, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The text generated for a record, the log-probability of its tokens divided by length ** length_penalty, and whether the input was cut."""
        tokens_T = np.asarray(outputs[0]["tokens"])
        ends = np.flatnonzero(tokens_T == self.end_id)
        text = self.tokenizer.decode(tokens_T[: ends[0]] if len(ends) else tokens_T)
        return {"prediction": text, "score": float(outputs[0]["score"]), "truncated": len(doc.tokens_L) > self._room}

    def reference(self, doc: Document) -> str | list[str] | None:
        """The text that is asked for; the list of all that are right where there are several, or where the metrics want a list."""
        references = self._references(doc)
        listed = any(metric.partition(":")[0] in LISTED for metric in self.metrics)
        return references[0] if references is not None and len(references) == 1 and not listed else references

    # Devices.

    def token_terms(self, model: Model, params: Any, batch: Batch, out: Output) -> tuple[dict[str, jax.Array], Aux]:
        totals, aux = super().token_terms(model, params, batch, out)
        examples = jnp.sum(jnp.max(batch["segments_BL"], axis=1)).astype(jnp.float32)
        return totals, aux.replace(ratios={**aux.ratios, "truncated_share": (jnp.sum(batch["truncated_B"]), examples)})

    @property
    def frame(self) -> PromptFrame:
        """What stands around an input where text is generated freely (ptm.generate.text)."""
        before = tuple(int(piece) for piece in (*self._before, *self._prefix))
        return PromptFrame(before, tuple(self._input_end), mask=self.mask, start=self.start_id if self.paired else None, end=self.end_id)

    def prompts(self, batch: Batch) -> Batch:
        """What an answer goes on from, of rows of one example: the encoder's row and a start token, or the questions alone, moved to the right."""
        rows = len(batch["tokens_BL"])
        if self.paired:
            real_BL = jnp.max(batch["input_segments_BI"], axis=1, keepdims=True)  # rows of padding ask nothing
            start = {"tokens_BL": jnp.full((rows, 1), self.start_id, jnp.int32), "positions_BL": jnp.zeros((rows, 1), jnp.int32)}
            return {name: values for name, values in batch.items() if name.endswith("_BI")} | start | {"segments_BL": real_BL}
        length = batch["tokens_BL"].shape[1]
        positions_BL = jnp.arange(length) - (length - jnp.sum(batch["prefix_BL"], axis=1)[:, None])
        given_BL = (positions_BL >= 0).astype(jnp.int32)
        positions_BL = jnp.maximum(positions_BL, 0).astype(jnp.int32)
        tokens_BL = jnp.take_along_axis(batch["tokens_BL"], positions_BL, axis=1) * given_BL
        prompts = {"tokens_BL": tokens_BL, "segments_BL": given_BL, "positions_BL": positions_BL}
        return prompts | ({"prefix_BL": given_BL} if self.mask == "prefix" else {})

    def outputs(self, model: Model, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """The best text for each row, tokens [rows, T] of which what follows an eos means nothing, and its score."""
        tokens_BNT, score_BN = generate(
            model, params, self.prompts(batch), options=Options(beams=self.config.beams, length_penalty=self.config.length_penalty), rng=jax.random.key(0),
            new_tokens=self.new_tokens, eos_id=self.end_id, pad_id=self.tokenizer.pad_id, vocab_size=self.tokenizer.vocab_size,
        )  # fmt: skip
        return {"tokens": tokens_BNT[:, 0], "score": score_BN[:, 0]}
