# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe to its end in processes of its own, and reads what it measured.

`train.py` and `eval.py` do the work: the same command again goes on where it stopped, and finds a
run that is done.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Sequence

from flax_vlm.training import workdir as layout
from flax_vlm.training.peers import EXIT_PREEMPTED


class RunFailedError(Exception):
    """A program ended with an exit code other than 0."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Programs:
    """The programs that run now, so that all can be told to stop."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        # re-entrant: a second signal may come while the first one's handler holds it
        self._lock = threading.RLock()
        self.stopping = False

    def run(self, name: str, arguments: Sequence[str], folder: pathlib.Path) -> None:
        """Runs train.py or eval.py to its end; its words go to FOLDER.log.

        Raises:
            RunFailedError: if it ends with another code than 0.
        """
        log = folder.with_name(folder.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            with self._lock:
                if self.stopping:
                    raise RunFailedError(EXIT_PREEMPTED, f"{folder} is left for the next time")
                command = [sys.executable, name, *arguments]
                program = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
                self._running.add(program)
            code = program.wait()
            with self._lock:
                self._running.discard(program)
        if code and self.stopping:  # one that had hardly started ends by the signal itself
            raise RunFailedError(EXIT_PREEMPTED, f"{folder} was told to stop; start again to go on")
        if code:
            last = log.read_text().strip().rpartition("\n")[2]
            raise RunFailedError(code, f"{name} of {folder} ended with {code}, see {log}: {last}")

    def stop(self) -> None:
        """Tells all to save and end (SIGTERM), and starts no more."""
        with self._lock:
            self.stopping = True
            for program in self._running:
                program.terminate()


def finish_run(programs: Programs, flags: Sequence[str], folder: pathlib.Path) -> None:
    """Trains a workdir to its end, or goes on, or finds it done; then evaluates it if need be.

    Args:
        programs: that run.
        flags: of train.py, without the workdir.
        folder: the workdir.

    Raises:
        RunFailedError: if train.py or eval.py fails.
    """
    programs.run("train.py", [*flags, f"--workdir={folder}"], folder)
    # a run that was stopped between its last step and its evaluation has nothing left to train
    if not last_evaluation(folder).exists():
        programs.run("eval.py", [f"--workdir={folder}"], folder)


def last_evaluation(folder: pathlib.Path) -> pathlib.Path:
    """Returns where the results after the last step of a workdir are, or will be."""
    return folder / "eval" / f"{layout.load_config(folder)['steps']}.json"


def read_metrics(folder: pathlib.Path, metrics: Sequence[str]) -> dict[str, float]:
    """Returns {metric: value} of a workdir that is done.

    Args:
        folder: the workdir.
        metrics: "EVALUATOR/NAME", after the last step; "train/NAME", of metrics.jsonl, the mean
            over the last tenth of the logged steps.

    Raises:
        ValueError: if a metric is not there, with those that are.
    """
    found = json.loads(last_evaluation(folder).read_text())
    logged = [row for row in layout.history(folder) if not any(k.startswith("eval/") for k in row)]
    tail = logged[-max(1, len(logged) // 10) :]
    for name in tail[0] if tail else ():
        if isinstance(tail[0][name], float):
            found[f"train/{name}"] = sum(row[name] for row in tail) / len(tail)
    missing = [metric for metric in metrics if metric not in found]
    if missing:
        raise ValueError(f"{folder} has no {missing}, choose among {sorted(found)}")
    return {metric: found[metric] for metric in metrics}
