# SPDX-License-Identifier: Apache-2.0
"""Tables of numbers: a user's CSV, and what papers printed (facts/*.csv, each with its source).

The facts are tables and coefficients that stand in the papers or beside the released models. Larger
point sets are not here, since their repositories have no licence: author_files.py reads them.
"""

from __future__ import annotations

import csv
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from flax_vlm.build import lookup

FACTS = pathlib.Path(__file__).parent / "facts"
Columns = dict[str, np.ndarray]


def read_columns(path: str | pathlib.Path) -> Columns:
    """Returns {column: values} of a CSV with a header; lines that start with # are left out.

    A column is float64 if every cell is a number or empty (NaN), else str.

    Raises:
        ValueError: if there is no row.
    """
    with pathlib.Path(path).open(newline="") as file:
        return parse_columns(file, str(path))


def parse_columns(lines: Iterable[str], name: str) -> Columns:
    """Returns {column: values} of the lines of a CSV; see `read_columns`.

    Raises:
        ValueError: if there is no row, naming the file.
    """
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    rows = list(reader)
    if not rows:
        raise ValueError(f"a table needs a header and at least one row, got none in {name}")
    return {key: _column([row[key] or "" for row in rows]) for key in reader.fieldnames or ()}


def _column(cells: list[str]) -> np.ndarray:
    try:
        return np.array([float(cell) if cell.strip() else np.nan for cell in cells])
    except ValueError:
        return np.array(cells)


def column(table: Columns, spec: str) -> np.ndarray:
    """Returns a column of numbers, or a number minus it: "error", "1-accuracy".

    Raises:
        ValueError: if there is no such column, or it holds words.
    """
    whole, _, name = spec.partition("-") if re.match(r"\d+-", spec) else ("", "", spec)
    values = lookup(table, name, "column")
    if values.dtype.kind != "f":
        raise ValueError(f"column {name!r} must hold numbers, got {str(values[0])!r}")
    return float(whole) - values if whole else values


def keep_rows(table: Columns, rules: Iterable[str]) -> Columns:
    """Returns the rows that every rule holds for: "family=clip", "family!=clip".

    Raises:
        ValueError: for a rule without "=", or a column that is not there.
    """
    for rule in rules:
        found = re.fullmatch(r"(.+?)(!?=)(.*)", rule)
        if not found:
            raise ValueError(f"a rule is COLUMN=VALUE or COLUMN!=VALUE, got {rule!r}")
        name, equals, value = found.groups()
        cells = lookup(table, name, "column")
        kept = (cells == (float(value) if cells.dtype.kind == "f" else value)) == (equals == "=")
        table = {key: values[kept] for key, values in table.items()}
    return table


def fact_names() -> list[str]:
    """Returns the names of the tables in the package."""
    return sorted(path.stem for path in FACTS.glob("*.csv"))


def load_fact(name: str) -> Columns:
    """Returns a published table as {column: values}; `fact_source` says where it is printed.

    Raises:
        ValueError: for an unknown name, with the choices.
    """
    return read_columns(lookup({n: FACTS / f"{n}.csv" for n in fact_names()}, name, "table"))


def fact_source(name: str) -> str:
    """Returns paper, table and unit of a published table."""
    path = lookup({n: FACTS / f"{n}.csv" for n in fact_names()}, name, "table")
    return path.read_text().partition("\n")[0].removeprefix("# ")


def published_coefficients(paper: str, fit: str) -> dict[str, float]:
    """Returns {parameter: value} of a row of the table "law_coefficients".

    The names are the paper's: Nezhurina et al. print ln b, here "ln_b".

    Args:
        paper: as in the table, "zhai2021".
        fit: target and fit of the table with a comma between, "imagenet fine-tune, ViT, JFT".
    """
    table = load_fact("law_coefficients")
    names = [
        f"{p}, {t}, {f}"
        for p, t, f in zip(*(table[k] for k in ("paper", "target", "fit")), strict=True)
    ]
    cells = lookup(
        dict(zip(names, table["parameters"], strict=True)), f"{paper}, {fit}", "published fit"
    )
    return {k: float(v) for k, v in (pair.split("=") for pair in cells.split(";"))}
