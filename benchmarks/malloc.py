# SPDX-License-Identifier: Apache-2.0
"""Training on a CPU with glibc's malloc as it is, and with one heap that is kept.

    python benchmarks/malloc.py --rounds 3

Runs train.py of a recipe in turns, in a process each, after one run that fills the compilation
cache. "examples_per_second" is the mean of the last two logs, 100 steps; "system_seconds" and
"peak_bytes" are the process's. Prints a line of JSON per run, then the ratios of the rounds, kept :
as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
# man 3 mallopt: one heap for all threads, no mapping of its own for a large block, nothing trimmed
KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}


def run(config: str, steps: int, folder: pathlib.Path, settings: dict[str, str]) -> dict:
    """Returns what one run measured."""
    command = [sys.executable, "train.py", "--config", config, "--workdir", str(folder)]
    command += [f"--config.steps={steps}", f"--config.checkpoint.every={steps}"]
    env = {k: v for k, v in os.environ.items() if k not in KEPT} | settings
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"train.py failed:\n{folder.with_suffix('.log').read_text()[-2000:]}")
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "examples_per_second": statistics.mean(x["examples_per_second"] for x in logs[-2:]),
        "system_seconds": used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def main() -> None:
    """Prints the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/llava_shapes_stage1.py")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache"

        def measured(name: str, settings: dict[str, str]) -> dict:
            found = run(options.config, options.steps, pathlib.Path(folder) / name, settings)
            print(json.dumps({"run": name, **found}), flush=True)
            return found

        measured("fills_the_cache", {})
        for n in range(options.rounds):
            plain, kept = measured(f"plain_{n}", {}), measured(f"kept_{n}", KEPT)
            rounds.append({key: kept[key] / plain[key] for key in kept})
    ratios = {key: [r[key] for r in rounds] for key in rounds[0]}
    print(json.dumps({"ratios": ratios}))


if __name__ == "__main__":
    main()
