# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from scipy import stats

from flax_vlm.scaling.seed_statistics import mean_interval, paired_difference

A = np.array([0.71, 0.69, 0.74, 0.70, 0.735])
B = np.array([0.68, 0.67, 0.70, 0.69, 0.705])


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize("count", [2, 5])
def test_the_interval_is_that_of_scipy(count, confidence):
    found = mean_interval(A[:count], confidence)
    expected = stats.t.interval(confidence, count - 1, A[:count].mean(), stats.sem(A[:count]))
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx(A[:count].mean(), rel=1e-12)


def test_the_paired_interval_is_that_of_the_paired_t_test():
    found = paired_difference(A, B)
    expected = stats.ttest_rel(A, B).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx((A - B).mean(), rel=1e-12)
    unpaired = stats.ttest_ind(A, B).confidence_interval(0.95)
    assert found.high - found.low < 0.7 * (unpaired.high - unpaired.low)


def test_the_paired_interval_leaves_zero_out_exactly_where_the_test_rejects():
    rng = np.random.default_rng(0)
    excluded = []
    for _ in range(200):
        a, b = rng.normal(size=(2, 5))
        b = b + 1.0
        excluded.append(paired_difference(a, b).excludes_zero())
        assert excluded[-1] == (stats.ttest_rel(a, b).pvalue < 0.05)
    assert 20 < sum(excluded) < 180


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(3.0, 2.0, (4000, 5))
    intervals = [mean_interval(x) for x in draws]
    covered = np.mean([i.low <= 3.0 <= i.high for i in intervals])
    assert abs(covered - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.parametrize("values", [[], [0.7], [[0.7, 0.6]]])
def test_what_has_no_spread_gets_no_interval(values):
    with pytest.raises(ValueError, match="at least two values"):
        mean_interval(values)


def test_arms_of_different_seeds_are_not_paired():
    with pytest.raises(ValueError, match=r"the same seeds, got \(5,\) and \(4,\)"):
        paired_difference(A, B[:4])
