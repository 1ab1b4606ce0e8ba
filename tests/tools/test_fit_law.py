# SPDX-License-Identifier: Apache-2.0
"""The tool as a program, on a CSV of made-up points."""

import json
import subprocess
import sys

import numpy as np
import pytest

from flax_vlm.scaling.tables import column, keep_rows, read_columns
from tests.integration.conftest import ROOT

C = np.geomspace(1e6, 1e11, 14)


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("law") / "points.csv"
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(len(C)))
    error = (7 * C**-0.23 + 0.1) * noise
    error[-1] *= 1.5
    lines = [f"a,{c},{1 - e},word" for c, e in zip(C, error, strict=True)]
    lines += [f"b,{c},0.1,word" for c in C] + ["a,5e6,,word"]
    path.write_text("# made up\nfamily,compute,accuracy,text\n" + "\n".join(lines) + "\n")
    return path


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "flax_vlm.tools.fit_law", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_tool_fits_predicts_what_is_held_out_and_draws(csv_file, tmp_path):
    done = run(
        csv_file, "--x=compute", "--y=1-accuracy", "--form=power_floor", "--where=family=a",
        f"--max_x={C[-3]}", "--predict=1e12,1e13", "--x_unit=GFLOP, forward", f"--out={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report == json.loads((tmp_path / "law.json").read_text())
    assert report["points"] == 12 and report["range"]["C"][1] == pytest.approx(C[-3])
    b = report["parameters"]["b"]
    assert b["low"] < 0.23 < b["high"] and b["high"] - b["low"] < 0.1
    assert report["units"] == {"C": "GFLOP, forward", "y": "not given"}
    near, far = report["held_out"]
    assert near["inside"] and near["missed_by"] == 0
    assert not far["inside"] and 0.2 < far["missed_by"] < 0.6
    one, two = report["predictions"]
    assert one["x"] == 1e12 and one["low"] < one["value"] < one["high"] and two["value"] < 0.12
    assert (tmp_path / "law.png").stat().st_size > 10_000
    assert (tmp_path / "law.svg").read_text().lstrip().startswith("<?xml")


def test_wrong_uses_are_explained(csv_file):
    done = run(csv_file, "--x=compute", "--y=acuracy")
    assert done.returncode == 1
    assert "unknown column 'acuracy'" in done.stderr and "'accuracy'?" in done.stderr
    done = run(csv_file, "--x=compute", "--y=accuracy", "--form=chinchilla")
    assert done.returncode == 1 and "takes ['N', 'D'], got --x=compute" in done.stderr


def test_a_column_may_be_taken_from_a_number():
    table = {"in0": np.array([70.0, 80.0]), "top-1": np.array([1.0]), "text": np.array(["a"])}
    assert column(table, "100-in0").tolist() == [30.0, 20.0]
    assert column(table, "1-in0").tolist() == [-69.0, -79.0]
    assert column(table, "top-1").tolist() == [1.0]
    assert column(table, "2-top-1").tolist() == [1.0]
    with pytest.raises(ValueError, match="'text' must hold numbers, got 'a'"):
        column(table, "text")


def test_rows_are_chosen_by_what_a_column_is_or_is_not(csv_file):
    def count(*rules):
        return len(keep_rows(read_columns(csv_file), rules)["compute"])

    assert (count(), count("family=a"), count("family!=a")) == (29, 15, 14)
    assert count(f"compute={float(C[2])}") == 2
    assert count(f"compute!={float(C[2])}", "family=b") == 13
    with pytest.raises(ValueError, match="a rule is COLUMN=VALUE or COLUMN!=VALUE, got 'a'"):
        count("a")
