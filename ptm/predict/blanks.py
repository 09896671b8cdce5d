"""Blanks of a text filled by a model of masked language (Devlin et al. 2019, section 3.1)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data.batch import Field
from ptm.fields import ConfigError
from ptm.models import Model
from ptm.nn.heads import head_names
from ptm.objectives.rows import Frame
from ptm.predict import rows
from ptm.predict.lines import Line
from ptm.predict.options import BLANK
from ptm.predict.options import FillMask as Options


def _likeliest(model: Model, params: Any, batch: Any, *, head: str, mask: str, top_k: int, vocab_size: int) -> dict[str, jax.Array]:
    """The `top_k` likeliest pieces of every position, [rows, L, top_k], and their probabilities."""
    hidden_BLD = model.hidden(params, batch, mask=mask, head=head).hidden_BLD
    probs_BLV = jax.nn.softmax(model.logits(params, hidden_BLD, head=head)[..., :vocab_size].astype(jnp.float32))
    probs_BLK, pieces_BLK = jax.lax.top_k(probs_BLV, top_k)
    return {"pieces": pieces_BLK, "probabilities": probs_BLK}


class Blanks:
    """{"text": "Paris is the [MASK] of France."} -> {"blanks": [[{"piece", "probability"}, ...], ...], "text": filled with the likeliest pieces}."""

    def __init__(self, run: Any, params: Any, options: Options, *, batch_size: int) -> None:
        tokenizer, model, mask = run.tokenizer, run.model, run.objective.mask
        if model.config.kind != "encoder" or mask != "full" or "mlm" not in head_names(model.module.heads) or tokenizer.mask_id is None:
            raise ConfigError(
                f"--task=fill-mask needs an encoder with the head mlm and a tokenizer with a mask; this is {model.config.name} with "
                f"{', '.join(model.module.heads)}. Take a run of masked language modelling; --task=generate is for decoders and encoder-decoders."
            )
        self._tokenizer = tokenizer
        self._blanks = (options.blank,) if options.blank is not None else tuple(dict.fromkeys((BLANK, *tokenizer.pieces([tokenizer.mask_id]))))
        self._frame = Frame.of(tokenizer, model.config, objective="fill-mask")
        self._length = run.objective.lengths["L"]
        featurizer = rows.Rows({"L": self._length}, {"tokens_BL": Field(is_tokens=True), "types_BL": Field()})
        step = run.program(_likeliest, head="mlm", mask=mask, top_k=min(options.top_k, tokenizer.vocab_size), vocab_size=tokenizer.vocab_size)
        self._through = {"featurizer": featurizer, "step": step, "run": run, "params": params, "batch_size": batch_size}

    def __call__(self, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
        return rows.answers(lines, read=self._read, answer=self._answer, **self._through)

    def _read(self, record: dict[str, Any]) -> rows.Read:
        parts = re.split("|".join(map(re.escape, self._blanks)), rows.text_of(record))
        if len(parts) == 1:
            raise ConfigError(f"the text has no blank; write {' or '.join(self._blanks)} where one is, or name what stands for it with --blank=TEXT.")
        # A blank takes the space before it along, as a piece of a vocabulary that marks words does.
        pieces = [self._tokenizer.encode(part.rstrip()) for part in parts[:-1]] + [self._tokenizer.encode(parts[-1])]
        places = np.cumsum([len(ids) + 1 for ids in pieces[:-1]]) - 1
        tokens = np.concatenate([np.append(ids, self._tokenizer.mask_id) for ids in pieces])[:-1].astype(np.int32)
        framed = self._frame.around([tokens])
        if len(framed.tokens_L) > self._length:
            raise ConfigError(f"the text has {len(framed.tokens_L)} tokens, special ones included; the model was trained on {self._length}. Give less of it.")
        return rows.Read((tokens, framed.starts[0], places), [{"tokens_BL": framed.tokens_L, "types_BL": framed.types_L}])

    def _answer(self, about: tuple[np.ndarray, int, np.ndarray], outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        (tokens, start, places), (found,) = about, outputs
        filled, blanks = tokens.copy(), []
        for place in places:
            pieces, probabilities = found["pieces"][start + place], found["probabilities"][start + place]
            blanks.append([{"piece": name, "probability": round(float(p), 6)} for name, p in zip(self._tokenizer.pieces(pieces), probabilities)])
            filled[place] = pieces[0]
        return {"blanks": blanks, "text": self._tokenizer.decode(filled)}
