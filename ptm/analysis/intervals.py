"""Confidence intervals of 95 %."""

from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of the normal distribution: 95 % lie within +- Z deviations


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
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(values.size, size=values.size)].mean() for _ in range(draws)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
