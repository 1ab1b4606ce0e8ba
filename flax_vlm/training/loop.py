# SPDX-License-Identifier: Apache-2.0
"""The training loop: one for every objective.

    for step in start + 1 .. steps:
        batch -> step -> (log) -> (checkpoint) -> (evaluate) -> stop if preempted

Metrics are read from the device one step late, so that the device never waits for the host. No
implicit transfer between host and device happens inside (`jax.transfer_guard`).
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flax_vlm.meters import Mean
from flax_vlm.training.checkpoints import Checkpoints
from flax_vlm.training.distributed import Preemption
from flax_vlm.training.metrics import Writers
from flax_vlm.training.nonfinite import NonFiniteGuard
from flax_vlm.training.profiling import Stopwatch, TraceWindow
from flax_vlm.training.state import TrainState

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Something to run now and then.

    Attributes:
        run: (state, step) -> None; writes what it finds itself.
        every: steps between two runs; 0 = only after the last step.
    """

    run: Callable[[TrainState, int], None]
    every: int = 0

    def is_due(self, step: int, last: int) -> bool:
        """Returns whether to run after `step`."""
        return step == last or (self.every > 0 and step % self.every == 0)


@dataclasses.dataclass
class Loop:
    """What the loop needs to know; `run` is the loop.

    Attributes:
        train_step: jitted (state, batch) -> (state, metrics); donates the state.
        batches: step -> endless iterator of this process's rows, from that step on.
        put: host rows -> global device arrays.
        account: removes the host's accounts from a batch (broken images ...) and counts them.
        steps: last step.
        batch_size: global, in examples.
        log_every: steps between two rows of metrics.
        flops_per_example: of one training step, for MFU.
        peak_flops: of all devices together.
    """

    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    batches: Callable[[int], Iterator[HostBatch]]
    put: Callable[[HostBatch], dict[str, jax.Array]]
    account: Callable[[HostBatch], HostBatch]
    steps: int
    batch_size: int
    log_every: int
    flops_per_example: float
    peak_flops: float
    checkpoints: Checkpoints
    writers: Writers
    evaluations: Sequence[Evaluation] = ()
    nonfinite: NonFiniteGuard = dataclasses.field(default_factory=NonFiniteGuard)
    trace: TraceWindow | None = None
    stopwatch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
    show_progress: bool = True

    def run(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """Trains from `start` finished steps on.

        Returns:
            The last state, and whether all steps were done; False means that the process was told
            to stop (SIGTERM) and has saved its state.

        Raises:
            NonFiniteError: by the policy of `nonfinite`.
            CheckpointError: if a checkpoint could not be written.
        """
        self._pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._window = (start, time.perf_counter(), self._data_wait())
        batches = self.batches(start)
        bar = tqdm(
            total=self.steps,
            initial=start,
            unit="step",
            disable=not (self.show_progress and jax.process_index() == 0),
            mininterval=0.5,
        )
        self.last_step = step = self._start = start
        try:
            with bar, Preemption(start) as preemption, jax.transfer_guard("disallow"):
                while step < self.steps:
                    state = self._one_step(state, batches, step + 1, bar)
                    self.last_step = step = step + 1
                    self._periodic(state, step)
                    if step < self.steps and preemption.reached(step):
                        break
                with self.stopwatch.measure("step"):
                    self._flush(keep=0, bar=bar)
            self._save(state, step)
            with self.stopwatch.measure("checkpoint"):
                self.checkpoints.wait()
        finally:
            batches.close()
            self.writers.flush()
            self.stopwatch.record(self._start, self.last_step)
        return state, step == self.steps

    def _one_step(
        self, state: TrainState, batches: Iterator[HostBatch], step: int, bar: tqdm
    ) -> TrainState:
        with self.stopwatch.measure("data"):
            batch = self.put(self.account(next(batches)))
        # the first step compiles
        with self.stopwatch.measure("step" if step > self._start + 1 else "first_step"):
            if self.trace:
                self.trace.before(step)
            state, metrics = self.train_step(state, batch)
            if self.trace:
                self.trace.after(step, metrics["grad_norm"])
            self._pending.append((step, metrics))
            self._flush(keep=1, bar=bar)
        bar.update()
        return state

    def _periodic(self, state: TrainState, step: int) -> None:
        due = [e for e in self.evaluations if e.is_due(step, self.steps)]
        save = self.checkpoints.is_due(step)
        if save or due:
            with self.stopwatch.measure("step"):
                self._flush(keep=0)  # a bad step must stop the run before it is saved
        if save:
            self._save(state, step)
        for evaluation in due:
            with self.stopwatch.measure("evaluation"):
                evaluation.run(state, step)
        if due or save:
            self._window = (step, time.perf_counter(), self._data_wait())

    def _save(self, state: TrainState, step: int) -> None:
        with self.stopwatch.measure("checkpoint"):
            self.writers.flush()
            self.checkpoints.save(step, state)
        self.stopwatch.record(self._start, step)

    def _flush(self, keep: int, bar: tqdm | None = None) -> None:
        """Reads and reports the metrics of all but the `keep` newest steps."""
        while len(self._pending) > keep:
            step, metrics = self._pending.popleft()
            flags = jax.device_get(metrics.pop("nonfinite"))
            if step % self.log_every == 0 or step == self.steps:
                row = _to_host(metrics)
                if self.nonfinite.policy == "skip":
                    row["skipped_steps"] = self.nonfinite.skipped + any(flags.values())
                row |= self._speed(step)
                self.writers.scalars(step, row)
                if bar is not None:
                    bar.set_postfix(_postfix(row), refresh=False)
            self.nonfinite.check(step, flags)

    def _speed(self, step: int) -> dict[str, float]:
        """Returns throughput since the last logged step; evaluation and saving are left out."""
        first, since, waited = self._window
        now = time.perf_counter()
        seconds = max(now - since, 1e-9)
        rate = max(step - first, 1) * self.batch_size / seconds
        wait = (self._data_wait() - waited) / seconds
        self._window = (step, now, self._data_wait())
        return {
            "examples_per_second": rate,
            "mfu": rate * self.flops_per_example / self.peak_flops,
            "data_wait": wait,
        }

    def _data_wait(self) -> float:
        return self.stopwatch.seconds.get("data", 0.0)


def _to_host(metrics: Mapping[str, Any]) -> dict[str, float]:
    metrics = jax.device_get(metrics)
    return {key: float(_value(m)) for key, m in metrics.items()}


def _value(metric: Any) -> float:
    if isinstance(metric, Mean):  # divided on the host: no device arithmetic under the guard
        return metric.total / metric.weight if metric.weight > 0 else 0.0
    return metric


def _postfix(row: Mapping[str, float]) -> dict[str, str]:
    return {
        "loss": f"{row['loss']:.4g}",
        "ex/s": f"{row['examples_per_second']:.0f}",
        "mfu": f"{100 * row['mfu']:.1f}%",
    }
