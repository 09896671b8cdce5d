"""Benchmarks as their authors score them: the table of development sets with its average, and the files that are handed in for the test sets.

Reads workdirs alone: metrics.jsonl and predictions/NAME-STEP.jsonl of the evals that configs/finetune/{glue,superglue,clue}.py name. A task is scored by
the last evaluation of a run; where several runs have it, by that of the best run, as published.
"""

import dataclasses
import glob
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptm import fields, untrusted
from ptm.fields import ConfigError

Rows = list[dict[str, Any]]
ARCHIVE = "submission.zip"


@dataclasses.dataclass(frozen=True)
class Answers:
    """How the answers of a test set are handed in: name of the file, and its content from the rows of predictions."""

    file: str
    content: Callable[[Rows, "Answers"], str]
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what is written for what may be predicted; nothing = as predicted
    first: int | None = None  # number of the line that holds record 0; None: records have names of their own

    def number(self, row: Mapping[str, Any]) -> int:
        """The official number of a record, from its id FILE:LINE or FILE:NUMBER."""
        return int(_name(row)) - (self.first or 0)

    def label(self, row: Mapping[str, Any]) -> str:
        """What is written for a prediction; the first label for one that is none."""
        given = str(row["prediction"]).strip()
        return given if not self.labels else self.labels[given] if given in self.labels else next(iter(self.labels.values()))

    def strays(self, rows: Rows) -> int:
        """How many predictions are no label, as a model that writes them can have it."""
        return sum(str(row["prediction"]).strip() not in self.labels for row in rows) if self.labels else 0


def _name(row: Mapping[str, Any]) -> str:
    return str(row["id"]).partition(":")[2]


def _complete(rows: Rows, answers: Answers) -> Rows:
    """The rows in the order of their numbers. Raises ConfigError where one is missing, since a bad record would move all behind it."""
    ordered = sorted(rows, key=answers.number)
    for number, row in enumerate(ordered):
        if answers.number(row) != number:
            raise ConfigError(
                f"{answers.file}: record {number} of the test set was not answered, as the training's log tells; mend the file and evaluate again."
            )
    return ordered


