# SPDX-License-Identifier: Apache-2.0
"""Least squares and Huber regression of a law, for many starts and many data sets at once.

Levenberg 1944, Marquardt 1963, with derivatives in closed form and a batch axis: S problems that
share x and differ in their start, their y or the weights of their points. The bootstrap,
leave-one-out and synthetic draws are all batches. Huber's loss (Huber 1964) is minimised by
reweighting inside the same loop and finished by Nelder-Mead: it is nearly an absolute value, which
reweighting approaches slowly.

    objective = sum_n w_n rho(r_n);  r = ln y - ln f ("log") or y - f ("linear")
    rho(r) = r^2 / 2, or with delta: r^2 / 2 if |r| <= delta, else delta (|r| - delta / 2)

Starts form a grid over exponents and offsets; coefficients and floor follow from linear least
squares, so that every start is already as good as its exponents allow.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import optimize

from flax_vlm.scaling.laws import Law

MIN_STARTS = 100
LARGEST_STEP = 2.0  # of an internal value, per iteration


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised, apart from y.

    Attributes:
        law: the form.
        x: [v, n].
        space: "log" or "linear" residuals.
        delta: of Huber's loss; None is least squares.
    """

    law: Law
    x: np.ndarray
    space: str = "log"
    delta: float | None = None

    def residuals(self, internal: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns r [..., n] and -dr/d(internal) [..., n, k]."""
        value, gradient = self.law.evaluate(internal, self.x)
        if self.space == "linear":
            return y - value, gradient
        value = np.maximum(value, 1e-300)
        return np.log(y) - np.log(value), gradient / value[..., None]

    def objective(self, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Returns [...]: the sum over points."""
        if self.delta is None:
            return 0.5 * (weights * residuals**2).sum(-1)
        size = np.abs(residuals)
        rho = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        return (weights * rho).sum(-1)

    def bounds(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the least and the largest internal values [k]: far outside of what data show."""
        low = np.full(len(self.law.parameters), -200.0)
        high = -low
        for i, name in enumerate(self.law.parameters):
            if name == self.law.floor:
                low[i], high[i] = np.log(1e-9 * y.min()), np.log(y.max())
            elif name in self.law.offsets:
                low[i], high[i] = np.log(1e-9 * self.x.min()), np.log(1e3 * self.x.max())
            elif name in self.law.exponents:
                low[i], high[i] = -20.0, 20.0
        return low, high


def start_grid(problem: Problem) -> np.ndarray:
    """Returns [G, k], G >= MIN_STARTS: exponents and offsets on a grid, zeros for the others."""
    law = problem.law
    signs = {e: sign for term in law.terms for _, e, sign in term.powers}
    count = int(np.ceil(MIN_STARTS ** (1 / (len(law.exponents) + len(law.offsets))))) + 1
    axes = [
        np.linspace(-2, 2, count) if signs[name] > 0 else np.geomspace(0.02, 2, count)
        for name in law.exponents
    ]
    low, high = np.log(0.01 * problem.x.min()), np.log(problem.x.max())
    axes += [np.linspace(low, high, count)] * len(law.offsets)
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)
    return np.concatenate([np.zeros((len(grid), len(law.linear))), grid], axis=-1)


def starts(problem: Problem, y: np.ndarray) -> np.ndarray:
    """Returns [S, G, k]: the grid with the best linear parameters for each y [S, n]."""
    grid = start_grid(problem)
    basis = problem.law.basis(grid, problem.x)  # [G, n, m]
    scale = np.abs(basis).mean(1)  # [G, m]
    basis = basis / scale[:, None, :]
    weights = np.ones_like(y) if problem.space == "linear" else y**-2.0
    square = (basis[..., :, None] * basis[..., None, :]).transpose(1, 0, 2, 3)  # [n, G, m, m]
    normal = np.tensordot(weights, square, 1)  # [S, G, m, m]
    right = np.tensordot(weights * y, basis.transpose(1, 0, 2), 1)  # [S, G, m]
    ridge = 1e-9 * np.trace(normal, axis1=-2, axis2=-1)[..., None, None]
    linear = np.linalg.solve(normal + ridge * np.eye(basis.shape[-1]), right[..., None])[..., 0]
    least = 1e-3 * y.mean(-1)[:, None, None]  # a coefficient below zero has no logarithm
    found = np.broadcast_to(grid, (*linear.shape[:2], grid.shape[-1])).copy()
    found[..., : linear.shape[-1]] = np.log(np.maximum(linear, least) / scale)
    return found


def descend(
    problem: Problem,
    internal: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    *,
    iterations: int = 300,
    tolerance: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the internal values [S, k] and objectives [S] at the end of the descent.

    Args:
        problem: what is minimised.
        internal: [S, k] starts.
        y: [S, n].
        weights: [S, n] of the points, >= 0.
        iterations: at most.
        tolerance: a step that lowers the objective by a smaller part than this is the last.
    """
    low, high = problem.bounds(y)
    internal = np.clip(internal, low, high)
    cost = problem.objective(problem.residuals(internal, y)[0], weights)
    damping = np.full(len(internal), 1e-2)
    active = np.arange(len(internal))
    for _ in range(iterations):
        here, data, w = internal[active], y[active], weights[active]
        step = _step(problem, here, data, w, damping[active])
        there = np.clip(here + np.clip(step, -LARGEST_STEP, LARGEST_STEP), low, high)
        new = problem.objective(problem.residuals(there, data)[0], w)
        old = cost[active]
        better = new < old
        internal[active] = np.where(better[:, None], there, here)
        cost[active] = np.where(better, new, old)
        damping[active] *= np.where(better, 0.2, 4.0)
        damping[active] = np.maximum(damping[active], 1e-9)
        done = (better & (old - new <= tolerance * old)) | (damping[active] > 1e8)
        active = active[~done]
        if not len(active):
            break
    return internal, cost


def _step(
    problem: Problem, internal: np.ndarray, y: np.ndarray, weights: np.ndarray, damping: np.ndarray
) -> np.ndarray:
    residual, jacobian = problem.residuals(internal, y)
    if problem.delta is not None:
        weights = weights * np.minimum(1.0, problem.delta / np.maximum(np.abs(residual), 1e-300))
    weighted = jacobian * weights[..., None]
    matrix = jacobian.swapaxes(-1, -2) @ weighted  # [S, k, k]
    right = (weighted * residual[..., None]).sum(-2)  # [S, k]
    scale = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
    scale = np.maximum(scale, 1e-10 * scale.max(-1, keepdims=True) + 1e-300)
    matrix = matrix / (scale[..., :, None] * scale[..., None, :])
    matrix = matrix + damping[:, None, None] * np.eye(matrix.shape[-1])
    return np.linalg.solve(matrix, (right / scale)[..., None])[..., 0] / scale


def polish(problem: Problem, internal: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the internal values [k] and objective of one problem, to the last digits."""

    def objective(p: np.ndarray) -> float:
        return float(problem.objective(problem.residuals(p, y)[0], np.ones_like(y)))

    low, high = problem.bounds(y)
    if problem.delta is None:
        found = optimize.least_squares(
            lambda p: problem.residuals(p, y)[0], internal, lambda p: -problem.residuals(p, y)[1],
            bounds=(low - 1e-9, high + 1e-9), x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15,
        )  # fmt: skip
        candidates = [internal, found.x, _newton(problem, found.x, y, low, high)]
    else:
        options = dict(xatol=1e-10, fatol=1e-16, maxiter=4000)
        found = optimize.minimize(objective, internal, method="Nelder-Mead", options=options)
        candidates = [internal, found.x]
    least = min(objective(p) for p in candidates)
    # the last candidate that is as good as the best, to round-off
    best = [p for p in candidates if objective(p) <= least * (1 + 1e-12)][-1]
    return best, objective(best)


def _newton(
    problem: Problem, internal: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Returns internal values after undamped Gauss-Newton steps: an objective is flat at its
    minimum, and stops telling values apart long before their last digits.
    """
    for _ in range(10):
        residual, jacobian = problem.residuals(internal, y)
        step = np.linalg.lstsq(jacobian, residual, rcond=1e-12)[0]
        if np.abs(step).max() > 1e-4:  # not near the minimum: the descent knows better
            break
        internal = np.clip(internal + step, low, high)
    return internal


def solve(problem: Problem, y: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Returns the best internal values [k], their objective, and the number of starts tried."""
    begin = starts(problem, y[None])[0]  # [G, k]
    data = np.broadcast_to(y, (len(begin), len(y)))
    internal, cost = descend(problem, begin, data, np.ones_like(data))
    best, objective = polish(problem, internal[int(np.argmin(cost))], y)
    return best, objective, len(begin)


def solve_many(
    problem: Problem,
    y: np.ndarray,
    weights: np.ndarray | None = None,
    warm: np.ndarray | None = None,
    keep: int = 3,
) -> np.ndarray:
    """Returns internal values [R, k] for R data sets; the grid is screened, the best starts run.

    Args:
        problem: what is minimised.
        y: [R, n].
        weights: [R, n]; None counts every point once.
        warm: [k], one more start for all.
        keep: how many starts of the grid run for each data set.
    """
    weights = np.ones_like(y) if weights is None else weights
    begin = starts(problem, y)  # [R, G, k]
    screened = problem.objective(
        problem.residuals(begin, y[:, None, :])[0], weights[:, None, :]
    )  # [R, G]
    chosen = np.argsort(screened, axis=1)[:, :keep]
    begin = np.take_along_axis(begin, chosen[..., None], axis=1)  # [R, keep, k]
    if warm is not None:
        begin = np.concatenate([np.broadcast_to(warm, (len(y), 1, len(warm))), begin], axis=1)
    tries = begin.shape[1]
    internal, cost = descend(
        problem,
        begin.reshape(-1, begin.shape[-1]).copy(),
        np.repeat(y, tries, axis=0),
        np.repeat(weights, tries, axis=0),
        iterations=100,
        tolerance=1e-9,
    )
    best = np.argmin(cost.reshape(-1, tries), axis=1)
    return internal.reshape(len(y), tries, -1)[np.arange(len(y)), best]
