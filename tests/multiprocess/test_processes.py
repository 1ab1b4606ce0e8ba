# SPDX-License-Identifier: Apache-2.0
"""Real processes that talk over localhost: the same run as with one, and what happens when one is
told to stop, killed or missing.
"""

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
from tests.integration.conftest import ROOT, SGD_CONFIG, overrides

HOST = socket.gethostname()
START_SECONDS = 900  # four processes compile on two cores that others may be using
END_SECONDS = 90  # in which all must have ended after one was lost


def start(folder, data_dir, count, *extra, devices=2, orders=(), auto=False, **values):
    """Starts the processes of one run; `orders` is {process: (step, signal)}."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = overrides({"data.dir": data_dir, **values})
    found = []
    for rank in range(count):
        order = ":".join(str(int(x)) for x in dict(orders).get(rank, ()))
        command = [sys.executable, "tests/multiprocess/worker.py", str(devices), order or "-", "--"]
        command += ["--config", SGD_CONFIG, "--workdir", str(folder), *flags, *extra]
        # optimizing a program that runs for 12 steps takes longer than it saves
        env = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if auto:
            command.append("--distributed=auto")
            env |= slurm(rank, count, port)
        elif count > 1:
            command += ["--distributed=explicit", f"--coordinator=localhost:{port}"]
            command += [f"--num_processes={count}", f"--process_id={rank}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        found.append(
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, text=True, **pipes)
        )
    return found


def slurm(rank, count, port):
    """What Slurm tells a process."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "JAX_COORDINATOR_PORT": str(port),
    }


def finish(processes, timeout=START_SECONDS):
    """Returns exit codes and what each process printed."""
    deadline = time.monotonic() + timeout
    try:
        printed = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], printed


def finish_after_loss(processes, lost):
    """Waits for one process to die, then a bounded time for the others."""
    processes[lost].wait(timeout=START_SECONDS)
    assert processes[lost].returncode == -signal.SIGKILL, processes[lost].stdout.read()[-3000:]
    codes, printed = finish(processes, timeout=END_SECONDS)
    for rank, (code, text) in enumerate(zip(codes, printed, strict=True)):
        if rank != lost:
            assert code == 69, text[-3000:]
            assert f"process {lost} of {len(codes)} (host {HOST}) is gone" in text.splitlines()[-1]


def run(*args, code=0, **kwargs):
    codes, printed = finish(start(*args, **kwargs))
    assert codes == [code] * len(codes), "\n".join(text[-3000:] for text in printed)
    return printed


def losses(folder, first=1, last=12):
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows][first - 1 : last] == [*range(first, last + 1)]
    return np.array([row["loss"] for row in rows[first - 1 : last]])


def saved(folder):
    return max(int(f.name) for f in (folder / "checkpoints").iterdir() if f.name.isdecimal())


def assert_same_run(folder, other, last=12):
    np.testing.assert_allclose(losses(folder, last=last), losses(other, last=last), rtol=2e-5)


def assert_same_parameters(folder, other):
    (mine, _, step), (theirs, _, _) = (load_params(f / "checkpoints") for f in (folder, other))
    assert step == 12
    theirs = trees.named_leaves(theirs)
    for path, x in trees.named_leaves(mine).items():
        np.testing.assert_allclose(x, theirs[path], rtol=2e-5, atol=2e-5, err_msg=path)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data_dir):
    """An uninterrupted run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("reference")
    run(folder, data_dir, 1, devices=8)
    found = losses(folder)
    assert found[0] > 10 > 5 > found[-1] and len(set(found)) == 12, "it learns"
    return folder


def test_two_processes_that_slurm_started_train_like_one(reference, tmp_path, data_dir):
    printed = run(tmp_path, data_dir, 2, auto=True, **{"mesh.fsdp": 2, "checkpoint.every": 4})
    assert_same_run(tmp_path, reference)
    assert_same_parameters(tmp_path, reference)
    assert [f"part {rank} of 2 of each batch" in text for rank, text in enumerate(printed)] == [
        1
    ] * 2


def test_four_processes_share_a_tensor_axis_and_stop_together_on_sigterm_to_one(
    reference, tmp_path, data_dir
):
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 4}  # of two devices each: two hold one model
    orders = {2: (3, signal.SIGTERM)}
    printed = run(tmp_path, data_dir, 4, code=75, orders=orders, steps=3000, **mesh)
    for rank, text in enumerate(printed):
        assert f"part {rank // 2} of 2 of each batch" in text
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert 3 <= last < 3000 and saved(tmp_path) == last
    assert all(f"stopped at step {last} of 3000" in text for text in printed)
    assert_same_run(tmp_path, reference, last=min(last, 12))


def test_a_killed_process_is_named_and_4_then_2_then_1_go_on_like_one(
    reference, tmp_path, data_dir
):
    every = {"checkpoint.every": 2}
    processes = start(tmp_path, data_dir, 4, orders={2: (5, signal.SIGKILL)}, **every)
    finish_after_loss(processes, lost=2)
    assert saved(tmp_path) in (2, 4)
    # process 0 hosts jax's coordination service
    processes = start(tmp_path, data_dir, 2, orders={0: (9, signal.SIGKILL)}, **every)
    finish_after_loss(processes, lost=0)
    assert saved(tmp_path) in (6, 8)
    run(tmp_path, data_dir, 1, devices=2, **every)
    assert_same_run(tmp_path, reference)
    assert_same_parameters(tmp_path, reference)


def test_two_processes_go_on_where_one_was_told_to_stop(reference, tmp_path, data_dir):
    run(tmp_path, data_dir, 1, code=75, orders={0: (5, signal.SIGTERM)})
    assert saved(tmp_path) == 5
    run(tmp_path, data_dir, 2, **{"mesh.tensor": 4})
    assert_same_run(tmp_path, reference)
    assert_same_parameters(tmp_path, reference)


def test_a_process_that_does_not_come_is_named(tmp_path, data_dir):
    processes = start(tmp_path, data_dir, 3, "--start_timeout=2")
    processes[1].kill()
    codes, printed = finish(processes)
    assert codes == [1, -signal.SIGKILL, 1]
    for text in printed[::2]:
        assert "2 of 3 processes are here, missing: 1" in text.splitlines()[-1]
