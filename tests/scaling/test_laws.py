# SPDX-License-Identifier: Apache-2.0
"""Forms against plain NumPy and finite differences; fits of made-up points; what a fit refuses."""

import json

import numpy as np
import pytest

from flax_vlm.scaling.fitting import fit
from flax_vlm.scaling.intervals import coverage
from flax_vlm.scaling.laws import LAWS
from flax_vlm.scaling.selection import binned_minimum, improving_bins, pareto_front
from flax_vlm.scaling.solver import Problem, start_grid

C = np.geomspace(1e6, 3e9, 12)
N, D = np.geomspace(3e7, 5e9, 12), np.geomspace(9e10, 4e8, 12) * np.tile([1, 3, 0.4], 4)
T = np.tile([1.0, 4, 16, 36, 144, 576], 2)

# law: (parameters, x, y in plain NumPy)
EXAMPLES = {
    "power": (dict(beta=5.9, alpha=-0.11), {"C": C}, 5.9 * C**-0.11),
    "power_floor": (dict(a=7.0, b=0.23, c=0.12), {"C": C}, 7.0 * C**-0.23 + 0.12),
    "saturating": (
        dict(a=20.0, b=0.3, c=0.1, d=3e6),
        {"C": C},
        20.0 * (C + 3e6) ** -0.3 + 0.1,
    ),
    "chinchilla": (
        dict(E=1.7, A=400.0, B=900.0, alpha=0.34, beta=0.31),
        {"N": N, "D": D},
        1.7 + 400 / N**0.34 + 900 / D**0.31,
    ),
    "visual_tokens": (
        dict(A=4.0, D=0.2, a=0.077, b=0.045),
        {"N": N, "T": T},
        4.0 / (N**0.077 * T**0.045) + 0.2,
    ),
}


def noisy(name, noise, seed=0):
    truth, x, y = EXAMPLES[name]
    rng = np.random.default_rng(seed)
    return truth, x, y * np.exp(noise * rng.standard_normal(len(y)))


