"""What a task answers about records: from documents through its compiled outputs to answers, in the order of the documents."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ptm.data.batch import Document, Example, keyed_rng
from ptm.evals import stream
from ptm.fields import ConfigError
from ptm.objectives.protocol import Task


def task_of(run: Any, *, name: str) -> Task:
    """The run's objective, which must be a task. Raises ConfigError if it is none; `name` is who asks."""
    if not isinstance(run.objective, Task):
        raise ConfigError(f"{name} asks for answers about records, but objective {run.config.objective.name} is no fine-tuning task; use an eval such as loss.")
    return run.objective


@dataclasses.dataclass
class _Question:
    """A document, and why the task cannot read it, if it cannot."""

    doc: Document
    refusal: str | None = None


def _no_other(rng: np.random.Generator) -> Document:
    raise AssertionError("a task answers about one document at a time and draws no other")


def answers(
    run: Any, params: Any, documents: Iterable[Document], *, batch_size: int, window: int | None = None, tolerant: bool = False
) -> Iterator[tuple[Document, dict[str, Any]]]:
    """(document, the task's answer about it) in the order of the documents, while they are read.

    About `window` rows are read ahead so that batches hold rows of similar length; None = 32 batches. Raises ConfigError for a document that the task
    cannot read; where `tolerant`, its answer is {"error": why}. On several processes all read the same documents and give the same answers.
    """
    task = task_of(run, name="this")

    def rows(question: _Question) -> list[Example]:
        doc = question.doc
        try:
            made = list(task.features(doc, rng=keyed_rng(run.config.seed, doc.id, 0), draw=_no_other))
            if not made:
                raise ConfigError(f"record {doc.id} gives objective {run.config.objective.name} nothing to read.")
        except ConfigError as error:
            if not tolerant:
                raise
            question.refusal, made = str(error), []
        return made

    found = stream.through(
        map(_Question, documents), rows=rows, featurizer=task, step=run.outputs_step, run=run, params=params, batch_size=batch_size, window=window
    )
    for question, outputs in found:
        yield question.doc, task.answer(question.doc, outputs) if question.refusal is None else {"error": question.refusal}
