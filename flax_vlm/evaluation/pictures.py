# SPDX-License-Identifier: Apache-2.0
"""Figures of results: predictions, answers, similarity, training curve, attention maps.

Only matplotlib's Figure objects: no pyplot, no global settings, so a notebook's own style is left
alone and evaluation can run in any thread. Texts come from data and are never read as formulas
("$5").
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from flax_vlm.figures import DPI as DPI
from flax_vlm.figures import GRAY, INK, LIGHT, LINES, plain_axes
from flax_vlm.figures import save_figure as save_figure

WRONG = "#c8102e"
FRAME = "#e08214"

# Evaluation metrics that the training curve shows when it is not told which.
HEADLINES = ("accuracy", "i2t@1", "t2i@1")


def prediction_grid(
    images: Sequence[np.ndarray],
    predicted: Sequence[str],
    actual: Sequence[str],
    *,
    title: str = "",
    columns: int = 8,
) -> Figure:
    """Returns a grid of images with predicted labels; wrong ones are red, with the true label.

    Args:
        images: [H, W, C] uint8 each.
        predicted: a label per image.
        actual: the true label per image.
        title: above the grid.
        columns: images per line.
    """
    lines = math.ceil(len(images) / columns)
    wrong = [p != a for p, a in zip(predicted, actual, strict=True)]
    cell, text, head = 1.2, 0.42, 0.5
    width, height = columns * cell + 0.2, lines * (cell + text) + head
    figure = Figure(figsize=(width, height), facecolor="white")
    for n, image in enumerate(images):
        line, column = divmod(n, columns)
        left = 0.1 + column * cell + 0.06
        bottom = height - head - line * (cell + text) - cell + 0.06
        axes = figure.add_axes(
            (left / width, bottom / height, (cell - 0.12) / width, (cell - 0.12) / height)
        )
        _show(axes, image)
        _frame(axes, WRONG if wrong[n] else LIGHT, 2.4 if wrong[n] else 0.8)
        _below(axes, 5, _short(predicted[n]), WRONG if wrong[n] else INK, 9)
        if wrong[n]:
            _below(axes, 17, f"true: {_short(actual[n], 13)}", GRAY, 7.5)
    top = 1 - 0.26 / height
    left = 0.16 / width
    figure.text(left, top, title, color=INK, fontsize=11, va="center", parse_math=False)
    note = f"red: wrong, {sum(wrong)} of the {len(images)} shown"
    figure.text(1 - left, top, note, color=WRONG, fontsize=9, va="center", ha="right")
    return figure


def question_grid(
    images: Sequence[np.ndarray],
    questions: Sequence[str],
    predicted: Sequence[str],
    actual: Sequence[str],
    correct: Sequence[bool],
    *,
    title: str = "",
    columns: int = 4,
) -> Figure:
    """Returns a grid of images with a question and its answer below each; wrong ones are red.

    Args:
        images: [H, W, C] uint8 each.
        questions: one per image.
        predicted: the answer of the model.
        actual: the right answer; written below a wrong one.
        correct: is the answer right?
        title: above the grid.
        columns: images per line.
    """
    lines = math.ceil(len(images) / columns)
    cell, text, head = 2.0, 0.95, 0.5
    width, height = columns * cell + 0.2, lines * (cell + text) + head
    figure = Figure(figsize=(width, height), facecolor="white")
    for n, image in enumerate(images):
        line, column = divmod(n, columns)
        left = 0.1 + column * cell + 0.1
        bottom = height - head - line * (cell + text) - cell + 0.1
        size = ((cell - 0.2) / width, (cell - 0.2) / height)
        axes = figure.add_axes((left / width, bottom / height, *size))
        _show(axes, image)
        _frame(axes, LIGHT if correct[n] else WRONG, 0.8 if correct[n] else 2.4)
        _below(axes, 5, _wrap(questions[n], 32), GRAY, 7.5)
        _below(axes, 27, _wrap(predicted[n], 26) or "(nothing)", INK if correct[n] else WRONG, 9)
        if not correct[n]:
            _below(axes, 51, f"true: {_short(actual[n], 26)}", GRAY, 7.5)
    top = 1 - 0.26 / height
    figure.text(0.2 / width, top, title, color=INK, fontsize=11, va="center", parse_math=False)
    note = f"red: wrong, {len(images) - sum(map(bool, correct))} of the {len(images)} shown"
    figure.text(1 - 0.2 / width, top, note, color=WRONG, fontsize=9, va="center", ha="right")
    return figure


def similarity_matrix(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    similarity: np.ndarray,
    *,
    title: str = "",
    positives: np.ndarray | None = None,
    note: str = "framed: true pairs",
) -> Figure:
    """Returns the heat map of captions (lines) by images (columns), with pairs framed.

    Args:
        images: [H, W, C] uint8 each.
        captions: texts.
        similarity: [images, captions] float.
        title: above the picture.
        positives: [images, captions] bool, pairs to frame; None frames the diagonal.
        note: what the frames mean.
    """
    values = np.asarray(similarity, np.float64).T  # [captions, images]
    lines, columns = values.shape
    pairs = np.eye(lines, columns, dtype=bool) if positives is None else positives.T
    cell, margin, head = 0.62, 2.9, 0.55
    width, height = margin + columns * cell + 0.85, head + (lines + 1.05) * cell + 0.2
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes(
        (margin / width, 0.2 / height, columns * cell / width, (lines + 1.05) * cell / height)
    )
    heat = axes.imshow(values, cmap="Blues")
    for x, image in enumerate(images):
        _show(axes, image, (x - 0.46, x + 0.46, -0.59, -1.51))
    if max(lines, columns) <= 16:
        _write_values(axes, values, heat)
    for y, x in np.argwhere(pairs):
        style = dict(fill=False, edgecolor=FRAME, linewidth=1.8, clip_on=False)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **style))
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(lines - 0.5, -1.55), xticks=[], aspect="auto")
    labels = [_wrap(caption, 38) for caption in captions]
    axes.set_yticks(range(lines), labels, fontsize=8, color=INK, parse_math=False)
    axes.tick_params(length=0, pad=6)
    axes.spines[:].set_visible(False)
    _color_bar(
        figure, heat, (width - 0.7) / width, 0.2 / height, 0.13 / width, lines * cell / height
    )
    top = 1 - 0.28 / height
    figure.text(0.16 / width, top, title, color=INK, fontsize=11, va="center", parse_math=False)
    figure.text(0.16 / width, top - 0.27 / height, note, color=FRAME, fontsize=9, va="center")
    return figure


def training_curve(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    metrics: Sequence[str] | None = None,
) -> Figure:
    """Returns loss, evaluation metrics and learning rate over steps.

    Args:
        rows: of metrics.jsonl, with "step" and any of "loss", "learning_rate", "eval/...".
        title: above the picture.
        metrics: keys to show, values in 0..1; None takes those under "eval/" that end in one of
            HEADLINES.
    """
    if metrics is None:
        keys = dict.fromkeys(key for row in rows for key in row)
        metrics = [k for k in keys if k.startswith("eval/") and k.split("/")[-1] in HEADLINES]
    series = {k: _series(rows, k) for k in ("loss", "learning_rate", *metrics)}
    metrics = [k for k in metrics if len(series[k][0])]
    ratios = [3, 2.4, 1] if metrics else [3, 1]
    figure = Figure(
        figsize=(7, 1.4 * sum(ratios) ** 0.75 + 1.1), facecolor="white", layout="constrained"
    )
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    _draw_loss(panels[0], *series["loss"])
    if metrics:
        _draw_metrics(panels[1], rows, {k: series[k] for k in metrics})
    panels[-1].plot(*series["learning_rate"], color=GRAY, linewidth=1.4)
    panels[-1].set_ylabel("learning rate")
    panels[-1].set_xlabel("step")
    for panel in panels:
        plain_axes(panel)
    panels[-1].set_ylim(bottom=0)
    panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    panels[-1].yaxis.get_offset_text().set(fontsize=8.5, color=INK)
    panels[-1].xaxis.set_major_locator(MaxNLocator(7, integer=True))
    panels[0].set_title(title, loc="left", color=INK, fontsize=11, parse_math=False)
    figure.align_ylabels()
    return figure


def attention_map(
    image: np.ndarray, maps: np.ndarray, names: Sequence[str], *, title: str = ""
) -> Figure:
    """Returns the image and one overlay per attention map, each scaled to its own maximum.

    Args:
        image: [H, W, C] uint8.
        maps: [n, h, w] float >= 0, attention to the patches of a grid over the image.
        names: one per map.
        title: above the picture.
    """
    if maps.ndim != 3 or len(names) != len(maps):
        raise ValueError(
            f"maps must be [n, h, w] with n names, got {maps.shape}, {len(names)} names"
        )
    columns = min(len(maps) + 1, 5)
    lines = math.ceil((len(maps) + 1) / columns)
    tall = image.shape[0] / image.shape[1]
    figure = Figure(
        figsize=(1.9 * columns, lines * (1.82 * tall + 0.3) + (0.3 if title else 0.05)),
        facecolor="white",
        layout="constrained",
    )
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    image = _enlarged(image)
    overlays = [image, *(_overlay(image, one) for one in maps)]
    for panel, picture, name in zip(panels, overlays, ["image", *names], strict=False):
        _show(panel, picture)
        _frame(panel, LIGHT, 0.8)
        panel.set_title(name, fontsize=9, color=INK, pad=4, parse_math=False)
    for panel in panels[len(overlays) :]:
        panel.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, parse_math=False)
    return figure


def _show(axes: Axes, image: np.ndarray, extent: tuple[float, ...] | None = None) -> None:
    image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    # small images keep their pixels, large ones are averaged
    kind = "nearest" if max(image.shape[:2]) < 100 else "antialiased"
    axes.imshow(image, extent=extent, interpolation=kind)
    if extent is None:
        axes.set(xticks=[], yticks=[])


def _frame(axes: Axes, color: str, width: float) -> None:
    for spine in axes.spines.values():
        spine.set(edgecolor=color, linewidth=width)


def _below(axes: Axes, points: float, text: str, color: str, size: float) -> None:
    where = dict(xycoords="axes fraction", textcoords="offset points", ha="center", va="top")
    style = dict(color=color, fontsize=size, parse_math=False)
    axes.annotate(text, (0.5, 0), (0, -points), **where, **style)


def _short(text: str, width: int = 15) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _wrap(text: str, width: int) -> str:
    """Returns at most two lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=2, placeholder=" …"))


