"""A small scaling law (Hoffmann et al. 2022, section 3.2): for each budget of compute decoders of several sizes, each trained for as long as the budget lasts.

    ptm study experiments/scaling.py:tiny --workdir=runs/scaling
    python experiments/isoflop.py runs/scaling      # parabolas, exponents and their bootstrap intervals

The loss at one budget, over the logarithm of the size, is a valley; its floor moves with the budget as N_opt ~ C^a, D_opt ~ C^b. Published: a = 0.49, b = 0.51 (approach 2),
about 20 tokens a parameter. Claimed here: a size in the middle is better than the smallest and the largest of its budget. N counts the parameters of the
layers, C the FLOPs of forward and backward pass, three times those of the forward pass by the model's own formula, the logits' too. The schedule is a cosine as
long as the run. Rates: `full` 2e-4 for all sizes, `small` and `tiny` 3e-3 below a width of 128 and in inverse proportion to the width above.

Scales: `full` has the paper's nine budgets of 6e18 to 3e21 FLOPs on $PTM_CORPUS, sizes of a quarter to four times the one that the published law expects. `small` (1e13 to
3e14) and `tiny` (3e11 to 2.4e12, half a minute to four an arm of one core) have four budgets and read bytes of the texts of $PTM_DATA, up to five times. There, small
models of bytes are not large ones of words: the exponents are those of this text, and their intervals, of three seeds, are wide.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ptm import recipe, registry
from ptm.study import Arm, Metric, Ordering, Stage, Study

RECIPES = Path(__file__).resolve().parent / "recipes.py"
BUDGETS = {
    "full": (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21), "small": (1e13, 3e13, 1e14, 3e14), "tiny": (3e11, 6e11, 1.2e12, 2.4e12),
}  # fmt: skip
SIZES = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # times the size that the published law expects
TOKENS = 20  # a parameter
# Width of a layer by the number of layers, what widths are multiples of, width of a head.
SHAPES = {"full": (96, 128, 128), "small": (32, 16, 16), "tiny": (24, 8, 8)}
BYTES = {"tokenizer.kind": "bytes", "tokenizer.lowercase": False, "train.batch_size": 8}


class Point(NamedTuple):
    """An arm: its budget, parameters of the layers, tokens, and the overrides that make it."""

    flops: float
    parameters: int
    tokens: int
    overrides: dict[str, Any]


def get_points(argument: str = "") -> dict[str, Point]:
    """The arms of the study by name; for the fit."""
    scale = recipe.words(argument, recipes=("isoflop",), scales=tuple(BUDGETS)).scale or "full"
    made = registry.resolve(recipe.load(f"{RECIPES}:gpt,documents,{scale}"))
    rows, length = made.train.batch_size if scale == "full" else BYTES["train.batch_size"], made.data.length
    found: dict[str, Point] = {}
    for flops in BUDGETS[scale]:
        for size in SIZES:
            layers, width, heads = _shape(size * (flops / 6 / TOKENS) ** 0.5, scale)
            vocabulary = made.model.vocab_size or 256
            model = dataclasses.replace(made.model, num_layers=layers, width=width, num_heads=heads, vocab_size=vocabulary)
            steps = max(20, round(flops / (3 * rows * model.forward_flops({"L": length}, length))))
            rate = made.optimizer.learning_rate if scale == "full" else 3e-3 * min(1.0, 128 / width)
            found[f"{flops:.2g} FLOPs, {layers} x {width}"] = Point(flops, 12 * layers * width**2, steps * rows * length, {
                "model.num_layers": layers, "model.width": width, "model.num_heads": heads, "train.steps": steps, "schedule.warmup_steps": steps // 20,
                "optimizer.learning_rate": rate, "evals.validation.every": steps, "checkpoint.every": max(1, steps // 4),
            })  # fmt: skip
    return found


def _shape(parameters: float, scale: str) -> tuple[int, int, int]:
    """Layers, width and heads of about so many parameters."""
    ratio, multiple, head = SHAPES[scale]
    width = max(multiple, round((parameters * ratio / 12) ** (1 / 3) / multiple) * multiple)
    return max(1, round(parameters / 12 / width**2)), width, width // head


def get_study(argument: str = "") -> Study:
    """The study at `full` (default), `small` or `tiny`."""
    scale = recipe.words(argument, recipes=("isoflop",), scales=tuple(BUDGETS)).scale or "full"
    points = get_points(argument)
    loss = Metric("pretrain:validation/loss", higher=False, label="loss on held out text, nats a token")
    budgets = {flops: [name for name, point in points.items() if point.flops == flops] for flops in BUDGETS[scale]}
    return Study(
        claim="At a given compute a model that is neither too small nor too short of tokens is best, and its size grows as about the square root of the compute.",
        paper="Hoffmann et al. 2022, section 3.2",
        stages=(Stage("pretrain", recipe=f"experiments/recipes.py:gpt,documents,{scale}", overrides={} if scale == "full" else BYTES),),
        arms=[Arm(name, point.overrides) for name, point in points.items()],
        base=budgets[BUDGETS[scale][0]][len(SIZES) // 2],
        differs=("model.num_layers", "model.width", "model.num_heads", "train.steps", "schedule.warmup_steps", "optimizer.learning_rate", "evals.validation.every", "checkpoint.every"),
        seeds=(0, 1, 2),
        metrics=(loss,),
        orderings=[
            Ordering(better=names[len(SIZES) // 2], worse=worse, metric=loss.name, source="figure 3") for names in budgets.values() for worse in (names[0], names[-1])
        ],
    )
