"""What minutes of pretraining are worth: small BERTs of configs/small.py fine-tuned on four tasks, beside the same models with fresh parameters.

    PTM_DATA=... python benchmarks/small_tasks.py --en=runs/small-en --zh=runs/small-zh --runs=runs/small-tasks [--task=sst2,wikigold]

Each task runs `ptm train --seeds=N` twice, from `--config.init=ckpt:DIR` and from `--config.init=scratch:ckpt:DIR`, with the same recipe, budget and seeds;
what is reported is the last step's metric, so that nothing is selected on the set that is measured. A started table goes on where it was. A JSON line
for each of the two, with its command, is added to benchmarks/results/small_tasks.jsonl, and a table is printed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/small_tasks.jsonl"


class Task(NamedTuple):
    """A task: its language, recipe, what is changed in it, the eval, its metric, seeds."""

    language: str
    recipe: str
    changes: dict[str, Any]
    eval: str
    metric: str
    seeds: int


CHNSENTICORP = "tsv:$PTM_DATA/classify/chnsenticorp/chnsenticorp.zip"
SST2 = "tsv:$PTM_DATA/classify/sst2/alps"
TASKS = {
    "sst2": Task(  # half an epoch of 67,349 sentences, measured on the 872 of GLUE's dev set
        "en", "glue.py:sst2",
        {
            "data.source": f"{SST2}_train.tsv,{SST2}_dev.tsv", "data.validation_source": f"{SST2}_test.tsv",
            "train.batch_size": 8, "train.steps": 450, "schedule.warmup_steps": 45,
        },
        "sst2", "accuracy", 5,
    ),
    "chnsenticorp": Task(  # half an epoch or more of 9,600 reviews, measured on the 1,200 of the test set
        "zh", "text.py",
        {
            "data.source": f"{CHNSENTICORP}/train.tsv", "data.validation_source": f"{CHNSENTICORP}/test.tsv", "data.columns": "text=text_a,label=label",
            "train.batch_size": 8, "train.steps": 600, "schedule.warmup_steps": 60, "evals.validation.every": 600,
        },
        "dev", "accuracy", 3,
    ),
    "wikigold": Task("en", "ner.py:wikigold", {}, "dev", "f1", 3),  # 10 epochs of 1,526 sentences, measured on the others
    "cmrc2018": Task(  # two epochs of the 1,002 questions of the trial set, measured on 600 of the dev set; windows as long as pretraining's rows
        "zh", "squad.py:cmrc2018",
        {
            "data.source": "squad:$PTM_DATA/qa/cmrc2018/cmrc2018_trial.json", "data.validation_source": "squad:$PTM_DATA/qa/cmrc2018/cmrc2018_dev.json",
            "data.length": 128, "objective.doc_stride": 64, "objective.max_question": 32,
            "train.batch_size": 16, "train.steps": 900, "schedule.warmup_steps": 90, "evals.dev.examples": 600,
        },
        "dev", "f1", 3,
    ),
}  # fmt: skip
# Of all, ours for models this small: a larger rate, unrolled layers (faster on CPU), and no best checkpoint, which nothing reads.
COMMON = {"optimizer.learning_rate": 5e-4, "compute.scan_layers": "false", "checkpoint.keep_best": 0}


def command(name: str, start: str, folder: Path, runs: Path) -> list[str]:
    """The arguments of `ptm` that run a task from a start, `pretrained` or `scratch`, of the model of a workdir."""
    task, init = TASKS[name], f"{'' if start == 'pretrained' else 'scratch:'}ckpt:{folder}"
    steps = task.changes.get("train.steps")
    changes = {**COMMON, **task.changes, **({f"evals.{task.eval}.every": steps, "checkpoint.every": steps} if steps else {})}
    flags = [f"--config.{key}={os.path.expandvars(str(value))}" for key, value in changes.items()]
    return ["train", f"--config=configs/finetune/{task.recipe}", f"--config.init={init}", f"--seeds={task.seeds}", f"--workdir={runs / name / start}", *flags]


def measure(name: str, start: str, folder: Path, runs: Path) -> dict[str, Any]:
    """Runs a task from a start; returns its line of the results."""
    task, began = TASKS[name], time.time()
    subprocess.run([sys.executable, "-m", "ptm.cli", *command(name, start, folder.resolve(), runs.resolve())], check=True, cwd=ROOT)
    metrics = json.loads((runs / name / start / "seeds.json").read_text())["metrics"]
    summary = metrics[f"{task.eval}/{task.metric}"]
    return {
        "task": name, "start": start, "metric": task.metric, **summary, "minutes": round((time.time() - began) / 60, 1),
        "others": {key: entry["mean"] for key, entry in metrics.items() if key != f"{task.eval}/{task.metric}"},
        "command": " ".join(["ptm", *command(name, start, folder, runs)]).replace(os.environ["PTM_DATA"], "$PTM_DATA"), "time": time.strftime("%Y-%m-%d"),
        "device": f"{len(os.sched_getaffinity(0))} x {platform.machine()} CPU", "jax": metadata.version("jax"),
    }  # fmt: skip


def row(line: dict[str, Any]) -> str:
    """A line of the results as a row of the table."""
    low, high = line["ci95"]
    return f"| {line['task']} | {line['start']} | {line['metric']} | {line['mean']:.4f} ({low:.4f} to {high:.4f}) | {line['n']} | {line['minutes']} |"


def main() -> None:
    """Runs the tasks, adds their lines to the results, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--en", type=Path, required=True, help="workdir of configs/small.py:en")
    parser.add_argument("--zh", type=Path, required=True, help="workdir of configs/small.py:zh")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--task", default=",".join(TASKS), help="tasks, with commas between them")
    flags = parser.parse_args()
    if "PTM_DATA" not in os.environ:
        parser.error("PTM_DATA is not set: point it at the folder that holds classify/, tag/ and qa/")
    if unknown := set(flags.task.split(",")) - set(TASKS):
        parser.error(f"--task: no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    rows = ["| task | start | metric | mean (95 % interval) | seeds | minutes |", "| --- | --- | --- | --- | --- | --- |"]
    for name in flags.task.split(","):
        for start in ("pretrained", "scratch"):
            line = measure(name, start, getattr(flags, TASKS[name].language), flags.runs)
            rows.append(row(line))
            print("\n".join(rows), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
