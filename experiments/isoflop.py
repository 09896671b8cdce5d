"""The exponents of a scaling law from the study of experiments/scaling.py (Hoffmann et al. 2022, section 3.2, approach 2).

    python experiments/isoflop.py runs/scaling

Of each budget C a parabola is laid through the losses over log N; its lowest point is N_opt, and the tokens that the budget allows there are D_opt. The exponents of
N_opt ~ C^a and D_opt ~ C^b are slopes of straight lines through the logarithms. Intervals: the runs of each size are drawn again, with replacement, 2,000 times, and the
middle 95 % of the slopes are told (Efron 1979); draws in which fewer than two budgets have a lowest point have none, and are counted. A budget whose parabola has its lowest
point outside the sizes that were run is left out, and named. A run that ended without a finite loss is none.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ptm import recipe
from ptm.fields import ConfigError
from ptm.study import folder

METRIC = "validation/loss"
DRAWS = 2000


class Runs(NamedTuple):
    """Runs of one size at one budget."""

    flops: float
    parameters: float
    tokens: float
    losses: Sequence[float]


class Fit(NamedTuple):
    """Exponents a and b with their intervals, N_opt, D_opt and the loss there of each budget (those left out are missing), and the draws that the intervals are of."""

    a: tuple[float, float, float]
    b: tuple[float, float, float]
    valleys: dict[float, tuple[float, float, float]]
    draws: int


def valley(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float] | None:
    """(N_opt, D_opt, loss) of one budget; None where the parabola has no lowest point between the sizes."""
    x = np.log(parameters)
    curve = np.polyfit(x, losses, 2)
    at = -curve[1] / (2 * curve[0]) if curve[0] > 0 else np.inf
    if not x.min() <= at <= x.max():
        return None
    return float(np.exp(at)), float(np.exp(np.polyval(np.polyfit(x, np.log(tokens), 1), at))), float(np.polyval(curve, at))


def exponents(valleys: Mapping[float, tuple[float, float, float]]) -> tuple[float, float]:
    """Slopes of log N_opt and log D_opt over log C."""
    budgets = np.log(list(valleys))
    return tuple(float(np.polyfit(budgets, np.log([found[n] for found in valleys.values()]), 1)[0]) for n in (0, 1))


def fit(runs: Sequence[Runs], *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """The law of some runs, with bootstrap intervals. Raises ConfigError where fewer than two budgets have a valley, or no size has a second run to draw."""
    if max((len(entry.losses) for entry in runs), default=0) < 2:
        raise ConfigError("no size was run under two seeds, so that there is nothing to draw intervals from; wait for more runs.")
    budgets = {flops: [entry for entry in runs if entry.flops == flops] for flops in sorted({entry.flops for entry in runs})}

    def law(pick) -> dict[float, tuple[float, float, float]]:
        found = {
            flops: valley([entry.parameters for entry in rows], [entry.tokens for entry in rows], [pick(entry.losses) for entry in rows])
            for flops, rows in budgets.items() if len(rows) >= 3
        }  # fmt: skip
        return {flops: at for flops, at in found.items() if at is not None}

    valleys = law(np.mean)
    if len(valleys) < 2:
        raise ConfigError(
            f"{len(valleys)} of {len(budgets)} budgets have their lowest loss between the sizes that were run; at least two are needed for exponents."
        )
    a, b = exponents(valleys)
    rng = np.random.default_rng(seed)
    drawn = [law(lambda losses: np.mean(rng.choice(losses, len(losses)))) for _ in range(draws)]
    slopes = np.array([exponents(found) for found in drawn if len(found) >= 2]).reshape(-1, 2)
    low, high = np.percentile(slopes, (2.5, 97.5), axis=0) if len(slopes) else np.full((2, 2), np.nan)
    return Fit((a, float(low[0]), float(high[0])), (b, float(low[1]), float(high[1])), valleys, len(slopes))


def read(workdir: str) -> list[Runs]:
    """The finished runs of a study's folder, by size."""
    record = folder.read(workdir)
    points = recipe.call(f"{record.file}:{record.argument}", function="get_points", what="study")
    found = []
    for arm in record.arms:
        runs = [stages["pretrain"] for stages in arm.runs.values()]
        finals = [folder.final_metrics(workdir, run) for run in runs if folder.state(workdir, run).name == folder.FINISHED]
        losses = [values[METRIC] for values in finals if METRIC in values and np.isfinite(values[METRIC])]
        if arm.name not in points:
            raise ConfigError(
                f"{record.file} has no arm '{arm.name}' any more, which {workdir} has; check out the version that made it ({record.git['commit'][:12] if record.git else 'unknown'})."
            )
        point = points[arm.name]
        if losses:
            found.append(Runs(point.flops, point.parameters, point.tokens, losses))
    return found


def main(workdir: str) -> None:
    """Prints the valleys and the exponents of a study."""
    runs = read(workdir)
    law = fit(runs)
    print("     FLOPs      N_opt      D_opt  tokens/N   loss   sizes")
    for flops in sorted({entry.flops for entry in runs}):
        sizes = sum(entry.flops == flops for entry in runs)
        if flops in law.valleys:
            n, d, loss = law.valleys[flops]
            print(f"{flops:10.3g} {n:10.3g} {d:10.3g} {d / n:9.1f} {loss:6.3f} {sizes:7}")
        else:
            print(f"{flops:10.3g}  no lowest point between its {sizes} sizes: left out")
    for name, published, (value, low, high) in (("N_opt ~ C^a", 0.49, law.a), ("D_opt ~ C^b", 0.51, law.b)):
        verdict = "holds" if low <= published <= high else "does not hold"
        print(f"{name}: {value:.2f}, 95 % of {law.draws} draws {low:.2f} to {high:.2f}; the interval {verdict} the published {published}")
    if law.draws < DRAWS:
        print(f"{DRAWS - law.draws} of {DRAWS} draws gave no exponents: fewer than two budgets had a lowest point in them. The intervals are too narrow.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of a study: python experiments/isoflop.py DIR")
    try:
        main(sys.argv[1])
    except ConfigError as error:
        sys.exit(f"isoflop: {error}")
