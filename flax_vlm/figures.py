# SPDX-License-Identifier: Apache-2.0
"""What all figures share: colours, plain axes, and files that appear whole.

Only matplotlib's Figure objects: no pyplot, no global settings, so a notebook's own style is left
alone and figures can be drawn in any thread.
"""

from __future__ import annotations

import os
import pathlib

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GRAY, LIGHT = "#1f2430", "#7a808c", "#d5d8de"
LINES = ("#2166ac", "#d6604d", "#1b7837", "#762a83", "#b8860b", "#35978f")
DPI = 150  # of saved files: figures are sized in inches for text of 8-11 points


def save_figure(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    """Writes a figure as PNG, or as SVG if the path says so, and returns the path.

    A reader never sees half a file; the same figure gives the same SVG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".svg":
        with matplotlib.rc_context({"svg.hashsalt": "flax_vlm"}):
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    else:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=DPI)
    os.replace(temporary, path)
    return path


def save_png_and_svg(figure: Figure, stem: pathlib.Path) -> None:
    """Writes STEM.png and STEM.svg."""
    for suffix in (".png", ".svg"):
        save_figure(figure, stem.with_suffix(suffix))


def plain_axes(axes: Axes) -> None:
    """Leaves two spines and faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(labelsize=8.5, color=GRAY, labelcolor=INK, which="both")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9.5, color=INK)
