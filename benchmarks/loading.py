# SPDX-License-Identifier: Apache-2.0
"""Time and host memory of loading a checkpoint folder: flax_vlm against transformers.

    pip install -e '.[test]'
    python benchmarks/loading.py --rounds 5

Writes a folder of the size of SigLIP So400m/14-384 (878 million random parameters, 3.5 GB in
float32) with `save_pretrained`, then loads it as float32 in turns, each time in a process of its
own, since the peak of a process never falls. "seconds" is the time of `load_pretrained` with all
parameters ready on the CPU, and of the class's `from_pretrained`; "process_seconds" is that of the
process, imports and all. "touched_seconds" adds the reading of one number of every page of every
parameter. The file was just written: it is read from the page cache.

What is compared differs: from a float32 file transformers maps, its parameters are the pages of the
file, and nothing is copied or allocated. Ours lie transposed and layer beside layer, so every
number is copied once. With `--dtype bfloat16` the file holds half the bytes and both must convert.

Prints JSON. Times are of the machine's wall clock: take them where nothing else runs, and compare
the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

# the model of flax_vlm: a small one for trying the script out
PRESETS = {
    "so400m": {"name": "siglip", "variant": "So400m/14-384"},
    "clip_l14": {"name": "clip", "variant": "L/14"},  # 428 million parameters
    "tiny": {
        "name": "siglip",
        "image": {"variant": "Ti/16", "image_size": 64},
        "text": {"variant": "Ti", "length": 8, "vocab_size": 100},
    },
}
PAGE = 4096  # bytes
TIMES = ("seconds", "touched_seconds", "cpu_seconds", "process_seconds")


def write_folder(folder: pathlib.Path, preset: str, dtype: str) -> int:
    """Writes random weights and returns their bytes in float32; one leaf is in memory at a time."""
    import numpy as np

    from flax_vlm.build import build
    from flax_vlm.convert.saving import save_pretrained
    from flax_vlm.models import MODELS
    from flax_vlm.models.parameter_shapes import parameter_shapes
    from flax_vlm.trees import map_with_path, num_parameters

    rng = np.random.default_rng(0)

    class Drawn:
        """An array that is drawn when it is asked for."""

        def __init__(self, shape: tuple[int, ...]):
            self.shape = shape

        def __array__(self, dtype=None, copy=None):
            return np.asarray(0.02 * rng.standard_normal(self.shape, np.float32))

    shapes = parameter_shapes(build(MODELS, PRESETS[preset], "model"))
    params = map_with_path(lambda path, leaf: Drawn(tuple(leaf.shape)), shapes)
    save_pretrained(folder, PRESETS[preset], params, dtype=dtype)
    return num_parameters(shapes) * 4


def load_ours(folder: str) -> dict[str, float]:
    """Returns the seconds of flax_vlm, to have the parameters and to have touched them."""
    import jax
    import numpy as np

    from flax_vlm.convert.loading import load_pretrained

    jax.block_until_ready(jax.device_put(np.zeros(1)))  # the backend has started
    start = time.perf_counter()
    params = jax.block_until_ready(load_pretrained(folder).params)
    ready = time.perf_counter()
    total = sum(float(touch(np.asarray(leaf))) for leaf in jax.tree.leaves(params))
    return report(start, ready, total)


def load_transformers(folder: str) -> dict[str, float]:
    """Returns the seconds of transformers, to have the model and to have touched it."""
    import torch
    import transformers

    kind = json.loads(pathlib.Path(folder, "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, kind)  # imported here, which is not counted
    start = time.perf_counter()
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    ready = time.perf_counter()
    total = sum(float(touch(p.detach().numpy())) for p in model.parameters())
    return report(start, ready, total)


def touch(values: Any) -> Any:
    """Returns the sum of one number of every page."""
    return values.reshape(-1)[:: PAGE // values.itemsize].sum()


def report(start: float, ready: float, total: float) -> dict[str, float]:
    """Returns the figures of one process."""
    assert math.isfinite(total)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return dict(
        seconds=ready - start,
        touched_seconds=time.perf_counter() - start,
        cpu_seconds=usage.ru_utime + usage.ru_stime,  # of the whole process
        peak_bytes=usage.ru_maxrss * 1024,
    )


LOADERS = {"flax_vlm": load_ours, "transformers": load_transformers}


def run(loader: str, folder: pathlib.Path) -> dict[str, float]:
    """Returns the figures of one loading in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--load", loader, "--folder", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "process_seconds": time.perf_counter() - start}


def summarise(rounds: list[dict[str, dict[str, float]]], size: int) -> dict[str, Any]:
    """Returns the medians, and the ratio of every round."""
    found: dict[str, Any] = {}
    for name in LOADERS:
        peak = max(r[name]["peak_bytes"] for r in rounds)
        medians = {key: statistics.median(r[name][key] for r in rounds) for key in TIMES}
        found[name] = {**medians, "peak_bytes": peak, "peak_over_size": peak / size}
    for key in TIMES:
        ratios = [r["flax_vlm"][key] / r["transformers"][key] for r in rounds]
        found[f"ratio_of_{key}"] = {"median": statistics.median(ratios), "rounds": ratios}
    return found


def main() -> None:
    """Writes the folder, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="so400m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the folder is written; kept. Default: a temporary")
    parser.add_argument("--load", choices=LOADERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(LOADERS[args.load](args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.folder or temporary) / f"{args.preset}-{args.dtype}"
        size = write_folder(folder, args.preset, args.dtype)
        rounds = []
        for i in range(args.rounds):
            order = list(LOADERS) if i % 2 == 0 else list(LOADERS)[::-1]
            rounds.append({name: run(name, folder) for name in order})
    load = os.getloadavg()[0]
    figures = dict(preset=args.preset, dtype=args.dtype, bytes=size, rounds=args.rounds, load=load)
    print(json.dumps({**figures, **summarise(rounds, size)}, indent=1))


if __name__ == "__main__":
    main()
