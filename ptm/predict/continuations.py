"""Texts that go on after prompts, conversations among them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from ptm.data.conversation import TURNS, reply_prompt
from ptm.generate import text as generation
from ptm.predict.lines import Line
from ptm.predict.options import Generate as Options
from ptm.predict.rows import text_of

MESSAGES = "messages"


class Continuations:
    """{"text": prompt} or {"messages": [{"role", "content"}, ...]} -> {"text", "ended": end | stop | length}, with n_best {"texts": [...]}.

    A conversation is written as dialogues are in training, and its reply ends where the next turn would begin. What is drawn for a line depends on its number
    and the seed, not on the other lines.
    """

    def __init__(self, run: Any, params: Any, options: Options, *, batch_size: int) -> None:
        self._options, self._batch_size = options, batch_size
        self._writer = generation.Writer.of(run.model, params, run.tokenizer, options, run.prompt_frame)  # refuses models that do not generate now
        self._answerer = dataclasses.replace(self._writer, options=dataclasses.replace(options, stop=(*options.stop, *TURNS)))

    def __call__(self, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
        lines = list(lines)
        prompts = [self._prompt(line) for line in lines]

        def complete(writer: generation.Writer, *, talks: bool) -> Iterator[list[generation.Completion]]:
            chosen = (prompt for line, prompt in zip(lines, prompts) if (MESSAGES in line.record) == talks and isinstance(prompt, generation.Row))
            return writer.complete(chosen, batch_size=self._batch_size)

        found = {False: complete(self._writer, talks=False), True: complete(self._answerer, talks=True)}
        for line, prompt in zip(lines, prompts):
            talks = MESSAGES in line.record
            yield {"error": prompt} if isinstance(prompt, str) else self._answer(next(found[talks]), talks=talks)

    def _prompt(self, line: Line) -> generation.Row | str:
        try:
            text = reply_prompt(line.record[MESSAGES]) if MESSAGES in line.record else text_of(line.record)
            return self._writer.row(line.number - 1, text)
        except ValueError as error:  # a ConfigError is one
            return str(error)

    def _answer(self, completions: list[generation.Completion], *, talks: bool) -> dict[str, Any]:
        told = []
        for made in completions:
            told.append({"text": made.text.strip() if talks else made.text, "ended": made.ended})
            if self._options.token_ids:
                told[-1] |= {"token_ids": made.tokens, "score": round(made.score, 5)}
        return told[0] if self._options.n_best == 1 else {"texts": told}
