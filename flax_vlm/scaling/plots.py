# SPDX-License-Identifier: Apache-2.0
"""Figures of scaling: a law with interval and residuals, isoFLOP curves, frontier, batch sizes.

Every figure says in words what its bands are and how compute is counted, where there is any: a
number of GMACs without attention is not a number of training FLOPs. Save with figures.save_figure,
as PNG or SVG.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from flax_vlm.figures import GRAY, INK, LIGHT, LINES, plain_axes
from flax_vlm.scaling.fitting import Fit
from flax_vlm.scaling.frontier import iso_compute, optimal_split
from flax_vlm.scaling.seed_statistics import mean_interval

CURVE_POINTS = 200
Values = Sequence[float]


def law_figure(
    fit: Fit,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    note: str = "",
    beyond: float = 10.0,
    others: tuple[Values, Values] | None = None,
    held_out: tuple[Values, Values] | None = None,
) -> Figure:
    """Returns a law of one variable over its points, log-log, with residuals below.

    Args:
        fit: of a law of one variable.
        x_label: with its unit, "compute (GMAC per sample x samples seen)".
        y_label: with its unit.
        title: above the figure.
        note: how compute is counted; below the figure.
        beyond: how many times the largest x the curve goes on, dashed.
        others: (x, y) of points that were not fitted and not selected; gray.
        held_out: (x, y) that the law had to predict.
    """
    figure = _figure(6.4, 5.4, title)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x, largest = fit.problem.x[0], fit.problem.x[0].max()
    if others is not None:
        top.scatter(*others, s=18, color=LIGHT, label="not fitted", zorder=2)
    if held_out is not None:
        top.scatter(*held_out, s=46, color=LINES[1], marker="D", label="held out", zorder=5)
        _draw_residuals(bottom, fit, *held_out, LINES[1], "D")
    far = max([largest * beyond, *(held_out[0] if held_out else ())])
    for low, high, style in ((x.min(), largest, "-"), (largest, far, (0, (4, 2)))):
        _draw_curve(top, fit, np.geomspace(low, high, CURVE_POINTS), style)
    style = dict(s=26, color=LINES[0], edgecolor="white", linewidth=0.6, zorder=4)
    top.scatter(x, fit.y, label="fitted", **style)
    _draw_residuals(bottom, fit, x, fit.y, LINES[0], "o")
    bottom.axhline(0, color=GRAY, linewidth=0.8)
    top.set(xscale="log", yscale="log", ylabel=y_label)
    bottom.set(xlabel=x_label, ylabel="residual")
    _plain_numbers(top)
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:+.3g} %" if v else "0"))
    bottom.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    _law_text(top, fit)
    figure.align_ylabels()
    percent = f"{100 * fit.confidence:g} %"
    _footer(
        figure,
        f"band: {percent} interval of the curve; thin lines: of one more run; "
        f"dashed: extrapolated; residual: measured / law - 1. {note}",
    )
    return figure


def iso_compute_figure(
    fit: Fit,
    budgets: Sequence[float],
    *,
    title: str = "",
    note: str = "",
    overhead: float = 0.0,
    points: tuple[Values, Values, Values] | None = None,
    y_label: str = "loss",
    x_label: str = "parameters N",
) -> Figure:
    """Returns the loss over model size at equal compute, one curve per budget, and the optima.

    Args:
        fit: of an L(N, D).
        budgets: training FLOPs, rising.
        title: above the figure.
        note: how compute is counted; below the figure.
        overhead: see frontier.py.
        points: (N, C, loss) of runs; those within a tenth of a budget are drawn in its colour.
        y_label: with its unit.
        x_label: with its unit.
    """
    figure = _figure(6.4, 4.4, title)
    axes = figure.subplots()
    best = [optimal_split(fit.parameters, budget, overhead)[0][0] for budget in budgets]
    lowest = []
    for place, (budget, n) in enumerate(zip(budgets, best, strict=True)):
        sizes = np.geomspace(n / 12, n * 12, CURVE_POINTS)
        value, low, high = iso_compute(fit, budget, sizes, overhead)
        color = _shade(place, len(budgets))
        axes.fill_between(sizes, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(sizes, value, color=color, linewidth=1.6)
        axes.annotate(
            _power_of_ten(budget), (sizes[-1], value[-1]), xytext=(4, 0), color=color,
            textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
        lowest.append(iso_compute(fit, budget, np.array([n]), overhead)[0][0])
        if points is not None:
            sizes, compute, loss = (np.asarray(v) for v in points)
            near = np.abs(np.log(compute / budget)) < 0.1
            axes.scatter(sizes[near], loss[near], s=14, color=color, zorder=3)
    axes.plot(best, lowest, "--", color=INK, linewidth=1, marker="o", markersize=4, zorder=4)
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
    axes.set_xlim(best[0] / 14, best[-1] * 40)
    plain_axes(axes)
    percent = f"{100 * fit.confidence:g} %"
    _footer(
        figure,
        "numbers at the curves: training FLOPs; black: the best size of each budget; "
        f"bands: {percent} intervals of the curves. {note}",
    )
    return figure


def frontier_figure(
    fit: Fit,
    budgets: Sequence[float],
    *,
    title: str = "",
    note: str = "",
    overhead: float = 0.0,
    runs: Mapping[str, tuple[float, float, float]] | None = None,
) -> Figure:
    """Returns the best parameters and tokens over compute, with intervals.

    Args:
        fit: of an L(N, D).
        budgets: [m] training FLOPs, rising.
        title: above the figure.
        note: how compute is counted; below the figure.
        overhead: see frontier.py.
        runs: {name: (C, N, D)} of models to compare with.
    """
    figure = _figure(8.2, 3.8, title)
    panels = figure.subplots(1, 2)
    few = np.geomspace(budgets[0], budgets[-1], 25)
    labels = ("parameters N", "tokens D")
    for which, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        logs = fit.derived(lambda p, which=which: np.log(optimal_split(p, few, overhead)[which]))
        value, low, high = map(np.exp, logs)
        axes.fill_between(few, low, high, color=LINES[0], alpha=0.18, linewidth=0)
        axes.plot(few, value, color=LINES[0], linewidth=1.8)
        slope = np.log(value[-1] / value[0]) / np.log(few[-1] / few[0])
        axes.text(
            0.04, 0.95, f"best {label[-1]} ~ C^{slope:.3f}", transform=axes.transAxes, va="top",
            color=LINES[0], fontsize=9, parse_math=False,
        )  # fmt: skip
        for place, (name, run) in enumerate((runs or {}).items()):
            color = LINES[1 + place % (len(LINES) - 1)]
            axes.scatter(
                run[0], run[1 + which], s=34, marker="D", color=color, label=name, zorder=3
            )
        axes.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel=label)
        plain_axes(axes)
    if runs:
        panels[0].legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")
    _footer(figure, f"bands: {100 * fit.confidence:g} % intervals. {note}")
    return figure


def batch_size_figure(
    curves: Mapping[str, Mapping[float, Values]],
    *,
    y_label: str,
    title: str = "",
    note: str = "",
    x_label: str = "batch size (examples)",
) -> Figure:
    """Returns one curve per name over batch sizes, with the spread of the seeds.

    Args:
        curves: {name: {batch size, or another dial that is doubled: [value of every seed]}}.
        y_label: with its unit.
        title: above the figure.
        note: what is equal along a curve ("equal examples seen"); below the figure.
        x_label: with its unit.
    """
    figure = _figure(6.4, 4.2, title)
    axes = figure.subplots()
    ticks = sorted({batch for curve in curves.values() for batch in curve})
    seeds = max(len(values) for curve in curves.values() for values in curve.values())
    for place, (name, curve) in enumerate(curves.items()):
        color = LINES[place % len(LINES)]
        shift = 1.0 if seeds == 1 else 1.04 ** (place - (len(curves) - 1) / 2)
        batches = np.array(sorted(curve))
        means = np.array([np.mean(curve[b]) for b in batches])
        axes.plot(batches * shift, means, "o-", color=color, markersize=4.5, label=name)
        for batch in batches:
            values = curve[batch]
            if len(values) > 1:
                axes.scatter([batch * shift] * len(values), values, s=10, color=color, alpha=0.45)
                ends = mean_interval(values)
                axes.vlines(batch * shift, ends.low, ends.high, color=color, linewidth=1.4)
        top = int(np.argmax(means))
        axes.plot(batches[top] * shift, means[top], "o", color=color, markersize=10, mfc="none")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_short_number(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(ticks) > 9:
        axes.tick_params(axis="x", rotation=30)
    axes.set(xlabel=x_label, ylabel=y_label)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    spread = "bars: mean and 95 % t-interval over seeds, small points: seeds; " if seeds > 1 else ""
    _footer(figure, f"{spread}rings: the highest mean. {note}")
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, parse_math=False)
    return figure


def _footer(figure: Figure, text: str) -> None:
    lines = textwrap.fill(text.strip(), int(15.3 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", color=GRAY, fontsize=8, parse_math=False)


def _draw_curve(axes: Axes, fit: Fit, x: np.ndarray, style: object) -> None:
    value, low, high = fit.predict(x)
    axes.fill_between(x, low, high, color=LINES[0], alpha=0.16, linewidth=0)
    axes.plot(x, value, linestyle=style, color=LINES[0], linewidth=1.8, zorder=3)
    for edge in fit.predict(x, new_point=True)[1:]:
        axes.plot(x, edge, color=LINES[0], linewidth=0.6, alpha=0.7)


def _draw_residuals(axes: Axes, fit: Fit, x: Values, y: Values, color: str, marker: str) -> None:
    relative = np.asarray(y) / fit.value(x) - 1
    axes.vlines(x, 0, relative, color=color, linewidth=1)
    axes.scatter(x, relative, s=20, color=color, marker=marker, zorder=3)


def _law_text(axes: Axes, fit: Fit) -> None:
    lines = [fit.law.equation]
    for name, ends in fit.intervals.items():
        if ends is None:
            lines.append(f"{name} not identifiable")
        else:
            lines.append(f"{name} = {fit.parameters[name]:.4g}  [{ends[0]:.3g}, {ends[1]:.3g}]")
    axes.text(
        0.03, 0.04, "\n".join(lines), transform=axes.transAxes, va="bottom", color=INK,
        fontsize=8.5, linespacing=1.5, parse_math=False,
    )  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper right")


def _plain_numbers(axes: Axes) -> None:
    """Errors are read as 0.2 and 0.05, not as powers of ten."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high / low < 100 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for panel in axes.figure.axes:
        plain_axes(panel)


def _shade(place: int, count: int) -> tuple[float, ...]:
    """Returns a colour from light to dark: budgets are ordered."""
    return colormaps["viridis"](0.85 - 0.85 * place / max(count - 1, 1))


def _power_of_ten(value: float) -> str:
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = value / 10.0**exponent
    lead = "" if abs(factor - 1) < 1e-6 else rf"{factor:.2g}\cdot"
    return rf"${lead}10^{{{exponent}}}$"


def _short_number(value: float) -> str:
    for size, letter in ((1024**2, "M"), (1024, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
