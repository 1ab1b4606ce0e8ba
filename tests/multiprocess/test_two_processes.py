# SPDX-License-Identifier: Apache-2.0
"""Real processes that talk over localhost: the same run as with one, and an agreed stop."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.training.checkpoints import load_params
from flax_vlm.training.metrics import read_metrics
from tests.integration.conftest import ROOT, TINY, overrides


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("datasets"))


def start(folder, data_dir, count, **values):
    """Starts the processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = overrides({**TINY, "data.dir": data_dir, **values})
    command = [sys.executable, "tests/multiprocess/worker.py"]
    run = ["--", "--config", "configs/siglip_digits.py", "--workdir", str(folder), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [*command, str(rank), str(count), str(port), *run],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for rank in range(count)
    ]


def finish(processes, timeout=280):
    try:
        printed = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], printed


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def test_two_processes_train_like_one_and_one_goes_on_where_two_stopped(tmp_path, data_dir):
    one, two = tmp_path / "one", tmp_path / "two"
    codes, printed = finish(start(one, data_dir, 1, **{"checkpoint.every": 4}))
    assert codes == [0], printed[0][-3000:]
    codes, printed = finish(start(two, data_dir, 2, **{"checkpoint.every": 4}))
    assert codes == [0, 0], printed[0][-3000:] + printed[1][-3000:]
    # 2 and 4 devices add in another order
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-3)
    np.testing.assert_allclose(losses(two)[0], losses(one)[0], rtol=2e-5)
    assert "zero_shot/accuracy" in printed[0]
    (a, _, step), (b, _, _) = load_params(one / "checkpoints"), load_params(two / "checkpoints")
    assert step == 12
    gaps = [
        np.abs(x - trees.named_leaves(b)[path]).max() for path, x in trees.named_leaves(a).items()
    ]
    assert max(gaps) < 2e-2


def test_sigterm_to_one_process_stops_both_at_one_saved_step(tmp_path, data_dir):
    processes = start(tmp_path, data_dir, 2, steps=3000, log_every=1)
    deadline = time.monotonic() + 240
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        assert all(p.poll() is None for p in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes, printed = finish(processes)
    assert codes == [75, 75], printed[0][-2000:] + printed[1][-2000:]
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    assert all(f"stopped at step {last} of 3000" in text for text in printed)
