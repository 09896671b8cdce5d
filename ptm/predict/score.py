"""How likely a language model finds texts: log-likelihoods, of encoders pseudo-log-likelihoods."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ptm.evals import scoring
from ptm.fields import ConfigError
from ptm.predict import rows
from ptm.predict.lines import Line
from ptm.predict.options import Score as Options


class Score:
    """{"text"} or {"context", "continuation"} -> {"log_likelihood" (nats), "tokens" that were scored, "per_token" (nats), "greedy": all were the likeliest}."""

    def __init__(self, run: Any, params: Any, options: Options, *, batch_size: int) -> None:
        self._tokenizer, self._options = run.tokenizer, options
        self._scorer = scoring.scorer_of(run, name="--task=score", by_word=options.by_word)
        if options.by_word and not isinstance(self._scorer, scoring.OneMasked):
            raise ConfigError(
                f"--by_word is for encoders, which are scored with masked tokens; {run.model.config.name} reads from left to right. Leave it out."
            )
        step = run.program(self._scorer.function, **self._scorer.options)
        self._through = {"featurizer": self._scorer, "step": step, "run": run, "params": params, "batch_size": batch_size}

    def __call__(self, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
        return rows.answers(lines, read=self._read, answer=self._answer, **self._through)

    def _read(self, record: dict[str, Any]) -> rows.Read:
        if "continuation" in record:
            text: scoring.Text = (rows.text_of(record, "context"), rows.text_of(record, "continuation"))
        else:
            text = rows.text_of(record)
        request = scoring.request_of(self._tokenizer, text)
        if not len(request.target):
            raise ConfigError(f"the {'continuation' if 'continuation' in record else 'text'} has no token")
        return rows.Read(request, self._scorer.rows(request))

    def _answer(self, request: scoring.Request, outputs: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
        scored = self._scorer.scored(request, outputs)
        count = len(scored.log_probs)
        result = {
            "log_likelihood": round(scored.total, 5), "tokens": count, "per_token": round(scored.total / count, 5) if count else None,
            "greedy": bool(scored.greedy.all()),
        }  # fmt: skip
        if self._options.pieces:
            result |= {"pieces": self._tokenizer.pieces(scored.tokens), "log_probs": [round(float(x), 5) for x in scored.log_probs]}
        return result
