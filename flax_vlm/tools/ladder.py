# SPDX-License-Identifier: Apache-2.0
r"""Runs a ladder of configs/ladders/ rung by rung, and makes a table, a law and a plot of it.

    LADDER="configs/ladders/batch_size.py --out runs/batch_size"
    python -m flax_vlm.tools.ladder run $LADDER --jobs 2
    python -m flax_vlm.tools.ladder status $LADDER
    python -m flax_vlm.tools.ladder collect $LADDER
    python -m flax_vlm.tools.ladder plot $LADDER
    python -m flax_vlm.tools.ladder fit configs/ladders/compute.py --out runs/compute
    python -m flax_vlm.tools.ladder commands configs/ladders/batch_size.py:published \
        --out /shared/sweep --on slurm

`run` skips what is done, goes on with what is not, and collects at its end; killed, it is started
again with the same command. `collect` writes OUT/table.json and OUT/table.csv from the rungs that
are done; `plot` draws OUT/plot.png and .svg from the table; `fit` fits a law over compute to it,
compares the rungs that were held out with what it predicts, and writes OUT/law.json, .png and .svg.
`commands` prints what starts each rung on a cluster; what the launch files want besides, such as
ZONE and SETUP, is in their heads. Start it where train.py lies.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import re
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flax_vlm import trees
from flax_vlm.figures import save_png_and_svg
from flax_vlm.program import Program, plain
from flax_vlm.scaling.fitting import fit
from flax_vlm.scaling.ladder import Ladder, Rung
from flax_vlm.scaling.laws import LAWS
from flax_vlm.scaling.plots import batch_size_figure, law_figure
from flax_vlm.scaling.seed_statistics import mean_interval
from flax_vlm.tools.overrides import with_changes
from flax_vlm.tools.runs import (
    Programs,
    RunFailedError,
    finish_run,
    last_evaluation,
    read_metrics,
)
from flax_vlm.training import workdir as layout
from flax_vlm.training.peers import EXIT_PREEMPTED
from flax_vlm.training.profiling import goodput, read_timings

Row = dict[str, Any]
ONE_VARIABLE = [name for name, law in LAWS.items() if law.variables == ("C",)]


def load_ladder(path: str) -> Ladder:
    """Returns the ladder of configs/ladders/NAME.py[:argument].

    Raises:
        ValueError: if there is no such file, or it holds none.
    """
    file, _, argument = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise ValueError(f"a ladder is a file, configs/ladders/NAME.py[:argument], got {path!r}")
    sys.path.insert(0, ".")  # configs import each other
    get_ladder = runpy.run_path(file).get("get_ladder")
    if get_ladder is None:
        raise ValueError(f"{file} has no get_ladder()")
    return get_ladder(*filter(None, [argument]))


def read_config(rung: Rung) -> dict[str, Any]:
    """Returns the config that train.py makes of a rung's flags, as plain values."""
    file, _, argument = rung.config.partition(":")
    config = runpy.run_path(file)["get_config"](*filter(None, [argument]))
    return with_changes(plain(config), plain(rung.changes))


def is_done(folder: pathlib.Path) -> bool:
    """Returns whether a workdir was trained and evaluated to its end."""
    return (folder / "config.json").exists() and last_evaluation(folder).exists()


