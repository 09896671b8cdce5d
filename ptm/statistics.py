"""Statistics of few runs and of many examples: means with intervals, paired comparisons, corrections for several of them. All intervals are of 95 %."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE, ALPHA = 0.95, 0.05
Z = 1.959964  # of the normal distribution: 95 % lie within +- Z deviations
ROUNDING = 1e-9  # of the largest difference: a spread below it is that of sums, as of one answer more among 100,000, not of runs


@dataclasses.dataclass(frozen=True)
class Summary:
    """`n` values: their mean, standard deviation (n - 1), and the interval of the mean (Student's t); of one value alone both are None."""

    n: int
    mean: float
    sd: float | None = None
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What paired differences say: their summary, and the two-sided p of a paired t-test, or None and `why` there is none."""

    difference: Summary
    p: float | None
    why: str = ""


def _half(n: int, sd: float, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / n**0.5


def summary(values: Sequence[float]) -> Summary:
    """The summary of independent finite values, at least one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Summary(1, mean)
    sd = statistics.stdev(values)
    half = _half(len(values), sd, CONFIDENCE)
    return Summary(len(values), mean, sd, (mean - half, mean + half))


def _spread(differences: Sequence[float]) -> float:
    """Standard deviation of differences, 0 where they are equal but for rounding."""
    sd = statistics.stdev(differences)
    return sd if sd > ROUNDING * max(map(abs, differences)) else 0.0


def paired(differences: Sequence[float]) -> Comparison | None:
    """Whether the mean of paired differences is 0 (Student 1908); None without differences.

    One difference has no spread, and equal ones that are not 0 have none to judge by: these are not tested. Differences that are all 0 have p = 1.
    """
    if not differences:
        return None
    found = summary(differences)
    if found.n == 1:
        return Comparison(found, None, "one pair has no spread to judge by")
    sd = _spread(differences)
    if sd == 0.0:
        same = not any(differences)
        return Comparison(found, 1.0 if same else None, "" if same else f"the {found.n} differences are equal, so there is no spread to judge by")
    t = found.mean / (sd / found.n**0.5)
    return Comparison(found, float(2 * stats.t.sf(abs(t), found.n - 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for being several, in their order: below ALPHA in a share of at most ALPHA of families without any difference (Holm 1979)."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, n in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[n]))
        corrected[n] = largest
    return corrected


def equivalence_margin(differences: Sequence[float]) -> float | None:
    """The smallest margin m for which two one-sided t-tests at ALPHA show the mean difference to lie within +-m (Schuirmann 1987).

    None of fewer than two differences. To claim equivalence, a margin must have been chosen before; this is what could have been shown.
    """
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    return abs(mean) + _half(len(differences), _spread(differences), 1 - 2 * ALPHA)


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Interval of a share of `count` independent cases (Wilson 1927); (0, 1) of none."""
    if not count:
        return 0.0, 1.0
    share, slack = hits / count, Z**2 / count
    middle = (share + slack / 2) / (1 + slack)
    half = Z / (1 + slack) * (share * (1 - share) / count + slack / (4 * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Percentile interval of the mean of independent values (Efron 1979); (nan, nan) of none."""
    values = np.asarray(values, np.float64)
    if not values.size:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(values.size, size=values.size)].mean() for _ in range(draws)]
    return float(np.quantile(means, ALPHA / 2)), float(np.quantile(means, 1 - ALPHA / 2))
