# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: model FLOP/s against the peak, and wall time by activity.

MFU = model FLOPs of a step / (step time x peak of all devices). Model FLOPs are counted in closed
form (scaling/flops.py), since XLA counts the body of a scan once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

# Dense bfloat16 peak per chip in FLOP/s, by the start of `device_kind`. NVIDIA sheets quote twice
# that, with sparsity. Sources: vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> tuple[float, str]:
    """Returns (FLOP/s of one device, where the figure is from).

    "published" where the device is in PEAK_FLOPS, else "measured": the best of a few float32
    matrix products on this machine, divided among its (virtual) devices.
    """
    kind = jax.devices()[0].device_kind
    longest = sorted(PEAK_FLOPS, key=len, reverse=True)
    name = next((name for name in longest if kind.startswith(name)), None)
    if name is not None:
        return PEAK_FLOPS[name], "published"
    # virtual CPU devices share the machine
    sharing = jax.local_device_count() if kind.lower() == "cpu" else 1
    return measured_matmul_flops() / sharing, "measured"


@functools.cache
def measured_matmul_flops(size: int = 1024, repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of a few [size, size] float32 products on one device."""
    product = jax.jit(lambda x: x @ x)
    x = jax.jit(lambda: jnp.full((size, size), 1.0 / size, jnp.float32))()
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Stopwatch:
    """Wall time by activity, in one JSON line per start of a run (timings.jsonl).

    `goodput` = seconds in steps / wall seconds since the start, the share of time that trained.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Adds the time of the block to an activity."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[activity] = self.seconds.get(activity, 0.0) + spent

    def summary(self) -> dict[str, float]:
        """Returns seconds by activity, "wall" and "goodput"."""
        wall = time.perf_counter() - self._start
        goodput = self.seconds.get("step", 0.0) / wall if wall > 0 else 0.0
        return {**self.seconds, "wall": wall, "goodput": goodput}

    def append_to(self, path: pathlib.Path, **context: int | str) -> None:
        """Appends the summary as one JSON line."""
        rounded = {key: round(value, 3) for key, value in self.summary().items()}
        with path.open("a") as file:
            file.write(json.dumps({**context, **rounded}) + "\n")


class TraceWindow:
    """Records a profiler trace of the steps first .. last into a folder, for xprof or Perfetto."""

    def __init__(self, folder: pathlib.Path, first: int = 0, last: int = 0):
        """Takes the folder, and the first and last step to be traced; 0, 0 = never."""
        self._folder, self._first, self._last = folder, first, last
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace before its first step."""
        if step == self._first and self._last >= self._first > 0:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        """Ends the trace after its last step has been computed."""
        if self._running and step == self._last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._running = False
