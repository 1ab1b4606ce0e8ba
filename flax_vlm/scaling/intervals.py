# SPDX-License-Identifier: Apache-2.0
"""How sure a fit is: covariance, bootstrap, leave-one-out, and coverage on synthetic data.

    Jacobian: internal value +- t((1 + confidence) / 2; n - k) sqrt(s^2 (J^T J)^-1),
              s^2 = sum r^2 / (n - k)
    bootstrap: percentiles over fits to points drawn with replacement (Efron 1979)

Nezhurina et al. 2025 (arXiv:2506.04598) multiply their standard error by the logarithm of the t
value, which makes a band about three times too narrow; that is not reproduced here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

from flax_vlm.build import lookup
from flax_vlm.scaling.laws import LAWS, Law
from flax_vlm.scaling.solver import Problem, solve_many

# A 95 % interval of a positive parameter that spans more than this factor, or of an exponent that
# is wider than this on either side, says nothing: the parameter is not identifiable.
LARGEST_FACTOR = 100.0
LARGEST_EXPONENT_ERROR = 1.0


def covariance(problem: Problem, internal: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the covariance of internal values [..., k, k] of a least-squares fit.

    Directions that the data say nothing of have a huge variance, not an infinite one.

    Args:
        problem: with delta None.
        internal: [..., k] at the minimum.
        y: [..., n].
    """
    residual, jacobian = problem.residuals(internal, y)
    n, k = jacobian.shape[-2:]
    variance = (residual**2).sum(-1) / (n - k)
    matrix = jacobian.swapaxes(-1, -2) @ jacobian
    scale = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
    scale = np.maximum(scale, 1e-12 * scale.max(-1, keepdims=True))
    values, vectors = np.linalg.eigh(matrix / (scale[..., :, None] * scale[..., None, :]))
    inverse = (vectors / np.maximum(values, 1e-14)[..., None, :]) @ vectors.swapaxes(-1, -2)
    return variance[..., None, None] * inverse / (scale[..., :, None] * scale[..., None, :])


def t_interval(
    problem: Problem, internal: np.ndarray, y: np.ndarray, confidence: float = 0.95
) -> np.ndarray:
    """Returns low and high ends of internal values, [..., 2, k], from the Jacobian."""
    n, k = y.shape[-1], internal.shape[-1]
    variance = np.diagonal(covariance(problem, internal, y), axis1=-2, axis2=-1)
    half = stats.t.ppf((1 + confidence) / 2, n - k) * np.sqrt(variance)
    return np.stack([internal - half, internal + half], axis=-2)


def bootstrap(
    problem: Problem, internal: np.ndarray, y: np.ndarray, draws: int, seed: int
) -> np.ndarray:
    """Returns internal values [draws, k] of fits to points drawn with replacement.

    Args:
        problem: what was minimised.
        internal: [k], the fit to all points.
        y: [n].
        draws: how many.
        seed: of the draws.
    """
    n = len(y)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    data = np.broadcast_to(y, (draws, n))
    return solve_many(problem, data, counts.astype(np.float64), internal)


def leave_one_out(problem: Problem, internal: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns [n]: each point minus what a fit to the others says of it, in units of y."""
    n = len(y)
    data = np.broadcast_to(y, (n, n))
    fits = solve_many(problem, data, 1.0 - np.eye(n), internal)
    return y - np.diagonal(problem.law.evaluate(fits, problem.x)[0])


def identifiable(
    problem: Problem, internal: np.ndarray, y: np.ndarray, intervals: np.ndarray
) -> dict[str, bool]:
    """Returns {parameter: is its interval narrow enough to mean anything?}.

    A floor or an offset that the descent drove to its least value is not identifiable either: zero
    fits as well.

    Args:
        problem: what was minimised.
        internal: [k] at the minimum.
        y: [n].
        intervals: [2, k], low and high ends of internal values.
    """
    law, least = problem.law, problem.bounds(y)[0]
    exponent = np.array([name in law.exponents for name in law.parameters])
    most = np.where(exponent, 2 * LARGEST_EXPONENT_ERROR, np.log(LARGEST_FACTOR))
    known = (intervals[1] - intervals[0] <= most) & (internal > least + 0.01)
    return dict(zip(law.parameters, known.tolist(), strict=True))


def coverage(
    form: str | Law,
    truth: Mapping[str, float],
    x: Mapping[str, np.ndarray],
    *,
    noise: float,
    draws: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, float]:
    """Returns how often the interval of each parameter holds the truth, on synthetic draws.

    Asked before a ladder is run: would these rungs identify the law? Fits are least squares of
    logarithms; the intervals come from the Jacobian.

    Args:
        form: a key of LAWS, or a Law.
        truth: {parameter: value}.
        x: {variable: [n]}, where the runs would be.
        noise: standard deviation of ln y.
        draws: how many.
        seed: of the noise.
        confidence: of the intervals.
    """
    law = lookup(LAWS, form, "law") if isinstance(form, str) else form
    problem = Problem(law, np.array([np.asarray(x[v], np.float64) for v in law.variables]))
    exact = law.to_internal(truth)
    clean = law.evaluate(exact, problem.x)[0]
    normal = np.random.default_rng(seed).standard_normal((draws, len(clean)))
    y = clean * np.exp(noise * normal)
    low, high = np.moveaxis(t_interval(problem, solve_many(problem, y), y, confidence), -2, 0)
    held = ((low <= exact) & (exact <= high)).mean(0)
    return dict(zip(law.parameters, held.tolist(), strict=True))
