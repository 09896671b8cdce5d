"""Statistics by independent formulas: summaries, paired tests, Holm's correction, margins of equivalence."""

import random

import numpy as np
import pytest
from scipy import stats

from ptm import statistics


@pytest.mark.parametrize("n", [2, 3, 7])
def test_summaries_and_paired_tests_agree_with_scipy(n):
    rng = np.random.default_rng(n)
    first, second = rng.normal(3, 1, n), rng.normal(2, 1, n)
    found = statistics.summary(first.tolist())
    assert (found.n, found.mean, found.sd) == (n, pytest.approx(first.mean()), pytest.approx(first.std(ddof=1)))
    assert found.interval == pytest.approx(stats.t.interval(0.95, n - 1, loc=first.mean(), scale=stats.sem(first)))
    tested, theirs = statistics.paired((first - second).tolist()), stats.ttest_rel(first, second)
    assert tested.p == pytest.approx(theirs.pvalue) and tested.difference.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_what_cannot_be_tested_is_not():
    assert statistics.paired([]) is None
    assert statistics.paired([0.5]).p is None and "one pair" in statistics.paired([0.5]).why
    assert statistics.paired([0.0, 0.0, 0.0]).p == 1.0
    equal = statistics.paired([0.3 - 0.2, 0.4 - 0.3, 0.9 - 0.8])  # 0.1 but for rounding
    assert equal.p is None and "no spread" in equal.why and equal.difference.sd < 1e-15
    one_more = [100 * ((right + 1) / 9815) - 100 * (right / 9815) for right in (8024, 8061, 8125)]  # accuracies in per cent
    assert len(set(one_more)) > 1 and statistics.paired(one_more).p is None, "one right answer more under each seed has no spread but that of rounding"


def test_holm():
    """The worked example p = .01, .04, .03, .005; then the definition, the largest of (m - j + 1) p_(j) over the ranks up to one's own."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == [] and statistics.holm([0.7, 0.6]) == [1.0, 1.0]
    rng = random.Random(0)
    for m in (1, 2, 5):
        ps = [rng.random() ** 3 for _ in range(m)]
        ordered = sorted(ps)
        expected = [max(min(1.0, (m - j) * ordered[j]) for j in range(ordered.index(p) + 1)) for p in ps]
        assert statistics.holm(ps) == pytest.approx(expected)


def test_equivalence_margin():
    """At the margin the worse of two one-sided t-tests is just at 5 %."""
    values = [0.1, -0.05, 0.2, 0.02]
    margin = statistics.equivalence_margin(values)
    ps = [stats.ttest_1samp(values, -margin, alternative="greater").pvalue, stats.ttest_1samp(values, margin, alternative="less").pvalue]
    assert max(ps) == pytest.approx(0.05) and statistics.equivalence_margin([1.0]) is None
