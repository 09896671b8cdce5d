"""Classification of a text or a pair of texts (Radford et al. 2018, section 3.2; Devlin et al. 2019, section 4.1), with GPT's auxiliary language modelling."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Document, Draw, Example, Field
from ptm.fields import field
from ptm.objectives.protocol import Batch, Ratio
from ptm.objectives.rows import UNKNOWN, LabelConfig, SummaryConfig, SummaryTask, label_name, number_of, weights_by_label

LABEL = "label"  # the column with the name of the class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SummaryConfig, LabelConfig):
    """Options of classification. The label of a record is its field `label`, a second text its field `pair`: data.columns=text=A,pair=B,label=C."""

    name: ClassVar[str] = "classify"

    label_smoothing: float = field(0.0, low=0.0, high=1.0, doc="Share of the target that is spread evenly over all labels (Szegedy et al. 2016, section 7).")

    def names_in(self, record: str, columns: Mapping[str, Any]) -> list[str]:
        name = label_name(columns[LABEL], record=record) if LABEL in columns else None
        return [] if name is None else [name]


class Classify(SummaryTask):
    """Cross entropy of the head `classify` over the labels; what is given a class weight counts so many times."""

    usual_metrics = ("accuracy",)
    config: Config

    def __init__(self, config: Config, *, tokenizer: Any, length: int, packing: str, model_config: Any) -> None:
        self._weights = weights_by_label(config)
        super().__init__(
            config, tokenizer=tokenizer, length=length, packing=packing, model_config=model_config, outputs=len(config.labels),
            marked={"label": Field(np.int32, UNKNOWN)},
        )  # fmt: skip
        self._numbers = {name: number for number, name in enumerate(config.labels)}

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        name = self.reference(doc)
        yield self.example(self.texts(doc), doc, room=self.lengths["L"], label=UNKNOWN if name is None else self._numbers[name])

    def reference(self, doc: Document) -> str | None:
        """The name of a record's label; None if it has none. Raises ConfigError for one that is not known."""
        names = self.config.names_in(doc.id, doc.columns)
        if names:
            number_of(names[0], self._numbers, record=doc.id)
        return names[0] if names else None

    def label_weights(self, batch: Batch) -> jax.Array:
        return jnp.where(batch["label_BS"] != UNKNOWN, jnp.asarray(self._weights)[batch["label_BS"]], 0.0)

    def label_terms(self, logits_BSN: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, Ratio]]:
        label_BS, share = batch["label_BS"], self.config.label_smoothing
        log_probs_BSN = jax.nn.log_softmax(logits_BSN)
        nll_BS = -jnp.take_along_axis(log_probs_BSN, jnp.maximum(label_BS, 0)[..., None], axis=2)[..., 0]
        if share:
            nll_BS = (1 - share) * nll_BS - share * jnp.mean(log_probs_BSN, axis=2)
        known_BS = (label_BS != UNKNOWN).astype(jnp.float32)
        hits = jnp.sum((jnp.argmax(logits_BSN, axis=2) == label_BS) * known_BS)
        return nll_BS, {"accuracy": (hits, jnp.sum(known_BS))}

    def answer(self, doc: Document, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        """The most likely label, and the probability of each."""
        logits_N = np.asarray(outputs[0]["logits"][0], np.float64)
        shares_N = np.exp(logits_N - logits_N.max())
        shares_N /= shares_N.sum()
        return {"prediction": self.config.labels[int(np.argmax(shares_N))], "probabilities": dict(zip(self.config.labels, shares_N.tolist()))}
