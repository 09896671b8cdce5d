"""A fine-tuning task's answers about the validation split, measured by the metrics of its objective."""

import dataclasses
from typing import Any, ClassVar

from ptm import metrics
from ptm.data.batch import Document
from ptm.evals.answers import answers, task_of
from ptm.evals.protocol import Measured, RecordsConfig, file_of, rows_of
from ptm.fields import ConfigError, field

BY_FILE = "file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecordsConfig):
    """When and how to measure answers."""

    name: ClassVar[str] = "task"
    of_objective: ClassVar[bool] = True

    metrics: tuple[str, ...] = field((), doc="Entries of ptm.metrics.METRICS, as NAME or NAME:OPTION; empty = those of the objective.")
    group: str | None = field(None, doc=f"Measure groups of records apart too: '{BY_FILE}' = by the file they come from, or the name of a field.")
    together: str | None = field(None, doc="Field whose value records that belong together share, such as the answers to a question, for metrics that need it.")

    def check(self, where: str) -> None:
        super().check(where)
        for name in self.metrics:
            metrics.metric_of(name)


def require(options: Config, *, run: Any) -> None:
    """Refuses objectives that are no task, metrics that are not there, and data without records."""
    for part in run.separate:
        for name in options.metrics or task_of(part, name="the eval task").metrics:
            if metrics.needs_groups(name) and options.together is None:
                raise ConfigError(f"the metric {name} is one of records that belong together: say by which field, with --config.evals.EVAL.together=FIELD.")
    next(run.documents(options.data(run.config.data), limit=1))


def _group(doc: Document, group: str) -> str:
    if group == BY_FILE:
        return file_of(doc.id)
    if group not in doc.columns:
        raise ConfigError(f"the eval task groups by '{group}', but record {doc.id} has no such field; it has: {', '.join(doc.columns)}. Map it in columns.")
    return str(doc.columns[group])


def evaluate(options: Config, *, run: Any, params: Any) -> Measured:
    """The metrics of all records that tell the truth, as METRIC, of groups as GROUP/METRIC, and `records`, how many these are.

    Records that do not tell are answered too; their number is `unlabelled`. Predictions are the task's answers with `id` and `reference`.
    """
    task = task_of(run, name="the eval task")
    documents = run.documents(options.data(run.config.data), limit=options.examples)
    predictions: list[dict[str, Any]] = []
    groups: dict[str, list[int]] = {}
    together: list[str] = []
    for doc, answer in answers(run, params, documents, batch_size=rows_of(options, run)):
        reference = task.reference(doc)
        if reference is not None:
            groups.setdefault("" if options.group is None else _group(doc, options.group), []).append(len(predictions))
        predictions.append({"id": doc.id, **answer, "reference": reference})
        together.append("" if options.together is None else _group(doc, options.together))

    def measured(chosen: list[int]) -> dict[str, float]:
        ours, theirs = ([predictions[n][side] for n in chosen] for side in ("prediction", "reference"))
        return metrics.measure(options.metrics or task.metrics, ours, theirs, groups=None if options.together is None else [together[n] for n in chosen])

    known = sorted(n for chosen in groups.values() for n in chosen)
    values = {**(measured(known) if known else {}), "records": float(len(known))}
    if len(known) < len(predictions):
        values["unlabelled"] = float(len(predictions) - len(known))
    if options.group is not None:
        values |= {f"{group}/{metric}": value for group, chosen in sorted(groups.items()) for metric, value in measured(chosen).items()}
    return Measured(values, predictions)