def run(ladder: Ladder, out: pathlib.Path, jobs: int) -> None:
    """Runs every rung that is not done, `jobs` at a time.

    Raises:
        ValueError: if a workdir was written by other values than its rung has now.
        RunFailedError: of a rung that fails; those that run already are told to save and end. With
            code 75 if all was told to stop by SIGTERM.
    """
    programs = Programs()
    signal.signal(signal.SIGTERM, lambda *_: programs.stop())
    for rung in ladder.rungs():
        layout.check_same_run(out / rung.name, read_config(rung))
    missing = [rung for rung in ladder.rungs() if not is_done(out / rung.name)]
    total = len(ladder.rungs())
    print(f"{total - len(missing)} of {total} rungs are done", flush=True)

    def finish(rung: Rung) -> None:
        start = time.perf_counter()
        try:
            finish_run(programs, rung.flags(), out / rung.name)
        except RunFailedError:
            programs.stop()
            raise
        found = read_metrics(out / rung.name, ladder.metrics)
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in found.items())
        print(f"{rung.name}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        results = [pool.submit(finish, rung) for rung in missing]
        errors = [result.exception() for result in results]
    failed = [error for error in errors if error is not None]
    if failed:  # those that were told to stop are not the reason
        raise min(failed, key=lambda error: getattr(error, "code", 1) == EXIT_PREEMPTED)


def status(ladder: Ladder, out: pathlib.Path) -> list[tuple[str, str]]:
    """Returns (name, "done", "step N of M" or "not started") of every rung."""
    lines = []
    for rung in ladder.rungs():
        folder = out / rung.name
        state = "not started"
        if is_done(folder):
            state = "done"
        elif (folder / "config.json").exists():
            logged = [row["step"] for row in layout.history(folder)]
            state = f"step {max(logged, default=0)} of {layout.load_config(folder)['steps']}"
        lines.append((rung.name, state))
    return lines


def collect(ladder: Ladder, out: pathlib.Path) -> list[Row]:
    """Writes table.json and table.csv of the rungs that are done, and returns their rows.

    A row has the dials, the seed, `parameters`, `examples` seen, `compute` (training FLOPs by
    scaling/flops.py), `seconds` of wall time of all starts, `held_out`, and the metrics.

    Raises:
        ValueError: if no rung is done.
    """
    rows = []
    for rung in ladder.rungs():
        folder = out / rung.name
        if is_done(folder):
            costs = training_costs(layout.load_config(folder))
            seconds = goodput(read_timings(folder / "timings.jsonl"))["wall"]
            rows.append(
                {**rung.dials, "seed": rung.seed, **costs, "seconds": round(seconds, 1)}
                | {"held_out": ladder.held_out(**rung.dials)}
                | read_metrics(folder, ladder.metrics)
            )
    if not rows:
        raise ValueError(f"{out} has no rung that is done; start `run` first")
    layout.save_json(out / "table.json", rows)
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def training_costs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns "parameters", "examples" and "compute" (training FLOPs) of a config's run."""
    program = Program.from_config({**config, "init_from": ""})
    examples = config["steps"] * config["batch_size"]
    return {
        "parameters": trees.num_parameters(program.shapes.params),
        "examples": examples,
        "compute": program.flops_per_example() * examples,
    }


# What starts a rung on a cluster: (arguments of train.py, machine) -> a line of shell.
LAUNCHERS = {
    "slurm": lambda name, arguments, machine: shlex.join(
        ["sbatch", f"--nodes={machine['nodes']}", f"--job-name={name}", "launch/slurm.sh"]
        + arguments
    ),
    "tpu": lambda name, arguments, machine: " && ".join(
        f"ACCELERATOR={machine['accelerator']} "
        + shlex.join(["launch/tpu_vm.sh", verb, name, *(arguments if verb == "train" else ())])
        for verb in ("create", "install", "train", "delete")
    ),
    "aot": lambda name, arguments, machine: shlex.join(
        ["python", "-m", "flax_vlm.tools.aot_compile", f"--topology={machine['topology']}"]
        + [f"--config={arguments[0]}", *arguments[2:]]
    ),
}


def commands(ladder: Ladder, out: pathlib.Path, on: str) -> list[str]:
    """Returns one line of shell per rung.

    Raises:
        ValueError: if the ladder says nothing of machines.
    """
    if ladder.machine is None:
        raise ValueError("this ladder runs here: it has no `machine` for a cluster")
    lines = []
    for rung in ladder.rungs():
        name = re.sub("[^a-z0-9]+", "-", rung.name.lower())  # what a TPU may be called
        config, *changes = rung.flags()
        arguments = [config.removeprefix("--config="), str(out / rung.name), *changes]
        lines.append(LAUNCHERS[on](name, arguments, ladder.machine(**rung.dials)))
    return lines


def read_table(ladder: Ladder, out: pathlib.Path) -> list[Row]:
    """Returns the rows of OUT/table.json.

    Raises:
        ValueError: if `collect` did not write it yet.
    """
    if not (out / "table.json").exists():
        raise ValueError(f"{out} has no table.json; start `run` or `collect` first")
    return json.loads((out / "table.json").read_text())


def plot(ladder: Ladder, out: pathlib.Path) -> None:
    """Draws the first metric over the dial of the ladder's x, with every seed."""
    rows, metric = read_table(ladder, out), ladder.metrics[0]
    curves: dict[str, dict[float, list[float]]] = {}
    words: dict[str, list[float]] = {}  # values of the dial that have no place on an axis
    for row in rows:
        x, name = row[ladder.x], str(row.get(ladder.curves, metric))
        where = words if isinstance(x, str) else curves.setdefault(name, {})
        where.setdefault(x, []).append(row[metric])
    notes = []
    for name, values in words.items():
        found = mean_interval(values)
        notes.append(f"{name}: {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}].")
    figure = batch_size_figure(
        curves,
        x_label=ladder.x,
        y_label=metric,
        title=f"{ladder.config.partition(':')[0]}: {metric} over {ladder.x}",
        note=" ".join(notes),
    )
    save_png_and_svg(figure, out / "plot")


def fit_law(ladder: Ladder, out: pathlib.Path, form: str) -> dict[str, Any]:
    """Fits a law of training compute to the first metric, and returns what law.json holds.

    What is fitted is the metric itself if it is a "train/..." loss, else the error 1 - metric;
    every seed is a point. Runs that were held out are compared with the interval of one more run.

    Raises:
        ValueError: what `fit` raises: too few points for the form, values that are not positive.
    """
    metric, rows = ladder.metrics[0], read_table(ladder, out)
    is_loss = metric.startswith("train/")
    points = {
        held_out: [
            (row["compute"], row[metric] if is_loss else 1 - row[metric])
            for row in rows
            if row["held_out"] == held_out
        ]
        for held_out in (False, True)
    }
    label = metric if is_loss else f"1 - {metric}"
    compute, y = np.array(points[False]).T
    law = fit(form, compute, y, units={"C": "training FLOPs", "y": label})
    apart = tuple(np.array(points[True]).T) if points[True] else None
    found = law.held_out(*apart) if apart else []
    sizes = [{"compute": float(c)} for c, _ in points[True]]
    held_out = [size | row for size, row in zip(sizes, found, strict=True)]
    report = law.report() | {"held_out": held_out}
    layout.save_json(out / "law.json", report)
    figure = law_figure(
        law,
        x_label="training compute C (FLOPs)",
        y_label=label,
        title=f"{ladder.config.partition(':')[0]}: {label} over compute",
        note="Compute: scaling/flops.py, forward and backward.",
        held_out=apart,
        beyond=1.0 if apart else 3.0,
    )
    save_png_and_svg(figure, out / "law")
    return report


def _plot(ladder: Ladder, options: argparse.Namespace) -> None:
    plot(ladder, options.out)
    print(options.out / "plot.png")


def _fit(ladder: Ladder, options: argparse.Namespace) -> None:
    report = fit_law(ladder, options.out, options.form)
    for rung in report["held_out"]:
        verdict = "inside" if rung["inside"] else f"missed by {rung['missed_by']:.1%}"
        print(
            f"held out, {rung['compute']:.3g} FLOPs: measured {rung['measured']:.4f}, predicted "
            f"{rung['predicted']:.4f} [{rung['low']:.4f}, {rung['high']:.4f}]: {verdict}"
        )
    print(json.dumps(report))


def _run(ladder: Ladder, options: argparse.Namespace) -> None:
    run(ladder, options.out, options.jobs)
    _collect(ladder, options)


def _status(ladder: Ladder, options: argparse.Namespace) -> None:
    for name, state in status(ladder, options.out):
        print(f"{name}: {state}")


def _collect(ladder: Ladder, options: argparse.Namespace) -> None:
    rows = collect(ladder, options.out)
    print(f"{len(rows)} of {len(ladder.rungs())} rungs are in {options.out / 'table.csv'}")


def _commands(ladder: Ladder, options: argparse.Namespace) -> None:
    print("\n".join(commands(ladder, options.out, options.on)))


VERBS = {
    "run": _run,
    "status": _status,
    "collect": _collect,
    "plot": _plot,
    "fit": _fit,
    "commands": _commands,
}


def main() -> int:
    """Returns the exit code: 0, 1 for a wrong ladder, or that of the rung that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("ladder", help="configs/ladders/NAME.py[:argument]")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the workdirs")
    parser.add_argument("--jobs", type=int, default=1, help="rungs that run at a time")
    parser.add_argument("--form", choices=ONE_VARIABLE, default="power_floor", help="for fit")
    parser.add_argument("--on", choices=LAUNCHERS, default="slurm", help="for commands")
    options = parser.parse_args()
    try:
        VERBS[options.verb](load_ladder(options.ladder), options)
    except RunFailedError as error:
        print(error, file=sys.stderr)
        return error.code
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
