# SPDX-License-Identifier: Apache-2.0
"""Trains ten times the batch that fits: the gradient cache on a device whose memory is bounded.

    python benchmarks/large_batch.py --limit_gb 2.5

Every trial is `train.py --config configs/siglip_shapes_large_batch.py` in a process of its own that
may not hold more than the limit (RLIMIT_DATA: a request beyond it is refused, as an accelerator
refuses). The largest batch that trains two steps without the cache is searched among multiples of
`--grain`; then the recipe runs as it is, within the same memory. A trial that fails for any other
reason than memory ends the benchmark. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the configs import each other
CONFIG = "configs/siglip_shapes_large_batch.py"
STEPS = 2
REFUSALS = ("RESOURCE_EXHAUSTED", "Out of memory", "bad_alloc", "MemoryError", "Cannot allocate")


def trains(batch: int, micro_batches: int, limit: int) -> bool:
    """Returns whether the recipe takes its steps with that batch within the memory.

    Args:
        batch: examples in one step.
        micro_batches: pieces of it; 1 is without the cache.
        limit: bytes that the process may hold.

    Raises:
        RuntimeError: if it fails for another reason.
    """
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}/run"]
        command += [f"--config.batch_size={batch}", f"--config.micro_batches={micro_batches}"]
        command += [f"--config.steps={STEPS}", "--config.evals={}"]
        run = subprocess.run(
            command,
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
    said = run.stdout + run.stderr
    refused = any(words in said for words in REFUSALS)
    if run.returncode and not refused:
        raise RuntimeError(f"batch {batch} failed, and not for memory:\n{said[-2000:]}")
    print(f"batch {batch} in {micro_batches}: {'does not fit' if run.returncode else 'trains'}")
    return run.returncode == 0


def largest(fits: Callable[[int], bool], grain: int) -> int:
    """Returns the largest multiple of `grain` that fits, 0 if none does.

    Args:
        fits: true up to some size, false beyond it.
        grain: what the size is a multiple of.
    """
    high = grain
    while fits(high):
        high *= 2
    low = high // 2 if high > grain else 0
    while high - low > grain:
        middle = (low + high) // 2 // grain * grain
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main() -> int:
    """Returns the exit code: 1 unless the recipe trains, with ten times what fits without it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit_gb", type=float, default=2.5)
    parser.add_argument("--grain", type=int, default=64)
    arguments = parser.parse_args()
    limit = int(arguments.limit_gb * 1e9)
    config = runpy.run_path(ROOT / CONFIG)["get_config"]()
    fits = largest(lambda batch: trains(batch, 1, limit), arguments.grain)
    report = {
        "limit_gb": arguments.limit_gb,
        "largest_batch_without_cache": fits,
        "refused_without_cache": fits + arguments.grain,
        "batch": config.batch_size,
        "micro_batches": config.micro_batches,
        "trains": trains(config.batch_size, config.micro_batches, limit),
        "ratio": config.batch_size / fits,
    }
    print(json.dumps(report))
    return int(not report["trains"] or report["ratio"] < 10)


if __name__ == "__main__":
    sys.exit(main())
