"""Classification of a text or a pair of texts (Radford et al. 2018, section 3.2; Devlin et al. 2019, section 4.1), with GPT's auxiliary language modelling."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import ConfigError, field
from ptm.models import Model
from ptm.objectives.protocol import Aux, Batch
from ptm.objectives.tokens import TokenObjective

NO_LABEL = -1  # of rows of padding
SHORTEST = 5  # two texts of a token each and three special tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of classification. The label of a record is its field `label`, a second text its field `pair`: data.columns=text=A,pair=B,label=C."""

    name: ClassVar[str] = "classify"

    labels: tuple[str, ...] = field(("0", "1"), doc="Names of the classes, as the data has them.")
    lm_coefficient: float = field(0.0, low=0.0, doc="Coefficient of a decoder's language modelling of the same text (GPT: 0.5).")

    def lengths(self, length: int) -> dict[str, int]:
        """Dimensions of a row."""
        return {"L": length}

    def check(self, where: str) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"{where}.labels={self.labels} must hold two or more different names.")


def shortened(texts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """The texts with tokens taken from the end of whichever is the longest until they fit into `room` tokens together."""
    sizes = [len(text) for text in texts]
    while sum(sizes) > room:
        longest = int(np.argmax(sizes))
        others = max((size for n, size in enumerate(sizes) if n != longest), default=0)
        sizes[longest] -= min(sum(sizes) - room, max(1, sizes[longest] - others))
    return [text[:size] for text, size in zip(texts, sizes)]


class Classify(TokenObjective):
    """Cross entropy of the head `classify` on the one position that stands for a row: the first or the last, as the family has it.

    An encoder reads cls text sep (pair sep), one that ends with its summary text sep (pair sep) cls, a decoder bos text (sep pair) eos. Segment types
    are 0, 1 for the pair, and 2 for a cls at the end (Yang et al. 2019, published code), as far as the model has so many.
    """

    kinds = ("encoder", "decoder")
    packing = "none"
    raw_length = None
    visits = None

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        if packing not in ("default", "none"):
            raise ConfigError(f"data.packing={packing} puts several texts into a row; allowed with classify: default, none.")
        if length < SHORTEST:
            raise ConfigError(f"data.length={length} leaves no room for two texts between special tokens; allowed with classify: {SHORTEST} or more.")
        decoder = model_config.kind == "decoder"
        if config.lm_coefficient and not decoder:
            raise ConfigError(f"objective.lm_coefficient={config.lm_coefficient} models language left to right, and model {model_config.name} reads both ways; allowed: 0.")
        super().__init__(z_loss=0.0, token_bytes=tokenizer.token_bytes)
        self.config, self.tokenizer = config, tokenizer
        self.mask = "causal" if decoder else "full"
        self.last = model_config.summary == "last"
        self.head = f"classify:{len(config.labels)}"
        self.heads = (*(["lm"] if config.lm_coefficient else []), self.head)
        self.coefficients = {"label": 1.0, **({"tokens": config.lm_coefficient} if config.lm_coefficient else {})}
        self.lengths = config.lengths(length)
        self.fields = {"tokens_BL": Field(is_tokens=True), "label_B": Field(np.int32, NO_LABEL)}
        self.fields |= {"targets_BL": Field(is_tokens=True), "weights_BL": Field(np.float32, 0.0)} if decoder else {"types_BL": Field()}
        self.target_positions = length if config.lm_coefficient else 0
        first = (tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id) if decoder else tokenizer.cls_id
        last = tokenizer.eos_id if decoder else tokenizer.sep_id
        between = tokenizer.sep_id if tokenizer.sep_id is not None else last
        if first is None or last is None:
            needed = "bos or eos" if decoder else "cls and sep"
            raise ConfigError(f"objective classify needs a tokenizer with {needed} for a {model_config.kind}; this one has none. Choose another with --config.tokenizer.*.")
        self._frame = (first, between, last)
        self._num_types = model_config.num_types if hasattr(model_config, "num_types") else 1
        self._numbers = {name: number for number, name in enumerate(config.labels)}

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        if "label" not in doc.columns:
            raise ConfigError(f"record {doc.id} has no field label; map it with --config.data.columns=text=COLUMN,label=COLUMN.")
        label = str(doc.columns["label"])
        if label not in self._numbers:
            raise ConfigError(f"record {doc.id} has the label {label!r}, which is not one of objective.labels={','.join(self.config.labels)}.")
        texts = [doc.tokens_L, *([self.tokenizer.encode(str(doc.columns["pair"]))] if "pair" in doc.columns else [])]
        first, between, last = self._frame
        texts = shortened(texts, self.lengths["L"] - 1 - len(texts))
        pieces = [np.concatenate([text, [last if n == len(texts) - 1 else between]]) for n, text in enumerate(texts)]
        turned = self.last and "types_BL" in self.fields
        at = len(pieces) - 1 if turned else 0  # the piece that cls is put to
        pieces[at] = np.append(pieces[at], first) if turned else np.append(first, pieces[at])
        tokens_L = np.concatenate(pieces).astype(np.int32)
        example = {"tokens_BL": tokens_L, "label_B": np.int32(self._numbers[label])}
        if "types_BL" in self.fields:
            types_L = np.repeat(np.arange(len(pieces), dtype=np.int32), list(map(len, pieces)))
            if turned:
                types_L[-1] = 2
            example["types_BL"] = np.minimum(types_L, self._num_types - 1)
        else:
            example["targets_BL"] = np.append(tokens_L[1:], 0).astype(np.int32)
            example["weights_BL"] = np.append(np.ones(len(tokens_L) - 1), 0).astype(np.float32)
        yield example

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        labelled = {"label": jnp.sum(_labelled(batch))}
        return labelled | ({"tokens": jnp.sum(batch["weights_BL"])} if "tokens" in self.coefficients else {})

    def loss(self, model: Model, params: Any, batch: Batch, *, rng: jax.Array | None, carry: Any, train: bool) -> tuple[dict[str, jax.Array], Aux, Any]:
        keys = (None, None) if rng is None else jax.random.split(rng)
        out = model.hidden(params, batch, mask=self.mask, head=self.head, train=train, rng=keys[0])
        place_B = jnp.maximum(jnp.sum(batch["segments_BL"] > 0, axis=1) - 1, 0) if self.last else jnp.zeros(len(batch["label_B"]), jnp.int32)
        hidden_BD = jnp.take_along_axis(out.hidden_BLD, place_B[:, None, None], axis=1)[:, 0]
        logits_BN = model.logits(params, hidden_BD, head=self.head, train=train, rng=keys[1])
        real_B, label_B = _labelled(batch), jnp.maximum(batch["label_B"], 0)
        log_probs_BN = jax.nn.log_softmax(logits_BN.astype(jnp.float32))
        nll_B = -jnp.take_along_axis(log_probs_BN, label_B[:, None], axis=1)[:, 0]
        hits_B = jnp.argmax(logits_BN, axis=1) == label_B
        totals, aux = {"label": jnp.sum(nll_B * real_B)}, Aux(ratios={}, maxima={})
        if "tokens" in self.coefficients:
            tokens, aux = self.token_terms(model, params, batch, out)
            totals |= tokens
            aux = aux.replace(ratios={f"lm_{name}": ratio for name, ratio in aux.ratios.items()})
        return totals, aux.replace(ratios={"accuracy": (jnp.sum(hits_B * real_B), jnp.sum(real_B)), **aux.ratios}), carry


def _labelled(batch: Batch) -> jax.Array:
    return (batch["label_B"] != NO_LABEL).astype(jnp.float32)
