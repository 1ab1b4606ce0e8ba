# SPDX-License-Identifier: Apache-2.0
r"""Runs recipes with several seeds each and compares them: means, intervals, paired differences.

    python -m flax_vlm.tools.seeds --config configs/shapes_negatives.py:all \
        --config configs/shapes_negatives.py:hard --seeds 0,1,2,3,4 \
        --metric swapped/accuracy --metric retrieval/i2t@1 --out runs/negatives

Start it where train.py lies. Every recipe is an arm; the first is the baseline. Each (arm, seed)
trains in its own workdir OUT/ARM/seed_N, one after the other; the same command again goes on where
it stopped, because train.py does. What follows `--` goes to every train.py, {seed} replaced:
`-- --config.init_from=runs/start/seed_{seed}`. Writes OUT/results.json, results.csv and
results.png; the last line is the JSON object on one line. Exit code: 0, or that of the run that
failed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from matplotlib.figure import Figure

from flax_vlm.evaluation.pictures import GRAY, INK, LINES, save_figure
from flax_vlm.scaling.seed_statistics import mean_interval, paired_difference
from flax_vlm.tools.runs import Programs, RunFailedError, finish_run, read_metrics
from flax_vlm.training import workdir as layout

flags.DEFINE_multi_string("config", [], "A recipe, configs/NAME.py[:argument]; first = baseline.")
flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Values of config.seed, at least two.")
flags.DEFINE_multi_string("metric", [], "EVALUATOR/NAME as in eval/<step>.json, or train/NAME.")
flags.DEFINE_string("out", None, "Folder of the workdirs and the results.")
FLAGS = flags.FLAGS

# {arm: {metric: [value of every seed]}}
Results = Mapping[str, Mapping[str, Sequence[float]]]


def arm_name(config: str) -> str:
    """Returns "shapes_negatives_hard" for configs/shapes_negatives.py:hard."""
    path, _, argument = config.partition(":")
    return re.sub(r"[^\w.-]+", "_", "_".join(filter(None, [pathlib.Path(path).stem, argument])))


def check_plan(configs: Sequence[str], seeds: Sequence[int], metrics: Sequence[str]) -> None:
    """Raises if the arms, seeds or metrics cannot be compared.

    Raises:
        ValueError: naming what is missing or there twice.
    """
    names = [arm_name(config) for config in configs]
    for what, values, least in (("config", names, 1), ("seed", seeds, 2), ("metric", metrics, 1)):
        if len(values) < least or len(set(values)) < len(values):
            raise ValueError(f"needed: at least {least} different {what}s, got {list(values)}")


def summarize(results: Results) -> list[dict[str, Any]]:
    """Returns one row per arm and metric, the first arm being the baseline.

    Args:
        results: values of the same seeds in the same order everywhere.

    Returns:
        Rows with "arm", "metric", "values", "mean", "low", "high", and "difference" (mean, low,
        high of the paired difference to the baseline; None for the baseline itself).
    """
    baseline = next(iter(results))
    rows = []
    for arm, metrics in results.items():
        for metric, values in metrics.items():
            difference = None
            if arm != baseline:
                paired = paired_difference(values, results[baseline][metric])
                difference = dataclasses.asdict(paired)
            estimate = dataclasses.asdict(mean_interval(values))
            row = {"arm": arm, "metric": metric, "values": list(values), **estimate}
            rows.append({**row, "difference": difference})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the summary as a Markdown table; values and differences times 100."""
    lines = [
        "| arm | metric | mean [95 % interval] | against the first [95 % interval] |",
        "|---|---|---|---|",
    ]
    for row in rows:
        difference = _percent(row["difference"], "+") if row["difference"] else ""
        lines.append(f"| {row['arm']} | {row['metric']} | {_percent(row, '')} | {difference} |")
    return "\n".join(lines)


def _percent(interval: Mapping[str, float], sign: str) -> str:
    mean, low, high = (f"{100 * interval[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns one panel per metric: a point per seed, the mean and its interval per arm.

    Gray lines join the values of one seed: differences are paired.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    figure = Figure(figsize=(3.6 * len(metrics), 3.2), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        shown = [row for row in rows if row["metric"] == metric]
        panel.plot(range(len(arms)), [row["values"] for row in shown], color=GRAY, alpha=0.35)
        for place, row in enumerate(shown):
            color = LINES[place % len(LINES)]
            places = [place] * len(row["values"])
            panel.plot(places, row["values"], "o", color=color, alpha=0.6, markersize=4)
            place += 0.2
            panel.vlines(place, row["low"], row["high"], color=color, linewidth=2)
            panel.plot(place, row["mean"], "_", color=color, markersize=14, markeredgewidth=2)
        panel.set_xticks(range(len(arms)), arms, rotation=20, ha="right", fontsize=8.5)
        panel.set_xlim(-0.6, len(arms) - 0.4)
        panel.set_title(metric, loc="left", color=INK, fontsize=10, parse_math=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8.5)
        panel.grid(axis="y", color=GRAY, alpha=0.25)
    figure.supxlabel(
        "points: seeds, joined by seed; bars: mean and 95 % t-interval", color=GRAY, fontsize=8
    )
    return figure


def write(out: pathlib.Path, seeds: Sequence[int], results: Results) -> dict[str, Any]:
    """Writes results.json, results.csv and results.png and returns what the JSON holds."""
    rows = summarize(results)
    report = {"seeds": list(seeds), "baseline": next(iter(results)), "rows": rows}
    layout.save_json(out / "results.json", report)
    metrics = list(next(iter(results.values())))
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", *metrics])
        for arm, values in results.items():
            for i, seed in enumerate(seeds):
                writer.writerow([arm, seed, *(values[metric][i] for metric in metrics)])
    save_figure(plot(rows), out / "results.png")
    return report


def run_all(
    configs: Sequence[str],
    seeds: Sequence[int],
    metrics: Sequence[str],
    out: pathlib.Path,
    extra: Sequence[str],
) -> dict[str, dict[str, list[float]]]:
    """Returns the Results of every recipe, having run what was not done yet.

    The seeds are the outer loop, so that what is there early has all arms.
    """
    programs = Programs()
    results = {arm_name(c): {metric: [] for metric in metrics} for c in configs}
    for seed in seeds:
        for config in configs:
            arm, start = arm_name(config), time.perf_counter()
            folder = out / arm / f"seed_{seed}"
            more = [argument.replace("{seed}", str(seed)) for argument in extra]
            flags = [f"--config={config}", f"--config.seed={seed}", *more]
            finish_run(programs, flags, folder)
            found = read_metrics(folder, metrics)
            for metric, value in found.items():
                results[arm][metric].append(value)
            shown = ", ".join(f"{metric} {value:.4f}" for metric, value in found.items())
            seconds = time.perf_counter() - start
            print(f"{arm} seed {seed}: {shown} ({seconds:.0f} s)", flush=True)
    return results


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        seeds = [int(seed) for seed in FLAGS.seeds]
        check_plan(FLAGS.config, seeds, FLAGS.metric)
        out = pathlib.Path(FLAGS.out)
        results = run_all(FLAGS.config, seeds, FLAGS.metric, out, argv[1:])
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return error.code
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    report = write(out, seeds, results)
    print(table(report["rows"]))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    app.run(main)
