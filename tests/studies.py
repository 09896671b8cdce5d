"""A study of seconds for the tests: two arms, two stages, two seeds, on the recipes of tests/runs.py. Words: halving, search."""

from pathlib import Path

from ptm import recipe
from ptm.study import Arm, Halving, Metric, Ordering, Search, Stage, Study, log_uniform

RUNS = f"{Path(__file__).resolve().parent}/runs.py"
LOSS = "pretrain:validation/loss"


def get_study(argument: str = "") -> Study:
    """The study, or one with a rung or with a search in its place."""
    words = recipe.words(argument, recipes=("plain", "halving", "search"), scales=("full", "small", "tiny")).recipe
    short = {"evals.validation.every": 3, "checkpoint.every": 4}
    return Study(
        claim="Nothing; it is a test.",
        paper="none",
        stages=(
            Stage("pretrain", recipe=f"{RUNS}:concat", overrides={**short, "train.steps": 12}),
            Stage("tune", recipe=f"{RUNS}:window", after="pretrain", overrides={**short, "train.steps": 6}),
        )[: 1 if words == "search" else 2],
        arms=(Arm("low"), *([Arm("high", {"optimizer.learning_rate": 0.3})] if words != "search" else [])),
        base="low",
        differs=("optimizer.*",),
        seeds=(0, 1) if words != "search" else (0,),
        metrics=(Metric(LOSS, higher=False),),
        orderings=(Ordering(better="low", worse="high", metric=LOSS),) if words != "search" else (),
        halving=Halving(metric=LOSS, rungs=(6,), keep=0.4) if words == "halving" else None,
        search=Search(space={"optimizer.learning_rate": log_uniform(1e-3, 1e-1)}, trials=2, metric=LOSS) if words == "search" else None,
    )
