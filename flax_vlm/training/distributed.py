# SPDX-License-Identifier: Apache-2.0
"""Multi-process start, and an agreed stop when the scheduler takes a machine away.

`jax.distributed` finds the coordinator by itself under Slurm, on TPU pods, under OpenMPI and
Kubernetes; anywhere else it must be told. It is never called unasked: on a plain machine it would
only raise that a coordinator address is missing.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

# The exit code of a run that was told to stop, saved its state and can be started again
# (EX_TEMPFAIL of sysexits.h): schedulers requeue on it.
EXIT_PREEMPTED = 75


def start_processes(
    mode: str = "off",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 1800,
) -> None:
    """Connects this process to the others; must run before any other use of jax devices.

    Args:
        mode: "off", "auto" (let jax detect the cluster) or "explicit" (the next three arguments).
        coordinator: "host:port" of process 0.
        num_processes: number of processes in the run.
        process_id: 0 .. num_processes - 1.
        timeout: seconds to wait for the other processes. After a preemption hosts come back
            minutes apart, hence the long default.

    Raises:
        ValueError: for an unknown mode, or an explicit start with an argument missing.
    """
    if mode not in ("off", "auto", "explicit"):
        raise ValueError(f"unknown --distributed {mode!r}, choose one of off, auto, explicit")
    if mode == "off":
        return
    if mode == "auto":
        jax.distributed.initialize(initialization_timeout=timeout)
        return
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if missing:
        raise ValueError(f"--distributed=explicit needs {sorted(given)}, missing {missing}")
    jax.distributed.initialize(
        coordinator, num_processes, process_id, initialization_timeout=timeout
    )


class Preemption:
    """Tells the loop when to stop; a context manager around it.

    One process: SIGTERM sets a flag. Several: jax's coordination service catches the SIGTERM of any
    process and names one step at which all of them stop.
    """

    def __init__(self, start: int = 0):
        """Takes the number of steps that are done when the loop begins."""
        self._start = start

    def __enter__(self) -> Preemption:
        self._signalled = threading.Event()
        # The step that is named is the largest that any process has asked about, plus 1, and only
        # asking about that very step finds it. A notice during start-up, when none was asked about,
        # names 1: a resumed run would never meet it. So all processes ask about the past first.
        if any(self.reached(step) for step in range(1, self._start + 1)):
            self._signalled.set()
        self._previous = None
        # With several processes the coordination service owns SIGTERM; a Python handler would
        # replace it. Only the main thread may install one.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not jax.distributed.is_initialized() and in_main_thread:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled.set()

    def reached(self, step: int) -> bool:
        """Returns whether to stop after `step`; all processes answer alike."""
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            return True
        return self._signalled.is_set()
