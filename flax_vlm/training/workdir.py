# SPDX-License-Identifier: Apache-2.0
"""The workdir of a run: what lies where, and whether a config may resume what lies there.

config.json         resolved config
tokenizer.json      the tokenizer, readable by the `tokenizers` library alone
metrics.jsonl       one row per logged step
timings.jsonl       wall time by activity, a row per checkpoint (training/profiling.py)
checkpoints/STEP/   Orbax
eval/STEP.json      what the evaluators found; their pictures in eval/STEP/NAME/
training_curve.png  both over steps
tensorboard/        events
trace/              profiler traces
"""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax_vlm.training.metrics import read_metrics

# A run may go on with other values of these: they change how it is computed, watched or saved,
# not what is computed. Everything else must stay as it was.
RESUMABLE = (
    "mesh.*",
    "data.workers",
    "data.dir",
    "log_every",
    "checkpoint.*",
    "evals*",
    "profile.*",
    "wandb*",
    "nonfinite",
)


def save_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def load_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the resolved config of a run.

    Raises:
        ValueError: if the folder is not a workdir.
    """
    file = pathlib.Path(workdir) / "config.json"
    if not file.exists():
        raise ValueError(
            f"a workdir of train.py must hold config.json, {workdir} does not; "
            f"give the folder that was passed as --workdir"
        )
    return json.loads(file.read_text())


def is_workdir(folder: pathlib.Path) -> bool:
    """Returns whether train.py wrote a folder: its config.json has an objective."""
    file = pathlib.Path(folder) / "config.json"
    if not file.is_file():
        return False
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and "objective" in found


def history(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, then one row per evaluation with keys "eval/..."."""
    rows = read_metrics(workdir / "metrics.jsonl")
    files = sorted((workdir / "eval").glob("*.json"), key=lambda file: int(file.stem))
    for file in files:
        found = {f"eval/{key}": value for key, value in json.loads(file.read_text()).items()}
        rows.append({"step": int(file.stem), **found})
    return rows


def check_same_run(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises if the workdir was written by a config that trains something else.

    Raises:
        ValueError: listing every key that differs, with both values.
    """
    if not (pathlib.Path(workdir) / "config.json").exists():
        return
    old, new = flatten(load_config(workdir)), flatten(json.loads(json.dumps(config)))
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not any(fnmatch.fnmatch(key, p) for p in RESUMABLE):
            was, now = (json.dumps(c[key]) if key in c else "absent" for c in (old, new))
            lines.append(f"  {key}: {was} in the workdir, {now} now")
    if lines:
        raise ValueError(
            f"{workdir} was written by another config; choose another --workdir, or the same "
            f"values:\n" + "\n".join(lines)
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": leaf} of nested dicts; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
