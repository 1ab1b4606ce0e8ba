# SPDX-License-Identifier: Apache-2.0
"""`fit(form, x, y)`: a scaling law with intervals, predictions, and what it cannot say.

Least squares of logarithms (default) or of values, or Huber's loss; at least 100 starts. A fit
refuses too few points, and says "not identifiable" of a parameter instead of printing a number. The
range of x is part of every report: a saturating law's exponent and floor change with it (Nezhurina
et al.'s CLIP frontier gives a floor of 0.11, 0.14 and 0.17 for three caps on C, at the same error).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from flax_vlm.build import lookup
from flax_vlm.scaling.intervals import (
    bootstrap,
    covariance,
    identifiable,
    leave_one_out,
    t_interval,
)
from flax_vlm.scaling.laws import LAWS, Law
from flax_vlm.scaling.solver import Problem, solve

SPACES = ("log", "linear")
INTERVALS = ("jacobian", "bootstrap")
Data = Mapping[str, Any] | Any  # {variable: [n]}, or [n] for a law of one variable


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        problem: form, x, kind of residual and loss.
        y: [n].
        internal: [k], see laws.py.
        objective: at the minimum.
        starts: how many were tried.
        confidence: of all intervals.
        samples: [draws, k] internal values of the bootstrap; None takes the Jacobian.
        units: {variable or "y": unit}, for reports and plots.
    """

    problem: Problem
    y: np.ndarray
    internal: np.ndarray
    objective: float
    starts: int
    confidence: float
    samples: np.ndarray | None
    units: Mapping[str, str]

    @property
    def law(self) -> Law:
        """The form."""
        return self.problem.law

    @property
    def x(self) -> dict[str, np.ndarray]:
        """{variable: [n]}, the points that were fitted."""
        return dict(zip(self.law.variables, self.problem.x, strict=True))

    @property
    def parameters(self) -> dict[str, float]:
        """{name: value}, never a logarithm; ask `identified` before using one alone."""
        return self.law.to_parameters(self.internal)

    @property
    def identified(self) -> dict[str, bool]:
        """{name: do the data say anything of it?}."""
        return identifiable(self.problem, self.internal, self.y, self._internal_interval())

    @property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """{name: (low, high)}, None where the parameter is not identifiable."""
        low, high = map(self.law.to_parameters, self._internal_interval())
        known = self.identified
        return {name: (low[name], high[name]) if known[name] else None for name in low}

    @property
    def residuals(self) -> np.ndarray:
        """[n]: ln y - ln f for "log", y - f for "linear"."""
        return self.problem.residuals(self.internal, self.y)[0]

    def value(self, x: Data) -> np.ndarray:
        """Returns the curve at x, [m]."""
        return self.law.evaluate(self.internal, _columns(self.law, x))[0]

    def predict(
        self, x: Data, *, new_point: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the curve at x and its interval: value, low, high, [m] each.

        Args:
            x: {variable: [m]}, or [m] for a law of one variable; may lie outside of the fit.
            new_point: the interval of one more run rather than of the curve: with its noise.
        """
        at = _columns(self.law, x)
        value, gradient = self.law.evaluate(self.internal, at)
        is_log = self.problem.space == "log"
        if self.samples is None:
            spread = covariance(self.problem, self.internal, self.y)
            gradient = gradient / value[:, None] if is_log else gradient
            variance = np.einsum("mi,ij,mj->m", gradient, spread, gradient)
            variance += self._noise() ** 2 if new_point else 0.0
            half = self._t() * np.sqrt(variance)
            low, high = -half, half
        else:
            curves = self.law.evaluate(self.samples, at)[0]  # [draws, m]
            gap = np.log(curves / value) if is_log else curves - value
            if new_point:
                rng = np.random.default_rng(0)
                inflate = self._noise() / max(np.sqrt(np.mean(self.residuals**2)), 1e-300)
                gap = gap + inflate * rng.choice(self.residuals, gap.shape)
            low, high = np.quantile(gap, self._tails(), axis=0)
        if is_log:
            return value, value * np.exp(low), value * np.exp(high)
        return value, value + low, value + high

    def derived(
        self, function: Callable[[dict[str, float]], Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns numbers that follow from the parameters with their intervals: value, low, high.

        Args:
            function: {name: value} -> a number or an array, smooth.
        """

        def of(internal: np.ndarray) -> np.ndarray:
            return np.asarray(function(self.law.to_parameters(internal)), np.float64)

        value = of(self.internal)
        if self.samples is not None:
            low, high = np.quantile([of(sample) for sample in self.samples], self._tails(), axis=0)
            return value, low, high
        steps = 1e-5 * np.eye(len(self.internal))
        slope = np.array([of(self.internal + s) - of(self.internal - s) for s in steps]) / 2e-5
        spread = covariance(self.problem, self.internal, self.y)
        half = self._t() * np.sqrt(np.einsum("i...,ij,j...->...", slope, spread, slope))
        return value, value - half, value + half

    def leave_one_out(self) -> np.ndarray:
        """Returns [n]: each point minus the prediction of a fit to the others, in units of y."""
        return leave_one_out(self.problem, self.internal, self.y)

    def held_out(self, x: Data, y: Any) -> list[dict[str, float | bool]]:
        """Returns what the law says of runs that it was not fitted to, one row per run.

        A row has "measured", "predicted", "low" and "high" (of one more run), "inside", and
        "missed_by": how far the measured value lies outside of the interval, as a part of the
        prediction; 0 inside.

        Args:
            x: as in `predict`.
            y: [m], measured.
        """
        rows = zip(*self.predict(x, new_point=True), np.atleast_1d(y), strict=True)
        return [
            {
                "measured": float(measured),
                "predicted": float(value),
                "low": float(low),
                "high": float(high),
                "inside": bool(low <= measured <= high),
                "missed_by": float(max(low - measured, measured - high, 0.0) / value),
            }
            for value, low, high, measured in rows
        ]

    def report(self) -> dict[str, Any]:
        """Returns what to print or write as JSON; numbers that mean nothing are left out."""
        found, intervals = self.parameters, self.intervals
        left_out = self.leave_one_out()
        ranges = {v: [float(x.min()), float(x.max())] for v, x in self.x.items()}
        return {
            "law": self.law.equation,
            "source": self.law.source,
            "parameters": {
                name: {"value": found[name], "low": ends[0], "high": ends[1]}
                if ends
                else "not identifiable"
                for name, ends in intervals.items()
            },
            "printed": "every parameter as itself, none as its logarithm",
            "confidence": self.confidence,
            "interval": "jacobian" if self.samples is None else f"bootstrap, {len(self.samples)}",
            "residuals": self.problem.space,
            "huber_delta": self.problem.delta,
            "objective": self.objective,
            "starts": self.starts,
            "points": len(self.y),
            "range": ranges,
            "units": {v: self.units.get(v, "not given") for v in (*self.law.variables, "y")},
            "rmse": float(np.sqrt(np.mean((self.y - self.value(self.x)) ** 2))),
            "leave_one_out_rmse": float(np.sqrt(np.mean(left_out**2))),
        }

    def _internal_interval(self) -> np.ndarray:
        if self.samples is None:
            return t_interval(self.problem, self.internal, self.y, self.confidence)
        return np.quantile(self.samples, self._tails(), axis=0)

    def _tails(self) -> list[float]:
        return [(1 - self.confidence) / 2, (1 + self.confidence) / 2]

    def _t(self) -> float:
        return float(stats.t.ppf(self._tails()[1], len(self.y) - len(self.internal)))

    def _noise(self) -> float:
        freedom = len(self.y) - len(self.internal)
        return float(np.sqrt((self.residuals**2).sum() / freedom))


def fit(
    form: str | Law,
    x: Data,
    y: Any,
    *,
    space: str = "log",
    huber_delta: float | None = None,
    interval: str | None = None,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    units: Mapping[str, str] | None = None,
) -> Fit:
    """Returns the law that fits the points best, with its intervals.

    Args:
        form: a key of LAWS, or a Law.
        x: {variable: [n]} > 0, or [n] for a law of one variable.
        y: [n] > 0: an error as a fraction, or a loss.
        space: "log" compares ln y, "linear" compares y.
        huber_delta: of Huber's loss (Chinchilla: 1e-3); None is least squares.
        interval: "jacobian" or "bootstrap"; None takes "bootstrap" with Huber's loss, else
            "jacobian".
        draws: of the bootstrap.
        seed: of the bootstrap.
        confidence: of all intervals.
        units: {variable or "y": unit}, repeated in reports and plots.

    Raises:
        ValueError: for too few points, values that have no logarithm, or an unknown choice.
    """
    law = lookup(LAWS, form, "law") if isinstance(form, str) else form
    interval = interval or ("jacobian" if huber_delta is None else "bootstrap")
    for what, choice, choices in (("space", space, SPACES), ("interval", interval, INTERVALS)):
        if choice not in choices:
            raise ValueError(f"unknown {what} {choice!r}, choose one of {list(choices)}")
    if interval == "jacobian" and huber_delta is not None:
        raise ValueError("Huber's loss has no Jacobian interval here; choose interval='bootstrap'")
    columns, values = _columns(law, x), np.asarray(y, np.float64)
    check_points(law, columns, values)
    problem = Problem(law, columns, space, huber_delta)
    internal, objective, tried = solve(problem, values)
    samples = bootstrap(problem, internal, values, draws, seed) if interval == "bootstrap" else None
    return Fit(problem, values, internal, objective, tried, confidence, samples, dict(units or {}))


def check_points(law: Law, x: np.ndarray, y: np.ndarray) -> None:
    """Raises if a law cannot be fitted to these points.

    Args:
        law: the form.
        x: [v, n].
        y: [n].

    Raises:
        ValueError: naming the rule.
    """
    k = len(law.parameters)
    if y.shape != x.shape[1:]:
        raise ValueError(f"x and y must have one value per point, got {x.shape[1:]} and {y.shape}")
    if len(y) < k + 1:
        raise ValueError(
            f"{law.equation} has {k} parameters and needs at least {k + 1} points, got {len(y)}; "
            "add rungs or choose a law with fewer parameters"
        )
    for name, values in (*zip(law.variables, x, strict=True), ("y", y)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            bad = values[~(np.isfinite(values) & (values > 0))][:3]
            raise ValueError(f"{name} must be finite and above zero, got {bad.tolist()}")
    for name, values in zip(law.variables, x, strict=True):
        if len(np.unique(values)) < 2:
            raise ValueError(f"{name} must vary over the points, got {values[0]:g} everywhere")
    if len(law.variables) == 1 and len(np.unique(x[0])) < k:
        raise ValueError(
            f"{law.equation} has {k} parameters and needs as many different values of "
            f"{law.variables[0]}, got {len(np.unique(x[0]))}"
        )


def _columns(law: Law, x: Data) -> np.ndarray:
    """Returns [v, n] float64 in the order of the law's variables."""
    name = law.variables[0] if len(law.variables) == 1 else "an array without a name"
    given = x if isinstance(x, Mapping) else {name: x}
    if set(given) != set(law.variables):
        raise ValueError(f"{law.equation} takes {list(law.variables)}, got {sorted(given)}")
    columns = [np.atleast_1d(np.asarray(given[v], np.float64)) for v in law.variables]
    return np.array(np.broadcast_arrays(*columns))