def test_every_form_has_an_example():
    same = {"early_fusion", "late_fusion"}  # the form of "chinchilla", another account of compute
    assert EXAMPLES.keys() | same == LAWS.keys()
    for name in same:
        assert LAWS[name].terms == LAWS["chinchilla"].terms
        assert LAWS[name].compute != LAWS["chinchilla"].compute


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_values_and_derivatives_of_a_form_are_right(name):
    truth, x, y = EXAMPLES[name]
    law = LAWS[name]
    columns, internal = np.array([x[v] for v in law.variables]), law.to_internal(truth)
    assert law.to_parameters(internal) == pytest.approx(truth)
    value, gradient = law.evaluate(internal, columns)
    np.testing.assert_allclose(value, y, rtol=1e-12)
    for i in range(len(internal)):
        step = 1e-6 * np.eye(len(internal))[i]
        up, down = (law.evaluate(internal + s, columns)[0] for s in (step, -step))
        np.testing.assert_allclose(gradient[:, i], (up - down) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("space", ["log", "linear"])
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_exact_points_give_back_the_law(name, space):
    truth, x, y = EXAMPLES[name]
    law = fit(name, x, y, space=space)
    assert law.parameters == pytest.approx(truth, rel=1e-4)
    assert law.starts >= 100
    outside = {k: 30 * v for k, v in x.items()}
    exact = LAWS[name].evaluate(
        LAWS[name].to_internal(truth), np.array([outside[v] for v in LAWS[name].variables])
    )[0]
    np.testing.assert_allclose(law.value(outside), exact, rtol=1e-4)


def test_a_grid_of_starts_has_at_least_a_hundred():
    for name, law in LAWS.items():
        x = np.array([EXAMPLES.get(name, EXAMPLES["chinchilla"])[1][v] for v in law.variables])
        grid = start_grid(Problem(law, x))
        assert len(np.unique(grid, axis=0)) >= 100, name


def test_intervals_are_those_of_linear_regression_where_the_law_is_a_line():
    """Two parameters, logarithms: textbook formulas in float64."""
    _, x, y = noisy("power", 0.05)
    law = fit("power", x, y)
    design = np.stack([np.ones_like(C), np.log(C)], axis=1)
    (intercept, slope), rss, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    spread = rss[0] / (len(C) - 2) * np.linalg.inv(design.T @ design)
    t = 2.2281388519649385  # t(0.975; 10)
    half = t * np.sqrt(np.diag(spread))
    assert law.intervals["alpha"] == pytest.approx((slope - half[1], slope + half[1]))
    ends = tuple(np.exp([intercept - half[0], intercept + half[0]]))
    assert law.intervals["beta"] == pytest.approx(ends)
    at = np.array([1.0, np.log(1e11)])
    for new_point, extra in ((False, 0.0), (True, rss[0] / (len(C) - 2))):
        half = t * np.sqrt(at @ spread @ at + extra)
        middle = intercept + slope * at[1]
        expected = np.exp([middle, middle - half, middle + half])
        found = np.concatenate(law.predict([1e11], new_point=new_point))
        np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_derived_numbers_have_the_intervals_of_what_they_are_made_of():
    _, x, y = noisy("power", 0.05)
    law = fit("power", x, y)
    value, low, high = law.derived(lambda p: 3 * p["alpha"] + 1)
    assert value == pytest.approx(3 * law.parameters["alpha"] + 1)
    assert (low, high) == pytest.approx(tuple(3 * a + 1 for a in law.intervals["alpha"]))


def test_the_bootstrap_agrees_with_the_jacobian_and_repeats_itself():
    truth = EXAMPLES["power_floor"][0]
    x = np.geomspace(1e2, 1e9, 60)
    y = (7.0 * x**-0.23 + 0.12) * np.exp(0.02 * np.random.default_rng(3).standard_normal(60))
    jacobian = fit("power_floor", x, y)
    drawn = fit("power_floor", x, y, interval="bootstrap", draws=400)
    again = fit("power_floor", x, y, interval="bootstrap", draws=400)
    other = fit("power_floor", x, y, interval="bootstrap", draws=400, seed=1)
    assert drawn.intervals == again.intervals != other.intervals
    for name, value in truth.items():
        (low, high), (from_low, from_high) = drawn.intervals[name], jacobian.intervals[name]
        assert low < value < high
        assert 0.6 < (high - low) / (from_high - from_low) < 1.5
    widths = [np.subtract(*f.predict([1e11])[:0:-1])[0] for f in (drawn, jacobian)]
    assert 0.5 < widths[0] / widths[1] < 1.6
    for law in (drawn, jacobian):
        curve, point = (np.subtract(*law.predict([1e4], new_point=p)[:0:-1])[0] for p in (0, 1))
        assert point > 2 * curve


def test_wider_confidence_is_a_wider_interval():
    _, x, y = noisy("saturating", 0.01)
    narrow, wide = (fit("saturating", x, y, confidence=c) for c in (0.5, 0.99))
    for name in ("a", "b"):
        (a, b), (c, d) = narrow.intervals[name], wide.intervals[name]
        assert c < a < b < d


def test_hubers_loss_ignores_outliers_that_squares_follow():
    truth, x, y = noisy("power", 0.001)
    y[[2, 9]] *= [3.0, 0.4]
    squares, robust = fit("power", x, y), fit("power", x, y, huber_delta=1e-3, draws=50)
    gap = {f: abs(law.parameters["alpha"] + 0.11) for f, law in (("s", squares), ("h", robust))}
    assert gap["h"] < 5e-4 < 5e-2 < gap["s"]
    # at its minimum the objective is not below what scipy's definition gives
    r = np.abs(robust.residuals)
    rho = np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4))
    assert robust.objective == pytest.approx(rho.sum())
    with pytest.raises(ValueError, match="choose interval='bootstrap'"):
        fit("power", x, y, huber_delta=1e-3, interval="jacobian")


