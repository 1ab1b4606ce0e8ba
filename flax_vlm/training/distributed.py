# SPDX-License-Identifier: Apache-2.0
"""Multi-process start, and an agreed stop when the scheduler takes a machine away.

`jax.distributed` finds the coordinator by itself under Slurm, on TPU pods, under OpenMPI and
Kubernetes; anywhere else it must be told. It is never called unasked: on a plain machine it would
only raise that a coordinator address is missing.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_vlm.training.peers import Peers
from flax_vlm.training.roll_call import answer_roll, call_roll, open_port

# jax has a heartbeat of its own, which aborts without saying who is missing. It comes after ours.
_JAX_HEARTBEAT_FACTOR = 2


def start_processes(
    mode: str = "off",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 1800,
    silence: int = 100,
) -> Peers:
    """Connects this process to the others; must run before any other use of jax devices.

    Args:
        mode: "off", "auto" (let jax detect the cluster) or "explicit" (the next three arguments).
        coordinator: "host:port" of process 0.
        num_processes: number of processes in the run.
        process_id: 0 .. num_processes - 1.
        timeout: seconds to wait for the other processes. After a preemption hosts come back
            minutes apart, hence the long default.
        silence: seconds without a word after which a process counts as lost.

    Returns:
        The other processes, watched from now on; enter it around the work, `leave` it at the end.

    Raises:
        ValueError: for an unknown mode, or an explicit start with an argument missing or wrong.
        MissingProcessError: naming the processes that have not come in time.
    """
    if mode not in ("off", "auto", "explicit"):
        raise ValueError(f"unknown --distributed {mode!r}, choose one of off, auto, explicit")
    if silence < 1:
        raise ValueError(f"--heartbeat_timeout must be at least 1 second, got {silence}")
    if mode == "off":
        return Peers()
    limits = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": _JAX_HEARTBEAT_FACTOR * silence,
    }
    if mode == "auto":
        _initialize(**limits)
        return _meet_through_jax(timeout, silence)
    host, port = _check_explicit(coordinator, num_processes, process_id)
    if process_id == 0:  # jax listens on this port afterwards
        hosts, links = call_roll(open_port(port), num_processes, timeout)
    else:
        hosts, links = answer_roll((host, port), process_id, num_processes, timeout)
    peers = Peers(process_id, hosts, links, silence)
    _initialize(coordinator, num_processes, process_id, **limits)
    return peers


def _initialize(*place: str | int, **limits: int) -> None:
    jax.distributed.initialize(*place, **limits)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # On CPU the cache's key of a program names the process, and only process 0 writes. It alone
        # would skip compiling, and its first collective waits no longer than 30 s for the others.
        jax.config.update("jax_enable_compilation_cache", False)


def _check_explicit(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int]:
    """Returns host and port of process 0."""
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if missing:
        raise ValueError(f"--distributed=explicit needs {sorted(given)}, missing {missing}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be one of 0 .. {num_processes - 1} (--num_processes - 1), "
            f"got {process_id}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator must be host:port of process 0, got {coordinator!r}")
    return host.strip("[]"), int(port)


def _meet_through_jax(timeout: int, silence: int) -> Peers:
    """Meets the processes that jax has found: process 0 tells its address through jax."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return Peers()
    server = open_port() if index == 0 else None
    mine = f"{_own_address()} {server.getsockname()[1]}" if server else ""
    padded = np.frombuffer(mine.encode().ljust(256), np.uint8)
    told = multihost_utils.broadcast_one_to_all(padded)
    host, port = np.asarray(told).astype(np.uint8).tobytes().decode().split()
    if server:
        hosts, links = call_roll(server, count, timeout)
    else:
        hosts, links = answer_roll((host, int(port)), index, count, timeout)
    return Peers(index, hosts, links, silence)


def _own_address() -> str:
    """Returns the address by which other machines reach this one, its name if it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # a reserved address: nothing is sent
        return probe.getsockname()[0]
    return socket.gethostname()


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
