# SPDX-License-Identifier: Apache-2.0
"""The tool as a program: two arms, two seeds, few steps; and its parts on results made by hand."""

import csv
import json

import numpy as np
import pytest

from flax_vlm.scaling.seed_statistics import mean_interval, paired_difference
from flax_vlm.tools import seeds
from tests.integration.conftest import TINY, overrides, program

METRICS = ["swapped/accuracy", "retrieval/i2t@1"]
ARMS = [f"configs/shapes_negatives.py:{arm}" for arm in ("random", "hard")]
RESULTS = {
    "plain": {"a": [0.5, 0.6, 0.4], "b": [0.1, 0.2, 0.3]},
    "hard": {"a": [0.7, 0.7, 0.65], "b": [0.1, 0.25, 0.2]},
}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("configs/shapes_negatives.py:hard", "shapes_negatives_hard"),
        ("configs/siglip_digits.py", "siglip_digits"),
        ("configs/siglip_l16.py:folder:/data/pairs", "siglip_l16_folder_data_pairs"),
    ],
)
def test_an_arm_is_named_by_its_config_and_can_be_a_folder(config, name):
    assert seeds.arm_name(config) == name


@pytest.mark.parametrize(
    ("configs", "values", "metrics", "message"),
    [
        ([], [0, 1], ["a"], "at least 1 different configs"),
        (["c.py:x", "d/c.py:x"], [0, 1], ["a"], "different configs"),
        (["c.py"], [0], ["a"], "at least 2 different seeds"),
        (["c.py"], [0, 0], ["a"], "at least 2 different seeds"),
        (["c.py"], [0, 1], [], "at least 1 different metrics"),
    ],
)
def test_a_plan_that_compares_nothing_is_refused(configs, values, metrics, message):
    with pytest.raises(ValueError, match=message):
        seeds.check_plan(configs, values, metrics)


def test_the_summary_is_paired_with_the_first_arm_metric_by_metric():
    rows = seeds.summarize(RESULTS)
    assert [(row["arm"], row["metric"]) for row in rows] == [
        ("plain", "a"), ("plain", "b"), ("hard", "a"), ("hard", "b")
    ]  # fmt: skip
    assert rows[0]["difference"] is None and rows[1]["difference"] is None
    for row in rows[2:]:
        values, baseline = RESULTS["hard"][row["metric"]], RESULTS["plain"][row["metric"]]
        paired, alone = paired_difference(values, baseline), mean_interval(values)
        assert row["difference"] == {"mean": paired.mean, "low": paired.low, "high": paired.high}
        assert (row["mean"], row["low"], row["high"]) == (alone.mean, alone.low, alone.high)


def test_the_table_shows_hundredths_and_signed_differences():
    rows = [
        {"arm": "x", "metric": "a", "mean": 0.5, "low": 0.45, "high": 0.55, "difference": None},
        {"arm": "y", "metric": "a", "mean": 0.6123, "low": 0.5, "high": 0.7246,
         "difference": {"mean": 0.1123, "low": -0.01, "high": 0.2346}},
    ]  # fmt: skip
    lines = seeds.table(rows).splitlines()
    assert lines[2] == "| x | a | 50.0 [45.0, 55.0] |  |"
    assert lines[3] == "| y | a | 61.2 [50.0, 72.5] | +11.2 [-1.0, +23.5] |"


def test_the_plot_shows_every_seed_and_every_interval():
    rows = seeds.summarize(RESULTS)
    figure = seeds.plot(rows)
    assert [panel.get_title("left") for panel in figure.axes] == ["a", "b"]
    for panel, metric in zip(figure.axes, ("a", "b"), strict=True):
        points = [line.get_ydata() for line in panel.lines if line.get_marker() == "o"]
        np.testing.assert_array_equal(points, [RESULTS[arm][metric] for arm in RESULTS])
        joined = [line.get_ydata() for line in panel.lines if line.get_marker() == "None"]
        np.testing.assert_array_equal(np.transpose(joined), points)
        bars = [bar.get_segments()[0][:, 1] for bar in panel.collections]
        expected = [(row["low"], row["high"]) for row in rows if row["metric"] == metric]
        np.testing.assert_allclose(bars, expected)


def test_a_metric_that_is_not_there_is_named_with_those_that_are(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "config.json").write_text('{"steps": 30}')
    (tmp_path / "eval" / "20.json").write_text('{"swapped/accuracy": 0.1}')
    (tmp_path / "eval" / "30.json").write_text('{"swapped/accuracy": 0.7}')
    assert seeds.read_metrics(tmp_path, ["swapped/accuracy"]) == {"swapped/accuracy": 0.7}
    with pytest.raises(ValueError, match=r"no \['swapped/acuracy'\], choose among \['swapped"):
        seeds.read_metrics(tmp_path, ["swapped/acuracy"])


