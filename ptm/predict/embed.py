"""Vectors of texts: the hidden states of the last layer, averaged or taken at one position (Reimers and Gurevych 2019, section 3)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Field
from ptm.fields import ConfigError
from ptm.models import Model
from ptm.objectives.rows import Frame
from ptm.predict import rows
from ptm.predict.lines import Line
from ptm.predict.options import Embed as Options


def _pooled(model: Model, params: Any, batch: Any, *, mask: str, place: str, normalize: bool) -> dict[str, jax.Array]:
    """Vectors [rows, D] of rows of one text each, means or those at the first or last place; of an encoder-decoder those of its encoder."""
    if model.config.kind == "encoder_decoder":
        hidden_BLD, real_BL = model.encode(params, batch).hidden_BLD, batch["input_segments_BI"] > 0
    else:
        hidden_BLD, real_BL = model.hidden(params, batch, mask=mask).hidden_BLD, batch["segments_BL"] > 0
    hidden_BLD, count_B = hidden_BLD.astype(jnp.float32), jnp.maximum(jnp.sum(real_BL, axis=1), 1)
    if place == "mean":
        vector_BD = jnp.sum(jnp.where(real_BL[..., None], hidden_BLD, 0), axis=1) / count_B[:, None]
    else:
        place_B = jnp.zeros_like(count_B) if place == "first" else count_B - 1
        vector_BD = jnp.take_along_axis(hidden_BLD, place_B[:, None, None], axis=1)[:, 0]
    return {"vector": vector_BD / jnp.maximum(jnp.linalg.norm(vector_BD, axis=1, keepdims=True), 1e-12) if normalize else vector_BD}


class Embed:
    """{"text": ...} -> {"embedding": [D numbers], "tokens": of the text, "truncated"}; texts that are too long are cut at their end, and say so."""

    def __init__(self, run: Any, params: Any, options: Options, *, batch_size: int) -> None:
        model, self._tokenizer = run.model, run.tokenizer
        kind, place = model.config.kind, options.pooling
        if place == "cls" and kind != "encoder":
            raise ConfigError(f"--pooling=cls reads a position that {model.config.name} was not trained to sum texts up at; allowed: mean, last.")
        if kind == "encoder_decoder":
            # Its encoder reads what it was trained on: a text and eos, after cls where it was an encoder of its own.
            begin = [self._tokenizer.cls_id] if hasattr(model.config, "parts") and self._tokenizer.cls_id is not None else []
            end = [] if self._tokenizer.eos_id is None else [self._tokenizer.eos_id]
            self._length, self._overhead = run.objective.lengths["I"], len(begin) + len(end)
            self._example = lambda tokens: {"inputs_BI": np.concatenate([begin, tokens, end]).astype(np.int32), "tokens_BL": np.zeros(1, np.int32)}
            featurizer = rows.Rows({"L": 1, "I": self._length}, {"inputs_BI": Field(is_tokens=True), "tokens_BL": Field(is_tokens=True)})
        else:
            frame = Frame.of(self._tokenizer, model.config, objective="embed")
            self._length, self._overhead = run.objective.lengths["L"], frame.overhead(1)
            self._example = lambda tokens: dict(zip(("tokens_BL", "types_BL"), frame.around([tokens])))
            featurizer = rows.Rows({"L": self._length}, {"tokens_BL": Field(is_tokens=True), "types_BL": Field()})
            place = model.config.summary if place == "cls" else place
        mask = "full" if kind == "encoder" and run.objective.mask != "causal" else "causal"
        step = run.program(_pooled, mask=mask, place=place, normalize=options.normalize)
        self._through = {"featurizer": featurizer, "step": step, "run": run, "params": params, "batch_size": batch_size}

    def __call__(self, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
        return rows.answers(lines, read=self._read, answer=self._answer, **self._through)

    def _read(self, record: dict[str, Any]) -> rows.Read:
        tokens = self._tokenizer.encode(rows.text_of(record))
        if not len(tokens):
            raise ConfigError("the text has no token")
        return rows.Read(len(tokens), [self._example(tokens[: self._length - self._overhead])])

    def _answer(self, tokens: int, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        vector_D = [round(float(x), 6) for x in outputs[0]["vector"]]
        return {"embedding": vector_D, "tokens": tokens, "truncated": tokens > self._length - self._overhead}