def _write_values(axes: Axes, values: np.ndarray, heat: Any) -> None:
    for (y, x), value in np.ndenumerate(values):
        color = "white" if heat.norm(value) > 0.6 else INK
        number = f"{value:.2f}".replace("-", "−")
        axes.text(x, y, number, ha="center", va="center", fontsize=7.5, color=color)


def _color_bar(figure: Figure, heat: Any, *box: float) -> None:
    bar = figure.colorbar(heat, cax=figure.add_axes(box))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2, color=GRAY, labelcolor=GRAY)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean over a centred window that shrinks at both ends: nothing is shifted."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    half = np.minimum(np.minimum(at, len(values) - 1 - at), window // 2)
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def _draw_loss(axes: Axes, steps: np.ndarray, loss: np.ndarray) -> None:
    finite = np.isfinite(loss)
    steps, loss = steps[finite], loss[finite]
    window = len(loss) // 25
    raw = dict(alpha=0.28, linewidth=0.9) if window > 1 else dict(linewidth=1.8)
    axes.plot(steps, loss, color=LINES[0], **raw)
    if window > 1:
        axes.plot(steps, _smooth(loss, window), color=LINES[0], linewidth=1.8)
    # a fall over more than a factor of ten would hide the end of training on a linear axis
    if len(loss) and loss.min() > 0 and loss.max() > 10 * loss.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss")


