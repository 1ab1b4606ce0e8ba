# SPDX-License-Identifier: Apache-2.0
"""Figures hold what they are given, say their conventions, and overlap nothing."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from flax_vlm.figures import save_figure
from flax_vlm.scaling.fitting import fit
from flax_vlm.scaling.plots import (
    batch_size_figure,
    frontier_figure,
    iso_compute_figure,
    law_figure,
)

RNG = np.random.default_rng(0)
C = np.geomspace(1e8, 1e12, 14)
ERROR = (30 * C**-0.25 + 0.08) * np.exp(0.02 * RNG.standard_normal(14))
N, D = 10 ** RNG.uniform(7.5, 10, 40), 10 ** RNG.uniform(9, 11, 40)
LOSS = (1.7 + 400 / N**0.34 + 900 / D**0.3) * np.exp(2e-3 * RNG.standard_normal(40))
NOTE = "Compute: forward pass, without attention."
CURVES = {
    "sigmoid": {b: [b / 10, b / 9, b / 8] for b in (16, 64, 4096)},
    "softmax": {b: [b / 12, b / 11, b / 10] for b in (16, 64, 98304)},
}


def law():
    return law_figure(
        fit("power_floor", C, ERROR),
        x_label="compute (GFLOP)",
        y_label="error",
        title="a law",
        note=NOTE,
        others=(C, 1.3 * ERROR),
        held_out=([5e12], [0.1]),
    )


def two_variables():
    return fit("chinchilla", {"N": N, "D": D}, LOSS)


FIGURES = {
    "law": law,
    "isoFLOP": lambda: iso_compute_figure(
        two_variables(), [1e18, 1e19, 1e20], note=NOTE, points=(N, 6 * N * D, LOSS)
    ),
    "frontier": lambda: frontier_figure(
        two_variables(), [1e18, 1e22], note=NOTE, runs={"ours": (1e20, 1e9, 2e10)}
    ),
    "batch": lambda: batch_size_figure(CURVES, y_label="accuracy (%)", note=NOTE),
}


def words(figure):
    texts = [figure._suptitle, figure._supxlabel]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    return [text for text in texts if text is not None and text.get_text()]


@pytest.mark.parametrize("name", list(FIGURES))
def test_no_words_overlap_or_leave_the_figure_and_the_convention_is_stated(name):
    figure = FIGURES[name]()
    FigureCanvasAgg(figure).draw()
    boxes = {text.get_text(): text.get_window_extent() for text in words(figure)}
    assert any(NOTE in text.replace("\n", " ") for text in boxes)
    assert len(boxes) >= 4
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text


def test_a_law_shows_its_points_its_curve_and_what_it_does_not_know():
    figure = law()
    top, bottom = figure.axes
    assert [t.get_text() for t in top.get_legend().get_texts()] == [
        "not fitted",
        "held out",
        "fitted",
    ]
    fitted = next(c for c in top.collections if c.get_label() == "fitted")
    np.testing.assert_allclose(fitted.get_offsets(), np.stack([C, ERROR], axis=1))
    (text,) = [t.get_text() for t in top.texts]
    assert text.startswith("y = a C^-b + c\na = ") and "c = 0.0" in text
    offsets = np.concatenate([c.get_offsets() for c in bottom.collections[1::2]])
    found = fit("power_floor", C, ERROR)
    held = 0.1 / found.value([5e12])[0] - 1
    expected = [held, *(ERROR / found.value(C) - 1)]
    np.testing.assert_allclose(offsets[:, 1], expected, rtol=1e-6)


def test_batches_show_the_mean_over_seeds_and_ring_the_best():
    axes = batch_size_figure(CURVES, y_label="accuracy").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "64", "4k", "96k"]
    sigmoid = next(line for line in axes.lines if line.get_label() == "sigmoid")
    means = [np.mean(values) for values in CURVES["sigmoid"].values()]
    np.testing.assert_allclose(sigmoid.get_ydata(), means)
    ring = next(line for line in axes.lines if line.get_markersize() == 10)
    assert ring.get_ydata().item() == pytest.approx(means[-1])
    one_seed = {"a": {16: [1.0], 32: [2.0]}}
    footer = batch_size_figure(one_seed, y_label="accuracy")._supxlabel.get_text()
    assert "t-interval" not in footer


def test_the_same_figure_is_the_same_svg(tmp_path):
    files = [save_figure(law(), tmp_path / f"{n}.svg").read_text() for n in "ab"]
    assert files[0] == files[1] and "<svg" in files[0]
    assert save_figure(law(), tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
