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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


def published_peak(kind: str) -> float | None:
    """Returns the bfloat16 FLOP/s of one device by its `device_kind`; None if not in PEAK_FLOPS."""
    longest = sorted(PEAK_FLOPS, key=len, reverse=True)
    return next((PEAK_FLOPS[name] for name in longest if kind.startswith(name)), None)


def peak_flops() -> tuple[float, str]:
    """Returns (FLOP/s of one device, where the figure is from).

    "published" where the device is in PEAK_FLOPS, else "measured": float32 matrix products on this
    machine, all its devices at work.
    """
    published = published_peak(jax.devices()[0].device_kind)
    if published is not None:
        return published, "published"
    return measured_matmul_flops(repeats=2), "measured"


def matmul_size() -> int:
    """Returns the size of the matrices of `measured_matmul_flops`: enough to fill a device."""
    return 1024 if jax.default_backend() == "cpu" else 8192


@functools.cache
def measured_matmul_flops(dtype: str = "float32", repeats: int = 5) -> float:
    """Returns the FLOP/s of one device in square matrix products, all local devices at work.

    All of them, because virtual CPU devices share a machine and real ones a power supply. Products
    follow one another inside one program, so that its start does not count; the fastest repeat
    counts. Random matrices: a device that multiplies constants draws less power and runs faster.

    Args:
        dtype: of the matrices.
        repeats: of the program.
    """
    chain = 2 if jax.default_backend() == "cpu" else 8  # a CPU starts a program in no time
    devices, size = jax.local_devices(), matmul_size()
    mesh = jax.make_mesh((len(devices),), ("device",), axis_types=(AxisType.Auto,), devices=devices)
    shape, split = (len(devices), size, size), NamedSharding(mesh, PartitionSpec("device"))

    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, chain, lambda _, y: y @ x[0], x[0])[None]

    run = jax.jit(jax.shard_map(products, mesh=mesh, in_specs=split.spec, out_specs=split.spec))
    # variance 1 / size: the products neither grow nor vanish
    noise = jax.jit(
        lambda key: (jax.random.normal(key, shape) * size**-0.5).astype(dtype), out_shardings=split
    )
    x = noise(jax.random.key(0))
    run(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return chain * 2 * size**3 / best


class Stopwatch:
    """Wall time by activity of one start of a run, in timings.jsonl.

    The loop records at every checkpoint and at the end. Rows with the same `began` are one start,
    each holds all of it so far: a start that is killed leaves the row of its last checkpoint, which
    is where the next one goes on.
    """

    def __init__(self, path: pathlib.Path | None = None) -> None:
        """Starts to count.

        Args:
            path: the file; None records nothing (all processes but the first).
        """
        self._path, self._began, self._start = path, time.time(), time.perf_counter()
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

    def record(self, start: int, stop: int) -> None:
        """Appends {"began", "start", "stop", "wall", "seconds"} as one JSON line.

        Args:
            start: finished steps when this start began.
            stop: finished steps now.
        """
        if self._path is None:
            return
        row = {
            "began": round(self._began, 3),  # seconds since 1970: starts share no other clock
            "start": start,
            "stop": stop,
            "wall": round(time.perf_counter() - self._start, 3),
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_timings(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a timings.jsonl; lines that a crash cut short are left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def goodput(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns how the wall time since the first start of a run was spent, in seconds.

        goodput = seconds in steps that no later start repeated / wall seconds since the first start

    The wall ends at the last record of a start that trained. Compilation ("first_step"), waiting
    for data, checkpoints and evaluation are not productive. Steps that were lost with a killed
    process before it recorded them are in "away".

    Args:
        rows: of timings.jsonl, in the order in which they were written.

    Returns:
        "goodput" (a share), "starts" (a count), "wall" and its parts: "productive"; "repeated", in
        steps that a later start did again; "away", between two starts; the other activities; and
        "other", the rest. Empty if no step is recorded.
    """
    starts: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        starts.setdefault(row["began"], []).append(row)
    history = list(starts.values())
    while history and history[-1][-1]["stop"] == history[-1][0]["start"]:
        history.pop()  # starting a finished run again costs it nothing
    if not history:
        return {}

    productive, resumed_from = 0.0, float("inf")
    for records in reversed(history):
        kept = [r for r in records if r["stop"] <= resumed_from]
        productive += kept[-1]["seconds"].get("step", 0.0) if kept else 0.0
        resumed_from = min(resumed_from, records[0]["start"])

    last = [records[-1] for records in history]
    wall = last[-1]["began"] + last[-1]["wall"] - last[0]["began"]
    running = sum(row["wall"] for row in last)
    activities: dict[str, float] = {}
    for row in last:
        for activity, seconds in row["seconds"].items():
            activities[activity] = activities.get(activity, 0.0) + seconds
    other = running - sum(activities.values())
    steps = activities.pop("step", 0.0)
    parts = {"productive": productive, "repeated": steps - productive, "away": wall - running}
    share = productive / wall if wall > 0 else 0.0
    totals = {"goodput": share, "starts": len(history), "wall": wall}
    return {**totals, **parts, **activities, "other": other}


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
