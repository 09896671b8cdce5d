"""Learning rates across widths (Yang et al. 2022, figure 1): decoders of several widths, each at a grid of rates, in the standard and in the maximal update parametrisation.

    ptm study experiments/mup.py:tiny --workdir=runs/mup
    python experiments/best_rate.py runs/mup      # the best rate of each width, how far it moves, and a picture

The narrowest width is the base, where both parametrisations are the same run. Claimed of the rate that is best there, for the widest model: under muP it is better than a
fourth and than four times of it; in the standard parametrisation it is too high, worse than a fourth of it and worse than under muP. Heads keep their size.
Spread of initial values: 1 / sqrt(width) in the standard arms; under muP that of the base, which the parametrisation lowers in the kernels of wider layers.

Scales: `full` takes widths of 256 to 2,048 of the 24 layers of configs/scale.py:gpt_1b for 10,000 steps, `small` 64 to 512 and `tiny` 32 and 256 of 2 layers on bytes of the texts
of $PTM_DATA, without dropout, for 2,000 and 300 steps of 1,024 and 512 bytes. Rates are powers of two. The one that the claims of `tiny` begin from, 2^-6, is the best of
a grid at a width of 32 there (three seeds; 2^-7 is hardly worse), run before any grid of a width of 256. Those of `full` and `small` are guesses: where the best of the
narrowest width is another, read the fit, not the claims. After 300 steps a model of bytes hardly knows its words: what is seen is how rates act early in training.
"""

from typing import Any, NamedTuple

from ptm import recipe
from ptm.study import Arm, Metric, Ordering, Stage, Study

METRIC = "pretrain:validation/loss"
MUP, STANDARD = "muP", "standard"
BYTES = {"tokenizer.kind": "bytes", "tokenizer.lowercase": False, "train.batch_size": 8, "evals.validation.batches": 100}


class Scale(NamedTuple):
    """Widths from the base on, width of a head, logarithms to base 2 of the rates and of the one that the claims begin from, steps, other overrides."""

    widths: tuple[int, ...]
    head: int
    rates: range
    centre: int
    steps: int
    overrides: dict[str, Any]


SCALES = {
    "full": Scale((256, 512, 1024, 2048), 128, range(-13, -5), -9, 10_000, {}),
    "small": Scale((64, 128, 256, 512), 16, range(-11, -3), -7, 2000, {"model.num_layers": 2, **BYTES}),
    "tiny": Scale((32, 256), 16, range(-9, -3), -6, 300, BYTES),
}


class Point(NamedTuple):
    """An arm: parametrisations that it is of, width, rate, and the overrides that make it."""

    parametrisations: tuple[str, ...]
    width: int
    rate: float
    overrides: dict[str, Any]


def _scale(argument: str) -> str:
    return recipe.words(argument, recipes=("mup",), scales=tuple(SCALES)).scale or "full"


def _name(parametrisation: str, width: int, power: int, scale: Scale) -> str:
    return f"{'both' if width == scale.widths[0] else parametrisation}, {width}, 2^{power}"


def get_points(argument: str = "") -> dict[str, Point]:
    """The arms of the study by name; for the fit."""
    scale = SCALES[_scale(argument)]
    found: dict[str, Point] = {}
    for width in scale.widths:
        base = width == scale.widths[0]
        for parametrisation in (MUP,) if base else (MUP, STANDARD):
            for power in scale.rates:
                found[_name(parametrisation, width, power, scale)] = Point((MUP, STANDARD) if base else (parametrisation,), width, 2.0**power, {
                    "model.width": width, "model.num_heads": width // scale.head, "optimizer.learning_rate": 2.0**power,
                    "model.init_std": round((scale.widths[0] if parametrisation == MUP else width) ** -0.5, 4),
                    "mup.base_width": scale.widths[0] if parametrisation == MUP else None,
                })  # fmt: skip
    return found


def get_study(argument: str = "") -> Study:
    """The study at `full` (default), `small` or `tiny`."""
    name = _scale(argument)
    scale = SCALES[name]
    narrow, wide, centre = scale.widths[0], scale.widths[-1], scale.centre

    def better(first: tuple[str, int, int], second: tuple[str, int, int]) -> Ordering:
        return Ordering(better=_name(*first, scale), worse=_name(*second, scale), metric=METRIC, source="figure 1")

    return Study(
        claim="Under the maximal update parametrisation the best learning rate of a narrow model is that of a wide one; in the standard one it is not.",
        paper="Yang et al. 2022, figure 1",
        stages=(
            Stage("pretrain", recipe=f"experiments/recipes.py:gpt,documents,{name}", overrides={
                **scale.overrides, "train.steps": scale.steps, "schedule.warmup_steps": scale.steps // 10, "evals.validation.every": scale.steps,
                "checkpoint.every": scale.steps,
            }),
        ),
        arms=[Arm(name, point.overrides) for name, point in get_points(argument).items()],
        base=_name(MUP, narrow, centre, scale),
        differs=("model.width", "model.num_heads", "model.init_std", "optimizer.learning_rate", "mup.base_width"),
        seeds=(0, 1, 2, 3) if name == "tiny" else (0, 1, 2),
        metrics=(Metric(METRIC, higher=False, label="loss on held out text, nats a token"),),
        orderings=[
            better((MUP, wide, centre), (MUP, wide, centre - 2)),
            better((MUP, wide, centre), (MUP, wide, centre + 2)),
            better((STANDARD, wide, centre - 2), (STANDARD, wide, centre)),
            better((MUP, wide, centre), (STANDARD, wide, centre)),
        ],
    )  # fmt: skip