# stands for both programs: notes how it was called and what it would have measured
STUB = """
import json, pathlib, sys
flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[0], flags]) + "\\n")
if flags.get("config.steps") == "0":
    sys.exit("ValueError: no steps")
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text('{"steps": 5}')
if sys.argv[0] == "eval.py" or flags["config.seed"] != "7":
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / "5.json").write_text(json.dumps({"x/y": len(flags["workdir"])}))
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    for name in ("train.py", "eval.py"):
        (tmp_path / name).write_text(STUB)
    monkeypatch.chdir(tmp_path)
    return lambda: [json.loads(line) for line in open("calls.jsonl")]


def test_every_seed_of_every_arm_is_started_with_what_follows_the_dashes(stubs, tmp_path):
    extra = ["--config.init_from=start/seed_{seed}"]
    configs = ["configs/c.py:plain", "configs/c.py:hard"]
    results = seeds.run_all(configs, [1, 2], ["x/y"], tmp_path / "out", extra)
    wanted = [
        {
            "config": config,
            "config.seed": str(seed),
            "workdir": str(tmp_path / "out" / seeds.arm_name(config) / f"seed_{seed}"),
            "config.init_from": f"start/seed_{seed}",
        }
        for seed in (1, 2)
        for config in configs
    ]
    assert stubs() == [["train.py", flags] for flags in wanted]
    lengths = [len(flags["workdir"]) for flags in wanted]
    assert results == {"c_plain": {"x/y": lengths[::2]}, "c_hard": {"x/y": lengths[1::2]}}


def test_a_run_that_was_stopped_before_its_evaluation_is_evaluated(stubs, tmp_path):
    results = seeds.run_all(["c.py"], [7, 8], ["x/y"], tmp_path / "out", [])
    assert [name for name, _ in stubs()] == ["train.py", "eval.py", "train.py"]
    assert stubs()[1][1] == {"workdir": str(tmp_path / "out" / "c" / "seed_7")}
    assert len(results["c"]["x/y"]) == 2


def test_a_run_that_fails_ends_the_tool_with_its_words(stubs, tmp_path):
    with pytest.raises(seeds.RunFailedError, match="no steps") as caught:
        seeds.run_all(["c.py"], [7, 8], ["x/y"], tmp_path / "out", ["--config.steps=0"])
    assert caught.value.code == 1 and len(stubs()) == 1
    assert str(tmp_path / "out" / "c" / "seed_7.log") in str(caught.value)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two arms and two seeds, run by the tool; one was trained before, but not evaluated."""
    folder = tmp_path_factory.mktemp("seeds")
    small = {**TINY, "steps": 4, "checkpoint.every": 4, "data.dir": folder / "data",
             "data.options.train_size": 64, "data.options.test_size": 48}  # fmt: skip
    flags = overrides(small)
    out = folder / "out"
    first = out / seeds.arm_name(ARMS[0]) / "seed_0"
    before = program("train.py", f"--config={ARMS[0]}", f"--workdir={first}", *flags)
    assert before.returncode == 0, before.stderr[-3000:]
    results = (first / "eval" / "4.json").read_text()
    (first / "eval" / "4.json").unlink()
    arms = [f"--config={arm}" for arm in ARMS]
    metrics = [f"--metric={metric}" for metric in METRICS]
    done = program(
        "-m", "flax_vlm.tools.seeds", *arms, *metrics, "--seeds=0,3", f"--out={out}", "--", *flags
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout, first, json.loads(results)


def test_the_tool_runs_all_arms_and_seeds_and_reports_what_they_measured(compared):
    out, printed, *_ = compared
    report = json.loads(printed.splitlines()[-1])
    assert report == json.loads((out / "results.json").read_text())
    assert report["seeds"] == [0, 3] and report["baseline"] == seeds.arm_name(ARMS[0])
    rows = {(row["arm"], row["metric"]): row for row in report["rows"]}
    table = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 4 and len(table) == 4
    for line in table:
        folder = out / line["arm"] / f"seed_{line['seed']}"
        assert json.loads((folder / "config.json").read_text())["seed"] == int(line["seed"])
        measured = json.loads((folder / "eval" / "4.json").read_text())
        for metric in METRICS:
            value = rows[line["arm"], metric]["values"][report["seeds"].index(int(line["seed"]))]
            assert float(line[metric]) == value == measured[metric]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {seeds.arm_name(ARMS[1])} | swapped/accuracy |" in printed


def test_a_finished_run_is_not_trained_again(compared):
    _, _, first, results = compared
    assert "has all 4 steps already" in first.with_name("seed_0.log").read_text()
    rows = [json.loads(line)["step"] for line in (first / "metrics.jsonl").open()]
    assert rows == [1, 2, 3, 4] and len(list((first.parent / "seed_3").iterdir())) > 3
    assert json.loads((first / "eval" / "4.json").read_text()) == results
