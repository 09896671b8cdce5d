"""Answers of a fine-tuned model about records: classes, numbers, tags, spans, texts."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from ptm import config as config_lib
from ptm.data.documents import document_of
from ptm.data.records import BadRecord
from ptm.evals.answers import answers, task_of
from ptm.fields import ConfigError
from ptm.objectives.tag import Tag
from ptm.predict.lines import Line
from ptm.text.boundaries import running_text

TRUTH = ("label", "tags", "answers", "target")  # fields that hold what is asked for, which no answer depends on
# Fields of a directory's records, of which its model says nothing, and those of them that may be missing.
UNSAID, SPARE = ("text=text", "pair=pair", "words=words"), ("pair", "words")


def asked(data: config_lib.Data) -> config_lib.Data:
    """The data's columns without those of the truth, so that a record is read alike with and without it."""
    entries = zip(data.columns, config_lib.column_entries(data.columns))
    return dataclasses.replace(data, columns=tuple(entry for entry, (_, field, _) in entries if field.partition(".")[0] not in TRUTH))


class Records:
    """The fields that the run's data.columns name, or their columns -> {"prediction", ...} as the objective answers; what is to be predicted may be left out.

    Of a tagger's `text` and `words` one is enough: words stand between spaces.
    """

    def __init__(self, run: Any, params: Any, *, batch_size: int, name: str) -> None:
        self._run, self._params, self._batch_size = run, params, batch_size
        self._task = task_of(run, name=f"--task={name}")
        unsaid = run.workdir is None and run.config.data.columns == config_lib.Data().columns
        self._data = dataclasses.replace(run.config.data, columns=UNSAID) if unsaid else asked(run.config.data)
        self._spare = SPARE if unsaid else ()
        self._columns = {field: column for _, field, column in config_lib.column_entries(self._data.columns)}
        if isinstance(self._task, Tag) and "words" not in self._columns:
            self._columns["words"] = "words"
            self._data = dataclasses.replace(self._data, columns=(*self._data.columns, "words=words"))

    def __call__(self, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
        run, found = self._run, []
        for line in lines:
            try:
                record = self._with_words(line.record) if isinstance(self._task, Tag) else line.record
                made = document_of(record, id=f"line {line.number}", data=self._data, tokenizer=run.tokenizer, optional=self._spare)
            except (BadRecord, ConfigError) as error:
                made = str(error)
            found.append(made)
        sound = (made for made in found if not isinstance(made, str))
        answered = answers(run, self._params, sound, batch_size=self._batch_size, tolerant=True)
        for made in found:
            yield {"error": made} if isinstance(made, str) else next(answered)[1]

    def _with_words(self, record: dict[str, Any]) -> dict[str, Any]:
        """A tagger's record with both of text and words."""
        words, text = (next((record[name] for name in (field, self._columns[field]) if name in record), None) for field in ("words", "text"))
        if words is None and text is not None:
            return {**record, "words": text.split() if isinstance(text, str) else []}
        if text is None and isinstance(words, str):
            return {**record, "text": words}
        if text is None and isinstance(words, list) and all(isinstance(word, str) for word in words):
            return {**record, "text": running_text(words)}
        return record