def test_leaving_a_point_out_is_fitting_the_others():
    _, x, y = noisy("power_floor", 0.02)
    errors = fit("power_floor", x, y).leave_one_out()
    for i in (0, 5, 11):
        others = np.arange(12) != i
        law = fit("power_floor", C[others], y[others])
        assert errors[i] == pytest.approx(y[i] - law.value([C[i]])[0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("name", "count"), [("power_floor", 3), ("power", 2), ("saturating", 4)])
def test_a_law_needs_more_points_than_parameters(name, count):
    _, x, y = EXAMPLES[name]
    with pytest.raises(ValueError, match=rf"needs at least {count + 1} points, got {count}; add"):
        fit(name, C[:count], y[:count])
    assert len(fit(name, C[: count + 1], y[: count + 1]).y) == count + 1


def test_points_that_have_no_logarithm_or_do_not_vary_are_refused():
    _, _, y = EXAMPLES["power"]
    with pytest.raises(ValueError, match=r"C must be finite and above zero, got \[-1000000.0\]"):
        fit("power", np.where(C == C[0], -C, C), y)
    with pytest.raises(ValueError, match=r"y must be finite and above zero, got \[nan\]"):
        fit("power", C, np.where(C == C[1], np.nan, y))
    with pytest.raises(ValueError, match="C must vary over the points, got 5 everywhere"):
        fit("power", np.full(12, 5.0), y)
    with pytest.raises(ValueError, match="as many different values of C, got 2"):
        fit("power_floor", np.tile(C[:2], 6), y)
    with pytest.raises(ValueError, match="one value per point"):
        fit("power", C, y[:-1])
    with pytest.raises(ValueError, match=r"takes \['N', 'D'\], got \['an array without a name'\]"):
        fit("chinchilla", C, y)
    with pytest.raises(ValueError, match="unknown law 'powr'.*did you mean 'power'"):
        fit("powr", C, y)
    with pytest.raises(ValueError, match="unknown space"):
        fit("power", C, y, space="square")


def test_what_the_data_do_not_say_is_not_printed():
    """An offset of 0.01 cannot be found when the least C is 1; the curve can."""
    x = np.geomspace(1, 1e4, 24)
    y = (0.26 * (x + 0.01) ** -0.35 + 0.09) * np.exp(
        0.01 * np.random.default_rng(1).standard_normal(24)
    )
    law = fit("saturating", x, y)
    assert law.identified == {"a": True, "c": True, "b": True, "d": False}
    assert law.intervals["d"] is None
    assert law.report()["parameters"]["d"] == "not identifiable"
    value, low, high = law.predict([1e5])
    assert low < 0.26 * 1e5**-0.35 + 0.09 < high and high / low < 1.1
    x = np.geomspace(1e-2, 1e4, 24)
    assert all(fit("saturating", x, 0.26 * (x + 0.01) ** -0.35 + 0.09).identified.values())


def test_an_interval_without_an_end_is_no_overflow():
    law = LAWS["saturating"]
    assert law.to_parameters(np.array([1e4, -1e4, 0.3, 0.0]))["a"] > 1e100


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_floor_and_an_offset_that_are_zero_are_not_identifiable(noise):
    _, x, y = noisy("power", noise, seed=2)
    law = fit("saturating", x, y)
    assert law.identified == {"a": True, "c": False, "b": True, "d": False}
    assert law.report()["parameters"]["c"] == "not identifiable"
    assert law.parameters["b"] == pytest.approx(0.11, abs=2 * noise + 1e-6)


def test_a_report_states_units_ranges_and_what_is_printed():
    _, x, y = noisy("saturating", 0.01)
    report = fit("saturating", x, y, units={"C": "GFLOP, forward"}).report()
    assert json.loads(json.dumps(report)) == report
    assert report["units"] == {"C": "GFLOP, forward", "y": "not given"}
    assert report["range"] == {"C": [1e6, pytest.approx(3e9)]}
    assert report["printed"] == "every parameter as itself, none as its logarithm"
    assert report["points"] == 12 and report["starts"] >= 100
    assert 0 < report["rmse"] < report["leave_one_out_rmse"] < 0.1
    d = report["parameters"]["d"]
    assert d["low"] < d["value"] < d["high"] and d["value"] > 1e5  # d, not ln d


def test_coverage_tells_that_a_ladder_is_too_short():
    truth = dict(a=0.26, b=0.35, c=0.09, d=0.01)
    x = {"C": np.geomspace(1, 1e4, 24)}
    assert coverage("saturating", truth, x, noise=0.01, draws=200)["d"] < 0.88


def test_binned_minima_lie_at_the_centres_of_bins():
    """Edges 0, 0.7, 1.4, ..., 3.5 in log10: the best of each bin, the empty bin left out."""
    x = 10 ** np.array([0.0, 0.5, 0.9, 2.2, 3.0, 3.4])
    y = np.array([0.9, 0.8, 0.7, 0.4, 0.6, 0.5])
    centres, best = binned_minimum(x, y)
    np.testing.assert_allclose(np.log10(centres), [0.35, 1.05, 2.45, 3.15])
    np.testing.assert_allclose(best, [0.8, 0.7, 0.4, 0.5])


def test_improving_bins_stop_at_the_first_that_does_not_improve():
    x = np.array([1.0, 1.5, 3.0, 5.0, 12.0, 16.0])
    y = np.array([0.9, 0.8, 0.85, 0.5, 0.6, 0.3])
    # edges 1 2 4 8 16: [1, 1.5], [3], [5], [12]; the largest x lies in none
    assert improving_bins(x, y, edges=5).tolist() == [1, 3, 5]
    assert improving_bins(x[:-1], y[:-1], edges=5).tolist() == [1, 3]


def test_the_pareto_front_is_what_no_cheaper_point_beats():
    x, y = np.array([3.0, 1.0, 2.0, 2.0, 5.0]), np.array([0.4, 0.9, 0.3, 0.5, 0.2])
    assert pareto_front(x, y).tolist() == [1, 2, 4]