def _jsonl(objects: Sequence[Any]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def _tsv(rows: Rows, answers: Answers) -> str:
    return "index\tprediction\n" + "".join(f"{n}\t{answers.label(row)}\n" for n, row in enumerate(_complete(rows, answers)))


def _scores(rows: Rows, answers: Answers) -> str:
    return "index\tprediction\n" + "".join(f"{n}\t{min(5.0, max(0.0, _float(row['prediction']))):.3f}\n" for n, row in enumerate(_complete(rows, answers)))


def _float(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def _idx(rows: Rows, answers: Answers) -> str:
    return _jsonl([{"idx": n, "label": answers.label(row)} for n, row in enumerate(_complete(rows, answers))])


def _idx_number(rows: Rows, answers: Answers) -> str:
    return _jsonl([{"idx": n, "label": int(answers.label(row))} for n, row in enumerate(_complete(rows, answers))])


def _idx_named(rows: Rows, answers: Answers) -> str:
    return _jsonl([{"idx": int(_name(row)), "label": answers.label(row)} for row in rows])


def _multirc(rows: Rows, answers: Answers) -> str:
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for row in rows:
        passage, question, answer = map(int, _name(row).split("/"))
        passages.setdefault(passage, {}).setdefault(question, []).append({"idx": answer, "label": int(answers.label(row))})
    return _jsonl([{"idx": p, "passage": {"questions": [{"idx": q, "answers": found} for q, found in asked.items()]}} for p, asked in passages.items()])


def _in_order(rows: Rows, answers: Answers) -> str:
    rows = rows if answers.first is None else _complete(rows, answers)
    return _jsonl([{"id": answers.number(row), "label": answers.label(row)} for row in rows])


def _numbers_in_order(rows: Rows, answers: Answers) -> str:
    return _jsonl([{"id": answers.number(row), "label": int(row["prediction"])} for row in rows])


def _by_name(rows: Rows, answers: Answers) -> str:
    return json.dumps({_name(row): row["prediction"] for row in rows}, ensure_ascii=False, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The metrics of each task, whose mean is its score (0 to 100), with the factor that makes them so; the test sets by eval, and whose run answers them."""

    tasks: dict[str, tuple[tuple[str, float], ...]]
    tests: dict[str, tuple[str, Answers]]


def _words(labels: Sequence[str], *written: str) -> dict[str, str]:
    """Labels as they are, and the words that a model writes for them."""
    return {label: label for label in labels} | dict(zip(written, labels))


def _percent(*metrics: str) -> tuple[tuple[str, float], ...]:
    return tuple((metric, 100.0) for metric in metrics)


TWO_WAY = _words(("entailment", "not_entailment"))
NLI = _words(("entailment", "neutral", "contradiction"))
TRUE = {"true": "true", "false": "false", "True": "true", "False": "false"}

GLUE = Benchmark(
    tasks={
        "cola": _percent("cola/matthews"),
        "sst2": _percent("sst2/accuracy"),
        "mrpc": _percent("mrpc/f1", "mrpc/accuracy"),
        "stsb": _percent("stsb/pearson", "stsb/spearman"),
        "qqp": _percent("qqp/f1", "qqp/accuracy"),
        "mnli": _percent("mnli/accuracy", "mnli_mismatched/accuracy"),
        "qnli": _percent("qnli/accuracy"),
        "rte": _percent("rte/accuracy"),
        "wnli": _percent("wnli/accuracy"),
    },
    tests={
        "cola_test": ("cola", Answers("CoLA.tsv", _tsv, _words("01", "unacceptable", "acceptable"), first=2)),
        "sst2_test": ("sst2", Answers("SST-2.tsv", _tsv, _words("01", "negative", "positive"), first=2)),
        "mrpc_test": ("mrpc", Answers("MRPC.tsv", _tsv, _words("01", "not_equivalent", "equivalent"), first=2)),
        "stsb_test": ("stsb", Answers("STS-B.tsv", _scores, first=2)),
        "qqp_test": ("qqp", Answers("QQP.tsv", _tsv, _words("01", "not_duplicate", "duplicate"), first=2)),
        "mnli_test": ("mnli", Answers("MNLI-m.tsv", _tsv, NLI, first=2)),
        "mnli_mismatched_test": ("mnli", Answers("MNLI-mm.tsv", _tsv, NLI, first=2)),
        "qnli_test": ("qnli", Answers("QNLI.tsv", _tsv, TWO_WAY, first=2)),
        "rte_test": ("rte", Answers("RTE.tsv", _tsv, TWO_WAY, first=2)),
        "wnli_test": ("wnli", Answers("WNLI.tsv", _tsv, _words("01", "not_entailment", "entailment"), first=2)),
        "ax_test": ("mnli", Answers("AX.tsv", _tsv, NLI, first=2)),
    },
)
SUPERGLUE = Benchmark(
    tasks={
        "boolq": _percent("boolq/accuracy"),
        "cb": _percent("cb/f1_macro", "cb/accuracy"),
        "copa": _percent("copa/accuracy"),
        "multirc": _percent("multirc/f1a", "multirc/exact_match"),
        "record": (("record/f1", 1.0), ("record/exact_match", 1.0)),
        "rte": _percent("rte/accuracy"),
        "wic": _percent("wic/accuracy"),
        "wsc": _percent("wsc/accuracy"),
    },
    tests={
        "boolq_test": ("boolq", Answers("BoolQ.jsonl", _idx, TRUE, first=1)),
        "cb_test": ("cb", Answers("CB.jsonl", _idx, _words(("entailment", "contradiction", "neutral")), first=1)),
        "copa_test": ("copa", Answers("COPA.jsonl", _idx_number, _words("01", "choice1", "choice2"), first=1)),
        "multirc_test": ("multirc", Answers("MultiRC.jsonl", _multirc, _words("01", "False", "True"))),
        "record_test": ("record", Answers("ReCoRD.jsonl", _idx_named)),
        "rte_test": ("rte", Answers("RTE.jsonl", _idx, TWO_WAY, first=1)),
        "wic_test": ("wic", Answers("WiC.jsonl", _idx, TRUE, first=1)),
        "wsc_test": ("wsc", Answers("WSC.jsonl", _idx_named, {given: label.capitalize() for given, label in TRUE.items()})),
        "axb_test": ("rte", Answers("AX-b.jsonl", _idx, TWO_WAY, first=1)),
        "axg_test": ("rte", Answers("AX-g.jsonl", _idx, TWO_WAY, first=1)),
    },
)
CLUE = Benchmark(
    tasks={
        **{name: _percent(f"{name}/accuracy") for name in ("afqmc", "tnews", "iflytek", "cmnli", "ocnli", "cluewsc", "csl")},
        "cmrc2018": (("cmrc2018/exact_match", 1.0),),
        **{name: _percent(f"{name}/accuracy") for name in ("chid", "c3")},
    },
    tests={
        "afqmc_test": ("afqmc", Answers("afqmc_predict.json", _in_order, first=1)),
        "tnews_test": ("tnews", Answers("tnews11_predict.json", _in_order, first=1)),
        "iflytek_test": ("iflytek", Answers("iflytek_predict.json", _in_order, first=1)),
        "cmnli_test": ("cmnli", Answers("cmnli_predict.json", _in_order, first=1)),
        "ocnli_test": ("ocnli", Answers("ocnli_predict.json", _in_order, first=1)),
        "cluewsc_test": ("cluewsc", Answers("cluewsc11_predict.json", _in_order)),
        "csl_test": ("csl", Answers("csl_predict.json", _in_order)),
        "cmrc2018_test": ("cmrc2018", Answers("cmrc2018_predict.json", _by_name)),
        "chid_test": ("chid", Answers("chid11_predict.json", _by_name)),
        "c3_test": ("c3", Answers("c311_predict.json", _numbers_in_order)),
    },
)
BENCHMARKS = {"glue": GLUE, "superglue": SUPERGLUE, "clue": CLUE}


@dataclasses.dataclass(frozen=True)
class Scored:
    """A task's score in a run, 0 to 100, with the values that it is the mean of, at a step."""

    run: Path
    step: int
    values: dict[str, float]

    @property
    def score(self) -> float:
        return sum(self.values.values()) / len(self.values)


def _lines(path: Path) -> Rows:
    """The rows of a file of JSON lines. Raises ConfigError for a line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(dict(untrusted.json_of(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: {error}; the file is damaged.") from None
    return rows


def workdirs(runs: str) -> list[Path]:
    """The workdirs that comma-separated folders or patterns name. Raises ConfigError where there is none."""
    found = [Path(path) for pattern in filter(None, runs.split(",")) for path in sorted(glob.glob(os.path.expanduser(pattern.strip()), recursive=True))]
    kept = list(dict.fromkeys(path for path in found if (path / "metrics.jsonl").is_file()))
    if not kept:
        raise ConfigError(f"--runs={runs} names no workdir, a folder with metrics.jsonl (working directory {os.getcwd()}); it names {len(found)} other paths.")
    return kept


def score(benchmark: Benchmark, runs: Sequence[Path]) -> dict[str, Scored]:
    """Task -> its score in the run where that is the best, in the order of the benchmark; tasks that no run measured are left out."""
    found: dict[str, Scored] = {}
    for run in runs:
        rows = _lines(run / "metrics.jsonl")
        for task, metrics in benchmark.tasks.items():
            row = next((row for row in reversed(rows) if all(metric in row for metric, _ in metrics)), None)
            if row is not None:
                here = Scored(run, int(row["step"]), {metric: row[metric] * factor for metric, factor in metrics})
                if task not in found or here.score > found[task].score:
                    found[task] = here
    return {task: found[task] for task in benchmark.tasks if task in found}


def _predictions(run: Path, name: str) -> Path | None:
    """The newest predictions of an eval of a run."""
    steps = {int(match[1]): path for path in run.glob(f"predictions/{name}-*.jsonl") if (match := re.fullmatch(re.escape(name) + r"-(\d+)\.jsonl", path.name))}
    return steps[max(steps)] if steps else None


def _answered(benchmark: Benchmark, scored: Mapping[str, Scored], runs: Sequence[Path]) -> dict[str, Path]:
    """Test set -> the predictions of it by the run that scores its task. Raises ConfigError where several runs answered one that none scores."""
    found = {}
    for test, (task, _) in benchmark.tests.items():
        candidates = [path for run in ([scored[task].run] if task in scored else runs) if (path := _predictions(run, test)) is not None]
        if len(candidates) > 1:
            raise ConfigError(
                f"{', '.join(map(str, candidates))} answer {test}, and no run has a score of {task} that says which is the best; name one with --runs."
            )
        if candidates:
            found[test] = candidates[0]
    return found


def table(benchmark: Benchmark, scored: Mapping[str, Scored]) -> str:
    """The scores as a person reads them, and their average."""
    lines = []
    for task in benchmark.tasks:
        if task not in scored:
            lines.append(f"  {task:<10}       -  not measured")
            continue
        entry = scored[task]
        values = ", ".join(f"{metric} {value:.2f}" for metric, value in entry.values.items())
        lines.append(f"  {task:<10}{entry.score:8.2f}  {values}  ({entry.run}, step {entry.step})")
    missing = [task for task in benchmark.tasks if task not in scored]
    note = f", without {', '.join(missing)}" if missing else ""
    return "\n".join([*lines, f"  {'average':<10}{average(scored):8.2f}  of {len(scored)} tasks{note}"])


def average(scored: Mapping[str, Scored]) -> float:
    """Mean of the tasks' scores, each the mean of its metrics (Wang et al. 2019, section 3.4)."""
    return sum(entry.score for entry in scored.values()) / len(scored)


def submit(*, benchmark: str, runs: str, output: str | None) -> dict[str, Any]:
    """Prints the table of the development sets and, into the folder `output`, writes the files of all test sets that were answered, and an archive of them.

    Returns {benchmark, average, tasks, files}. Raises ConfigError where no run has a task of the benchmark, and for answers that are not complete.
    """
    chosen, found = fields.lookup(BENCHMARKS, benchmark, "--benchmark"), workdirs(runs)
    scored = score(chosen, found)
    answered = _answered(chosen, scored, found) if output else {}
    if not scored and not answered:
        raise ConfigError(
            f"--runs={runs}: none of {len(found)} runs has measured a task of {benchmark}; its evals are named {', '.join(chosen.tasks)}, as in configs/finetune/{benchmark}.py."
        )
    if scored:
        print(table(chosen, scored))
    written = _write(chosen, answered, Path(output)) if output else []
    tasks = {task: round(entry.score, 4) for task, entry in scored.items()}
    return {"benchmark": benchmark, "average": round(average(scored), 4) if scored else None, "tasks": tasks, "files": written}


def _write(benchmark: Benchmark, answered: Mapping[str, Path], output: Path) -> list[str]:
    if not answered:
        known = ", ".join(benchmark.tests)
        raise ConfigError(f"--output={output}: no run has answered a test set (evals {known}); train with the recipe's word `test`, as in glue.py:sst2,test.")
    contents = {}
    for test, path in answered.items():
        answers, rows = benchmark.tests[test][1], _lines(path)
        try:
            contents[answers.file] = answers.content(rows, answers)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} does not hold answers of {test} ({type(error).__name__}: {error}); is it of another recipe?") from None
        if strays := answers.strays(rows):
            print(f"  {answers.file}: {strays} of {len(rows)} predictions are no label; {next(iter(answers.labels.values()))} stands for them")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (output / name).write_text(content, encoding="utf-8", newline="\n")
        with zipfile.ZipFile(output / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    except OSError as error:
        raise ConfigError(f"--output={output} cannot be written to ({error.strerror}); name another folder.") from None
    missing = [answers.file for test, (_, answers) in benchmark.tests.items() if test not in answered]
    print(f"  {len(contents)} test sets written to {output}, and all in {ARCHIVE}" + (f"; not answered: {', '.join(missing)}" if missing else ""))
    return list(contents)
