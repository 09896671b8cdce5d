"""Made-up runs and studies, as their folders would be, for the tests of reports."""

import copy
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptm import config as config_lib
from ptm import log, registry, tree
from ptm.evals import loss
from ptm.models import gpt
from ptm.objectives import causal

COMMIT = "a1" * 20
STEPS = 100
NASTY = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & \\input{x} $1_2^3$ `a` *b* | "q" \x1b[31m\u202e end'

LOSS, ACCURACY = "pretrain:validation/loss", "pretrain:validation/accuracy"
BOTH = (
    {"name": ACCURACY, "higher": True, "scale": 100.0, "label": "accuracy, %"},
    {"name": LOSS, "higher": False, "scale": 1.0, "label": "loss"},
)  # fmt: skip


@functools.cache
def _plain() -> dict[str, Any]:
    model = gpt.Config(num_layers=2, width=16, num_heads=2, vocab_size=272)
    made = config_lib.base(model=model, objective=causal.Config(), evals={"validation": loss.Config()}, train=config_lib.Train(steps=STEPS, batch_size=4))
    made.data.source = ("text:corpus.txt",)
    return json.loads(json.dumps(config_lib.to_dict(registry.resolve(made))))


def config(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A whole config as config.json has it, with dotted keys changed."""
    made = copy.deepcopy(_plain())
    for key, value in (changes or {}).items():
        *path, leaf = key.split(".")
        functools.reduce(dict.__getitem__, path, made)[leaf] = value
    return made


def session(**changes: Any) -> dict[str, Any]:
    """One start of a run as env.json has it."""
    return {
        "from_step": 0, "time": "2026-01-02T03:04:05+0000", "python": "3.11.7", "versions": {"ptm": "0.1.0", "jax": "0.10.2", "numpy": "2.4.6"},
        "devices": {"kind": "cpu", "count": 1, "processes": 1}, "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, "remat": "none",
        "git": {"commit": COMMIT, "dirty": False}, "config": "0" * 16, "changes": {},
    } | changes  # fmt: skip


def decay(start: float, end: float, *, steps: int = STEPS, every: int = 10) -> list[tuple[int, float]]:
    """A curve that falls from start to end."""
    return [(step, end + (start - end) * math.exp(-5 * step / steps)) for step in range(every, steps, every)] + [(steps, end)]


def workdir(
    path: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    finals: Mapping[str, float] | None = None,
    curve: Sequence[tuple[int, float]] = (),
    history: Sequence[Mapping[str, Any]] | None = None,
    finished: bool = True,
    data: str = "d" * 16,
    answers: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """The folder of a run: `finals` of its last evaluation, training losses and twice as many of its eval by step."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config(changes)))
    (path / "env.json").write_text(
        json.dumps({"fingerprints": {"data": data, "tokenizer": "t" * 16}, "history": [session()] if history is None else list(history)})
    )
    rows = [
        row for step, value in curve for row in ((step, {"loss": value + 0.1, "rows": 4 * step}), (step, {"validation/loss": value, "validation/tokens": 50.0}))
    ]
    if finals:
        rows.append((STEPS, dict(finals)))
    (path / "metrics.jsonl").write_text("".join(log.row(step, values) + "\n" for step, values in rows))
    clocks = {"step_time": 0.5, "tokens_per_second": 2000.0, "model_flops_per_second": 4e9, "host_peak_bytes": 2**30, "compiles": 3, "compile_seconds": 1.5}
    (path / "timing.jsonl").write_text("".join(log.row(step, clocks | {"time": 1e9 + step, "tokens_per_second": 2000.0 + step}) + "\n" for step, _ in curve))
    kernel, scale = (type("Leaf", (), {"shape": shape}) for shape in ((2, 16, 8), (16,)))
    (path / "params.txt").write_text(
        tree.table({"layers": {"kernel": kernel}, "norm": {"scale": scale}}, columns={"axes": {"layers/kernel": "layers embed mlp", "norm/scale": "embed"}})
    )
    if answers:
        (path / "predictions").mkdir()
        for step in (10, 100):
            (path / f"predictions/validation-{step}.jsonl").write_text("".join(json.dumps({"step": step, **row}) + "\n" for row in answers))
    if finished:
        (path / "ckpt" / str(STEPS)).mkdir(parents=True)
    return path


def study(
    folder: Path,
    *,
    values: Mapping[str, Sequence[Mapping[str, float] | str]],
    metrics: Sequence[Mapping[str, Any]] = ({"name": "pretrain:validation/loss", "higher": False, "scale": 1.0, "label": "loss"},),
    published: Sequence[Mapping[str, Any]] = (),
    orderings: Sequence[Mapping[str, Any]] = (),
    claim: str = "One is better than two.",
    commits: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
    halving: Mapping[str, Any] | None = None,
    rungs: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """The folder of a study with the stage `pretrain`: arm -> for each seed the final metrics of its run, or a state that it is in instead.

    `commits` are of some arms; the arms of `shared` have the runs of others.
    """
    arms, runs = [], {}
    for arm, given in values.items():
        owner = shared[arm] if shared and arm in shared else arm
        place = f"{list(values).index(owner)}_{''.join(c if c.isalnum() else '_' for c in owner)[:30]}"  # as a folder's name
        own: dict[str, dict[str, str]] = {}
        for seed, entry in enumerate(given):
            name = f"{place}/seed{seed}/pretrain"
            own[str(seed)] = {"pretrain": name}
            if owner != arm:
                continue
            changes = {"seed": seed, "optimizer.learning_rate": 0.001 * (1 + len(arms))}
            runs[name] = {
                "stage": "pretrain", "seed": seed, "identity": f"{name}-identity", "needs": None, "steps": STEPS, "tokens": 1000 * STEPS,
                "config": config_lib.flatten(config(changes)),
            }  # fmt: skip
            _run(folder / name, changes, entry, commits[arm] if commits and arm in commits else COMMIT, seed)
        difference = {} if not arms else {"pretrain:optimizer.learning_rate": [0.001, 0.001 * (1 + len(arms))]}
        arms.append({"name": arm, "difference": difference, "runs": own})
    about = {
        "format": 1, "name": "made_up", "file": "experiments/made_up.py", "argument": "tiny", "claim": claim, "paper": "Nobody 2020, table 1", "base": next(iter(values)),
        "differs": ["optimizer.*"], "seeds": list(range(max(map(len, values.values())))), "stages": [{"name": "pretrain", "recipe": "configs/small.py", "after": None}],
        "metrics": list(metrics), "published": list(published), "orderings": list(orderings), "halving": halving and dict(halving), "search": None, "arms": arms, "runs": runs,
        "made": "2026-01-02T03:04:05+0000", "git": {"commit": COMMIT, "dirty": False},
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(about))
    if rungs:
        (folder / "halving.json").write_text(json.dumps(list(rungs)))
    return folder


def _run(path: Path, changes: Mapping[str, Any], entry: Mapping[str, float] | str, commit: str, seed: int) -> None:
    """One run of a study: finished with these metrics, or failed, cut or missing."""
    if entry == "missing":
        return
    finished, finals = not isinstance(entry, str), {} if isinstance(entry, str) else entry
    git = {"commit": commit, "dirty": False}
    end = finals["validation/loss"] if "validation/loss" in finals else 2.0
    curve = decay(4.0, end if math.isfinite(end) else 2.0)
    workdir(path, changes=changes, finals=finals, curve=curve if finished else curve[:4], history=[session(git=git)], finished=finished)
    code, error = {"failed": (1, "FloatingPointError: the loss is nan"), "cut": (75, None)}[entry] if isinstance(entry, str) else (0, None)
    attempt = {"start": 1.7e9, "end": 1.7e9 + 60, "exit_code": code, "error": error, "git": git, "host": "here", "pid": 1}
    (path / "run.json").write_text(json.dumps({"identity": "x", "attempts": [attempt] * (2 if code == 1 else 1)}))


def entries(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Final metrics of an arm's runs, (accuracy, loss) of each seed."""
    return [{"validation/accuracy": accuracy, "validation/loss": loss} for accuracy, loss in pairs]


CLEAR = {
    "one": entries((0.80, 2.00), (0.82, 2.02), (0.81, 2.01)),
    "two": entries((0.70, 2.50), (0.725, 2.51), (0.71, 2.525)),
    "three": entries((0.80, 2.05), (0.81, 2.00), (0.83, 1.99)),
}


def ordering(better: str, worse: str, metric: str = ACCURACY, relation: str = ">") -> dict[str, str]:
    """A claim as study.json has it."""
    return {"better": better, "worse": worse, "metric": metric, "relation": relation, "source": "table 1"}


def nasty_run(folder: Path) -> Path:
    """A run whose folder, data, metrics, versions, parameters and answers are hostile."""
    told = session(versions={"ptm": NASTY, NASTY: "1"}, changes={NASTY: [NASTY, NASTY]}, git={"commit": NASTY, "dirty": True})
    answers = [{"id": NASTY, "text": NASTY, NASTY: [NASTY, {NASTY: NASTY}]}, {"id": "<script>alert(3)</script>", "prediction": "javascript:alert(4)"}]
    made = workdir(
        folder / "<img src=x onerror=alert(5)>", changes={"data.source": [f"text:{NASTY}"]}, finals={"validation/loss": 1.0, f"validation/{NASTY}": 2.0},
        curve=[(10, 4.0), (100, 1.0)], history=[told, told], data=NASTY, answers=answers,
    )  # fmt: skip
    parameters = (made / "params.txt").read_text()
    (made / "params.txt").write_text(parameters.replace("embed mlp", NASTY).replace("norm/scale", NASTY))
    return made


def nasty(folder: Path) -> Path:
    """A study whose every name is hostile."""
    metrics = [{**BOTH[0], "label": NASTY}, BOTH[1]]
    values = {NASTY: CLEAR["one"], f"{NASTY} two": [*CLEAR["two"][:2], "failed"]}
    return study(folder, values=values, metrics=metrics, claim=NASTY, orderings=[ordering(NASTY, f"{NASTY} two")])
