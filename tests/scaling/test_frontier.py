# SPDX-License-Identifier: Apache-2.0
"""Compute-optimal sizes against the closed form, brute force and the published exponents."""

import numpy as np
import pytest

from flax_vlm.scaling.fitting import fit
from flax_vlm.scaling.frontier import frontier_exponents, iso_compute, optimal_split, tokens_at
from flax_vlm.scaling.tables import load_fact

LAW = dict(E=1.7, A=400.0, B=900.0, alpha=0.34, beta=0.29)
BUDGETS = np.array([1e18, 3e21, 1e24])


def loss(n, d):
    return LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7.5, 10.5, 60), 10 ** rng.uniform(8.5, 11.5, 60)
    return fit("chinchilla", {"N": n, "D": d}, loss(n, d) * np.exp(1e-3 * rng.standard_normal(60)))


def test_without_overhead_the_split_is_the_closed_form():
    n, d = optimal_split(LAW, BUDGETS)
    a, b = LAW["alpha"], LAW["beta"]
    ratio = (a * LAW["A"] / (b * LAW["B"])) ** (1 / (a + b))
    np.testing.assert_allclose(n, ratio * (BUDGETS / 6) ** (b / (a + b)), rtol=1e-9)
    np.testing.assert_allclose(6 * n * d, BUDGETS, rtol=1e-12)


def test_with_an_overhead_no_other_split_is_better():
    overhead = 4e8
    n, d = optimal_split(LAW, BUDGETS, overhead)
    np.testing.assert_allclose(6 * d * (n + overhead), BUDGETS)
    for budget, best_n, best_d in zip(BUDGETS, n, d, strict=True):
        others = best_n * np.geomspace(0.01, 100, 401)
        losses = loss(others, tokens_at(budget, others, overhead))
        assert np.argmin(losses) == 200
        assert loss(best_n, best_d) == pytest.approx(losses.min(), rel=1e-12)


def test_exponents_add_up_to_one_without_overhead_and_not_with_it(fitted):
    plain, late = (frontier_exponents(fitted, 1e20, overhead) for overhead in (0.0, 4e8))
    truth = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    value, low, high = plain["N"]
    assert low < truth < high and high - low < 0.1
    assert value + plain["D"][0] == pytest.approx(1, abs=1e-6)
    assert abs(late["N"][0] + late["D"][0] - 1) > 0.01


def test_published_exponents_of_multimodal_models_follow_from_alpha_and_beta():
    table = load_fact("nmm2025_exponents")
    early = (table["model"] == "early fusion") & (table["loss"] == "average")
    alpha, beta, n_opt = (table[k][early].item() for k in ("alpha", "beta", "n_opt_exponent"))
    law = dict(LAW, alpha=alpha, beta=beta)
    n, _ = optimal_split(law, np.array([1e20, 1e22]))
    assert np.log(n[1] / n[0]) / np.log(100) == pytest.approx(n_opt, abs=1e-3)


def test_a_curve_of_equal_compute_is_lowest_at_the_optimal_split(fitted):
    n = np.geomspace(1e8, 1e11, 301)
    value, low, high = iso_compute(fitted, 1e21, n)
    best, _ = optimal_split(fitted.parameters, 1e21)
    assert n[np.argmin(value)] == pytest.approx(best[0], rel=0.02)
    assert (low < value).all() and (value < high).all()
