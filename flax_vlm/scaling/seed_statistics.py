# SPDX-License-Identifier: Apache-2.0
"""Means over seeds with t-intervals, and paired differences between arms of an experiment.

Student, "The Probable Error of a Mean" (1908). The intervals hold for values that are normal over
seeds; they speak of other seeds of the same experiment, not of other data or other models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds the truth with a given probability.

    Attributes:
        mean: of the values.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Returns whether all of the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Returns the mean of independent values and its two-sided t-interval.

    mean +- t((1 + confidence) / 2; n - 1) s / sqrt(n), s^2 = sum (x - mean)^2 / (n - 1)

    Args:
        values: [n], one per seed, n >= 2.
        confidence: in (0, 1).

    Raises:
        ValueError: for fewer than two values: one has no spread.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"an interval needs a list of at least two values, got shape {x.shape}")
    mean = float(x.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Returns the mean of values - baseline, seed by seed, and its t-interval.

    What a seed does to both arms alike (initialisation, order of the data) drops out. The interval
    leaves zero out exactly if the paired t-test rejects at 1 - confidence.

    Args:
        values: [n], one per seed.
        baseline: [n], of the same seeds in the same order.
        confidence: in (0, 1).

    Raises:
        ValueError: if the lengths differ or n < 2.
    """
    a, b = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"both arms need the same seeds, got {a.shape} and {b.shape} values")
    return mean_interval(a - b, confidence)
