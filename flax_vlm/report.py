# SPDX-License-Identifier: Apache-2.0
"""What train.py and eval.py print: the plan of a run before it starts, and its result."""

from __future__ import annotations

import json
import pathlib
import runpy
from collections.abc import Mapping, Sequence

from flax_vlm import trees
from flax_vlm.experiment import Experiment
from flax_vlm.models.published import parameter_counts
from flax_vlm.training import profiling, sharding


def dry_run(experiment: Experiment) -> str:
    """Returns config, parameters, mesh, sharding of the largest tensors, and published sizes."""
    state = experiment.shapes
    trained, frozen = experiment.optimizer.split(state.params)
    parts = {"trained": trained, "frozen": frozen, "optimizer": state.opt_state, "ema": state.ema}
    sizes = [
        f"{name:>12}: {trees.num_parameters(tree):>14,} {trees.num_bytes(tree) / 1e9:8.3f} GB"
        for name, tree in parts.items()
        if trees.num_parameters(tree)
    ]
    mesh = ", ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())
    gflops = experiment.flops_per_example() / 1e9
    sections = {
        "config": json.dumps(experiment.config, indent=2),
        "parameters": parameter_table(state.params, experiment.optimizer.freeze),
        "sizes": "\n".join(sizes),
        "mesh": f"{mesh} ({experiment.mesh.size} devices)",
        "largest tensors": sharding.describe_shardings(state.params, experiment.shardings.params),
        "compute": f"{gflops:,.3f} GFLOP per training example",
        "published sizes": published_table(),
    }
    return "\n\n".join(f"== {title} ==\n{text}" for title, text in sections.items())


def parameter_table(params: Mapping, freeze: tuple[str, ...] = ()) -> str:
    """Returns one line per tensor, path, shape and size, and the total."""
    rows = [
        (path, str(tuple(x.shape)), trees.num_parameters([x]), trees.matches(freeze, path))
        for path, x in trees.named_leaves(params).items()
    ]
    width = max(len(path) for path, *_ in rows)
    lines = [
        f"{path:<{width}}  {shape:<24}{count:>14,}{'  frozen' if frozen else ''}"
        for path, shape, count, frozen in rows
    ]
    total = sum(count for *_, count, _ in rows)
    return "\n".join([*lines, f"{'total':<{width}}  {'':<24}{total:>14,}"])


def published_table() -> str:
    """Returns our parameter count of every variant beside the published one."""
    lines = [f"{'model':<34}{'here':>16}{'published':>16}  source"]
    for row in parameter_counts():
        known = row.published
        known = f"{known:,}" if isinstance(known, int) else f"{known:,.2f} M"
        lines.append(f"{row.name:<34}{row.ours:>16,}{known:>16}  {row.source}")
    return "\n".join(lines)


def wrong_key(argv: Sequence[str], error: Exception) -> str:
    """Returns what is wrong with `--config.a.b=value` flags that could not be parsed.

    Args:
        argv: the program's arguments; --config names the recipe.
        error: what parsing raised, the message where no key is unknown.
    """
    pairs = zip(argv, [*argv[1:], ""], strict=True)  # "--config x" as well as "--config=x"
    flags = {flag: value for flag, value in pairs if "=" not in flag}
    flags |= dict(arg.split("=", 1) for arg in argv if arg.startswith("--") and "=" in arg)
    path, _, argument = flags["--config"].partition(":")
    recipe = runpy.run_path(path)["get_config"]
    config = recipe(argument) if argument else recipe()
    for flag in (f for f in flags if f.startswith("--config.")):
        node, walked = config, "config"
        for key in flag.removeprefix("--config.").split("."):
            if not hasattr(node, "keys"):
                break
            if key not in node:
                return f"unknown key {flag}, {walked} has {sorted(node.keys())}"
            node, walked = node[key], f"{walked}.{key}"
    return f"a flag could not be read: {error}"


def results_table(results: Mapping[str, float]) -> list[str]:
    """Returns a line per result; those of kinds, "<evaluator>/<kind>/<metric>", are a table of
    their evaluator, a line per kind and a column per metric.
    """
    lines, tables = [], {}
    for name, value in results.items():
        evaluator, _, rest = name.partition("/")
        kind, _, metric = rest.rpartition("/")
        if kind:
            tables.setdefault(evaluator, {}).setdefault(kind, {})[metric] = value
        else:
            lines.append(f"  {name:<36}{value:.4f}")
    for evaluator, kinds in tables.items():
        columns = list(dict.fromkeys(metric for row in kinds.values() for metric in row))
        lines.append(f"  {evaluator:<18}" + "".join(f"{metric:>12}" for metric in columns))
        for kind, row in kinds.items():
            cells = [f"{row[c]:>12.4g}" if c in row else " " * 12 for c in columns]
            lines.append(f"    {kind:<16}" + "".join(cells))
    return lines


def finished(workdir: pathlib.Path, source: str | None = None) -> str:
    """Returns the last results of a workdir, its pictures and goodput, and how to load it.

    Args:
        workdir: where the results lie.
        source: what is loaded; None is the workdir.
    """
    files = sorted((workdir / "eval").glob("*.json"), key=lambda file: int(file.stem))
    lines = []
    if files:
        lines.append(f"results after step {files[-1].stem} ({files[-1]}):")
        lines += results_table(json.loads(files[-1].read_text()))
        pictures = sorted((workdir / "eval" / files[-1].stem).rglob("*.png"))
        lines += ["pictures:", *(f"  {path}" for path in pictures)]
    curve = workdir / "training_curve.png"
    if curve.exists():
        lines.append(f"  {curve}")
    if time := profiling.goodput(profiling.read_timings(workdir / "timings.jsonl")):
        lines.append(
            f"goodput {time['goodput']:.1%}: {time['productive']:.0f} s in steps that count, of "
            f"{time['wall']:.0f} s since the first of {time['starts']:.0f} starts"
        )
    command = f"import flax_vlm; vlm = flax_vlm.load('{source or workdir}')"
    lines += ["load it:", f'  python -c "{command}"']
    return "\n".join(lines)
