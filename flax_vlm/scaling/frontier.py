# SPDX-License-Identifier: Apache-2.0
"""The best model size and number of tokens for a compute budget, from a fitted L(N, D).

Minimise E + A N^-alpha + B D^-beta on the curve of equal compute

    C = 6 D (N + overhead);   overhead = N_v D_v / D

Chinchilla and early fusion have no overhead, and N_opt ~ C^(beta / (alpha + beta)) exactly. With
late fusion every token of D also pays for its share of the vision encoder, N_v parameters on D_v
tokens (Shukor et al. 2025, arXiv:2504.07951), so that the exponents of N_opt and D_opt need not add
up to 1 and change with C. Paper: Hoffmann et al. 2022, arXiv:2203.15556, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flax_vlm.scaling.fitting import Fit

FLOPS_PER_TOKEN = 6.0  # per parameter: 2 forward, 4 backward


def tokens_at(compute: np.ndarray, n: np.ndarray, overhead: float = 0.0) -> np.ndarray:
    """Returns D = C / (6 (N + overhead)), the tokens that a budget pays for.

    Args:
        compute: C, training FLOPs.
        n: N, parameters.
        overhead: N_v D_v / D, parameters.
    """
    return np.asarray(compute) / (FLOPS_PER_TOKEN * (np.asarray(n) + overhead))


def optimal_split(
    parameters: Mapping[str, float], compute: np.ndarray, overhead: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best N and D for each budget, [m] each.

    The loss at equal compute is convex in ln N: its slope is brought to zero by bisection.

    Args:
        parameters: A, B, alpha, beta of L(N, D), as `Fit.parameters`.
        compute: [m] training FLOPs.
        overhead: N_v D_v / D, parameters; 0 for one model that reads all tokens.
    """
    a, b, alpha, beta = (float(parameters[k]) for k in ("A", "B", "alpha", "beta"))
    budget = np.atleast_1d(np.asarray(compute, np.float64))
    low, high = np.zeros_like(budget), np.log(budget)
    for _ in range(100):
        middle = 0.5 * (low + high)
        n = np.exp(middle)
        by_n = alpha * a * n**-alpha
        by_d = beta * b * tokens_at(budget, n, overhead) ** -beta * n / (n + overhead)
        low, high = np.where(by_n > by_d, middle, low), np.where(by_n > by_d, high, middle)
    n = np.exp(0.5 * (low + high))
    return n, tokens_at(budget, n, overhead)


def frontier_exponents(
    fit: Fit, compute: float, overhead: float = 0.0
) -> dict[str, tuple[float, float, float]]:
    """Returns the exponents of N_opt and D_opt at a budget, as (value, low, high).

    d ln N_opt / d ln C and d ln D_opt / d ln C, with the fit's intervals.

    Args:
        fit: of an L(N, D).
        compute: training FLOPs.
        overhead: N_v D_v / D, parameters.
    """
    around = np.array([compute * 0.999, compute * 1.001])

    def slope(which: int, parameters: Mapping[str, float]) -> float:
        low, high = np.log(optimal_split(parameters, around, overhead)[which])
        return float((high - low) / np.log(around[1] / around[0]))

    found = {
        name: fit.derived(lambda p, which=which: slope(which, p))
        for which, name in enumerate(("N", "D"))
    }
    return {name: tuple(map(float, ends)) for name, ends in found.items()}


def iso_compute(
    fit: Fit, compute: float, n: np.ndarray, overhead: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the loss over N at equal compute with its interval: value, low, high, [m] each.

    Args:
        fit: of an L(N, D).
        compute: training FLOPs.
        n: [m] parameters.
        overhead: N_v D_v / D, parameters.
    """
    return fit.predict({"N": n, "D": tokens_at(compute, n, overhead)})
