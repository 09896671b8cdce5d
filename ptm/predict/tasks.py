"""The tasks of `ptm predict`, and the loop from line to line."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import jax

from ptm import fields, weights
from ptm.config import Data
from ptm.data.sources import open_source
from ptm.fields import ConfigError
from ptm.nn.heads import head_names
from ptm.predict.blanks import Blanks
from ptm.predict.continuations import Continuations
from ptm.predict.embed import Embed
from ptm.predict.lines import Line, answered, arrived, recorded, written
from ptm.predict.options import TASKS as OPTIONS
from ptm.predict.records import Records, asked
from ptm.predict.score import Score


class Entry(NamedTuple):
    """A row of TASKS: what answers lines, made from (run, params, options, batch_size=); None where one of `objectives` answers by itself."""

    build: Callable[..., Any] | None
    objectives: tuple[str, ...] = ()


TASKS: dict[str, Entry] = {
    "generate": Entry(Continuations),
    "fill-mask": Entry(Blanks),
    "classify": Entry(None, ("classify", "regress", "choose")),
    "tag": Entry(None, ("tag",)),
    "answer": Entry(None, ("span_qa", "seq2seq")),
    "embed": Entry(Embed),
    "score": Entry(Score),
}
assert TASKS.keys() == OPTIONS.keys(), "each task has its options"


def predict(
    spec: str, *, task: str, source: IO[bytes] | str, sink: IO[bytes], options: Any = None, batch_size: int = 16, columns: tuple[str, ...] = ()
) -> tuple[int, int]:
    """Answers every line of `source` on `sink`, in order, as lines arrive; returns (lines, those that could not be answered).

    A source that is text is FORMAT:PATH as in data.source, whose records `columns` (none: those of the run) map to fields. Raises ConfigError for a model
    that cannot do the task; a line that cannot be answered becomes {"line", "error"}, and is told on stderr.
    """
    entry = fields.lookup(TASKS, task, "task")
    if batch_size < 1:
        raise ConfigError(f"--batch_size={batch_size}; allowed: 1 or more rows.")
    run, params = weights.load(spec, devices=jax.devices()[:1])
    if columns:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, columns=columns)))
    if entry.build is None:
        name = run.config.objective.name
        if name not in entry.objectives:
            raise ConfigError(f"--task={task} needs a run of objective {' or '.join(entry.objectives)}; {spec} is one of {name}, for --task={'|'.join(_fitting(run))}.")
        answer = Records(run, params, batch_size=batch_size, name=task)
    else:
        answer = entry.build(run, params, OPTIONS[task]() if options is None else options, batch_size=batch_size)
    chunks = _of_source(source, run.config.data, raw=entry.build is None) if isinstance(source, str) else arrived(source)
    count, failed = 0, 0
    for chunk in chunks:
        for result in answered(chunk, answer):
            count += 1
            content, error = written(result)
            if error is not None:
                failed += 1
                print(f"ptm: line {result['line']}: {error}", file=sys.stderr)
            sink.write(content)
            sink.flush()
    return count, failed


def _fitting(run: Any) -> list[str]:
    """The tasks that a run can do, as far as its objective, its heads and the kind of its model say."""
    heads, encoder = head_names(run.model.module.heads), run.model.config.kind == "encoder"
    of_texts = (["fill-mask", "score"] if encoder and "mlm" in heads else []) + (["generate", "score"] if not encoder and "lm" in heads else [])
    return [task for task, entry in TASKS.items() if run.config.objective.name in entry.objectives or task in ("embed", *of_texts)]


def _of_source(spec: str, data: Data, *, raw: bool) -> Iterator[list[Line]]:
    """The records of FORMAT:PATH, which need not hold what is to be predicted."""
    return recorded(open_source(spec, data=asked(data)), raw=raw)
