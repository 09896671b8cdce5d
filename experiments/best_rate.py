"""The best learning rate of each width from the study of experiments/mup.py, and how far it moves from the narrowest to the widest.

    python experiments/best_rate.py runs/mup      # prints them; where matplotlib is there, best_rate.png of the folder shows losses over rates

Through the mean loss of the best rate and those of its two neighbours on the grid, over the logarithm of the rate, goes one parabola; its lowest point is the best rate. Where
the best of the grid is its first or last rate, that one is told and marked: the lowest point lies there or beyond. Intervals: the seeds are drawn again, with replacement, 2,000
times, the same ones for all rates, since runs of one seed have their data in common; told are the middle 95 %. Of three seeds they are rough.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ptm import recipe
from ptm.analysis import pictures
from ptm.fields import ConfigError
from ptm.study import folder

METRIC = "validation/loss"
DRAWS = 2000


class Best(NamedTuple):
    """Logarithm to base 2 of the best rate, its interval, the loss there, and whether the grid ends there."""

    power: float
    low: float
    high: float
    loss: float
    edge: bool


def lowest(powers: Sequence[float], losses: Sequence[float]) -> tuple[float, float, bool]:
    """(power, loss, whether it is the first or last power) of the lowest point."""
    n = int(np.argmin(losses))
    if n in (0, len(powers) - 1):
        return float(powers[n]), float(losses[n]), True
    curve = np.polyfit(powers[n - 1 : n + 2], losses[n - 1 : n + 2], 2)
    at = -curve[1] / (2 * curve[0]) if curve[0] > 0 else float(powers[n])
    return float(at), float(np.polyval(curve, at)), False


def best(powers: Sequence[float], losses_RS: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Best:
    """The best of a grid of rates, ascending, by losses [rates, seeds]."""
    rng = np.random.default_rng(seed)
    power, loss, edge = lowest(powers, losses_RS.mean(axis=1))
    drawn = [lowest(powers, losses_RS[:, rng.integers(losses_RS.shape[1], size=losses_RS.shape[1])].mean(axis=1))[0] for _ in range(draws)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Best(power, float(low), float(high), loss, edge)


Grids = Mapping[tuple[str, int], tuple[list[float], np.ndarray]]


def read(workdir: str) -> Grids:
    """(parametrisation, width) -> powers of the rates that all seeds have finished, ascending, and their losses [rates, seeds]."""
    record = folder.read(workdir)
    points = recipe.call(f"{record.file}:{record.argument}", function="get_points", what="study")
    found: dict[tuple[str, int], list[tuple[float, list[float]]]] = {}
    for arm in record.arms:
        runs, point = [stages["pretrain"] for stages in arm.runs.values()], points[arm.name]
        if all(folder.state(workdir, run).name == folder.FINISHED for run in runs):
            for parametrisation in point.parametrisations:
                losses = [folder.final_metrics(workdir, run)[METRIC] for run in runs]
                found.setdefault((parametrisation, point.width), []).append((float(np.log2(point.rate)), losses))
    return {key: ([power for power, _ in sorted(rows)], np.array([losses for _, losses in sorted(rows)])) for key, rows in found.items()}


def draw(path: Path, grids: Grids) -> None:
    """Mean losses over rates, a line for each width, a panel for each parametrisation."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (parametrisation, width), (powers, losses_RS) in sorted(grids.items()):
        panels.setdefault(parametrisation, {})[f"width {width}"] = [(2.0**power, float(loss)) for power, loss in zip(powers, losses_RS.mean(axis=1))]
    pictures.log_log(path, panels, x="learning rate", y="validation loss", title="losses over rates")


def main(workdir: str) -> None:
    """Prints the best rates of a study and how far they move, and draws the grids."""
    grids = read(workdir)
    if not grids:
        raise ConfigError(f"{workdir} has no rate whose runs are all finished.")
    found = {key: best(*grid) for key, grid in sorted(grids.items())}
    print(f"{'parametrisation':<16} width  best rate                  loss   losses at powers of two")
    for (parametrisation, width), at in found.items():
        powers, losses_RS = grids[parametrisation, width]
        shown = "  ".join(f"{power:g}: {loss:.3f}" for power, loss in zip(powers, losses_RS.mean(axis=1)))
        print(f"{parametrisation:<16} {width:>5}  2^{at.power:.2f} ({at.low:.2f} to {at.high:.2f}){' edge' if at.edge else '     '} {at.loss:.3f}  {shown}")
    for parametrisation in dict.fromkeys(name for name, _ in found):
        widths = sorted(width for name, width in found if name == parametrisation)
        first, last = found[parametrisation, widths[0]], found[parametrisation, widths[-1]]
        marked = ", at an edge of the grid: at least that far" if last.edge else ""
        print(f"{parametrisation}: from width {widths[0]} to {widths[-1]} the best rate moves by a factor of 2^{last.power - first.power:+.2f}{marked}")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(Path(workdir) / "best_rate.png", grids)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of a study: python experiments/best_rate.py DIR")
    try:
        main(sys.argv[1])
    except ConfigError as error:
        sys.exit(f"best_rate: {error}")