def _draw_metrics(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    for n, (key, (steps, values)) in enumerate(series.items()):
        color = LINES[n % len(LINES)]
        label = key.removeprefix("eval/").replace("/", " ").replace("_", " ")
        label = f"{label}  {100 * values[-1]:.1f} %"
        axes.plot(steps, values, color=color, marker="o", markersize=3, linewidth=1.4, label=label)
        low, high = _series(rows, f"{key}_low"), _series(rows, f"{key}_high")
        if len(low[0]) == len(high[0]) == len(steps):
            axes.fill_between(steps, low[1], high[1], color=color, alpha=0.14, linewidth=0)
    axes.set_ylim(min(0, axes.get_ylim()[0]), 1.02)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.set_ylabel("evaluation")
    axes.legend(loc="best", frameon=False, fontsize=8.5, labelcolor=INK)


def _enlarged(image: np.ndarray, side: int = 256) -> np.ndarray:
    """Returns [H, W, 3] uint8; pixels of a small image are repeated, for maps to be smooth."""
    image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    times = max(1, side // min(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the image in gray, coloured where the attention is."""
    height, width = image.shape[:2]
    smooth = Image.fromarray(np.asarray(weights, np.float32)).resize((width, height), Image.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0, None)
    heat = heat / max(float(heat.max()), 1e-12)
    gray = image.mean(axis=-1, keepdims=True) * 0.75  # [H, W, 1]
    alpha = 0.1 + 0.7 * heat[..., None]
    color = 255 * colormaps["inferno"](heat)[..., :3]
    return (gray * (1 - alpha) + color * alpha).astype(np.uint8)
