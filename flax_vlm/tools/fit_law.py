# SPDX-License-Identifier: Apache-2.0
r"""Fits a scaling law to a CSV: parameters with intervals, predictions, a figure.

    python -m flax_vlm.tools.fit_law points.csv --x=compute --y=error --form=saturating \
        --x_unit="GFLOP, forward" --out=runs/law
    python -m flax_vlm.tools.fit_law points.csv --x=N=parameters,D=tokens --y=loss \
        --form=chinchilla --huber_delta=1e-3

Lines of the CSV that start with # are left out. `--y=1-accuracy` fits one minus a column, and so
with other numbers; `--where=family=clip` and `--where=family!=clip` choose rows; `--select` keeps
the best of bins or the front.
`--max_x` fits up to it and predicts the rows above: inside the interval, or missed by how much.
With `--out`, writes law.json, and law.png and law.svg for a law of one variable. The last line is
the JSON object on one line.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import numpy as np
from absl import app, flags

from flax_vlm.figures import save_png_and_svg
from flax_vlm.scaling.fitting import Fit, fit
from flax_vlm.scaling.laws import LAWS, Law
from flax_vlm.scaling.plots import law_figure
from flax_vlm.scaling.selection import binned_minimum, improving_bins, pareto_front
from flax_vlm.scaling.tables import column, keep_rows, read_columns

flags.DEFINE_string("x", None, "Column, or VARIABLE=COLUMN,... for a law of several variables.")
flags.DEFINE_string("y", None, "Column, or 1-COLUMN.")
flags.DEFINE_enum("form", "saturating", sorted(LAWS), "Which law.")
flags.DEFINE_multi_string("where", [], "COLUMN=VALUE or COLUMN!=VALUE: rows to keep.")
flags.DEFINE_enum("select", "all", ["all", "binned", "improving", "pareto"], "Which points to fit.")
flags.DEFINE_enum("space", "log", ["log", "linear"], "Residuals of ln y or of y.")
flags.DEFINE_float("huber_delta", None, "Huber's loss instead of squares (Chinchilla: 1e-3).")
flags.DEFINE_enum("interval", None, ["jacobian", "bootstrap"], "Where intervals come from.")
flags.DEFINE_integer("draws", 1000, "Of the bootstrap.")
flags.DEFINE_float("max_x", None, "Fit up to this x and predict the rows above.")
flags.DEFINE_list("predict", [], "Values of x to predict.")
flags.DEFINE_string("x_unit", "", "Unit of x, and how compute is counted.")
flags.DEFINE_string("y_unit", "", "Unit of y.")
flags.DEFINE_string("out", None, "Folder for law.json, law.png and law.svg.")
FLAGS = flags.FLAGS

SELECTIONS = {
    "binned": binned_minimum,
    "improving": lambda x, y: [v[improving_bins(x, y)] for v in (x, y)],
    "pareto": lambda x, y: [v[pareto_front(x, y)] for v in (x, y)],
}


def load_points(
    path: str, law: Law, x: str, y: str, where: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns ({variable: [n]}, y [n]) of a CSV, rows without a value left out.

    Raises:
        ValueError: if columns are missing or named wrongly.
    """
    table = keep_rows(read_columns(path), where)
    named = dict(pair.split("=") for pair in x.split(",")) if "=" in x else {law.variables[0]: x}
    if set(named) != set(law.variables):
        raise ValueError(f"{law.equation} takes {list(law.variables)}, got --x={x}")
    columns = {variable: column(table, named[variable]) for variable in law.variables}
    values = column(table, y)
    whole = np.isfinite(values) & np.all([np.isfinite(c) for c in columns.values()], axis=0)
    return {variable: c[whole] for variable, c in columns.items()}, values[whole]


def run(path: str) -> tuple[Fit, dict[str, Any], dict[str, Any]]:
    """Returns the fit, its report, and the points that a figure shows besides."""
    law = LAWS[FLAGS.form]
    x, y = load_points(path, law, FLAGS.x, FLAGS.y, FLAGS.where)
    first = law.variables[0]
    fitted = np.ones(len(y), bool) if FLAGS.max_x is None else x[first] <= FLAGS.max_x
    inside, values = {v: c[fitted] for v, c in x.items()}, y[fitted]
    shown: dict[str, Any] = {}
    if FLAGS.select != "all":
        if len(law.variables) > 1:
            raise ValueError(f"--select={FLAGS.select} is for a law of one variable")
        shown["others"] = (inside[first], values)
        inside[first], values = SELECTIONS[FLAGS.select](inside[first], values)
    found = fit(
        law,
        inside,
        values,
        space=FLAGS.space,
        huber_delta=FLAGS.huber_delta,
        interval=FLAGS.interval,
        draws=FLAGS.draws,
        units={first: FLAGS.x_unit or "not given", "y": FLAGS.y_unit or "not given"},
    )
    report = {**found.report(), "selection": FLAGS.select}
    if not fitted.all():
        above = {v: c[~fitted] for v, c in x.items()}
        report["held_out"] = found.held_out(above, y[~fitted])
        shown["held_out"] = (above[first], y[~fitted])
    if FLAGS.predict:
        at = [float(v) for v in FLAGS.predict]
        names = ("value", "low", "high")
        rows = zip(at, *found.predict(at), strict=True)
        report["predictions"] = [
            {"x": v, **dict(zip(names, map(float, row), strict=True))} for v, *row in rows
        ]
    return found, report, shown


def write(out: pathlib.Path, found: Fit, report: dict[str, Any], shown: dict[str, Any]) -> None:
    """Writes law.json, and figures of a law of one variable."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "law.json").write_text(json.dumps(report, indent=2) + "\n")
    if len(found.law.variables) == 1:
        units = (f" ({unit})" if unit else "" for unit in (FLAGS.x_unit, FLAGS.y_unit))
        names = (FLAGS.x, FLAGS.y.replace("-", " - "))
        labels = [name + unit for name, unit in zip(names, units, strict=True)]
        figure = law_figure(found, x_label=labels[0], y_label=labels[1], **shown)
        save_png_and_svg(figure, out / "law")


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        if len(argv) != 2:
            raise ValueError(f"give one CSV file, got {argv[1:]}")
        found, report, shown = run(argv[1])
        if FLAGS.out:
            write(pathlib.Path(FLAGS.out), found, report, shown)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(report["law"])
    for name, value in report["parameters"].items():
        text = value
        if isinstance(value, dict):
            text = "{value:.6g}  [{low:.4g}, {high:.4g}]".format(**value)
        print(f"  {name:6s} {text}")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["x", "y"])
    app.run(main)
