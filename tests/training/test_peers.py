# SPDX-License-Identifier: Apache-2.0
"""Real processes that find and watch each other: plain sockets, no jax."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HOST = socket.gethostname()

# Meets, then does what stdin says: an exit code, or "raise".
PROCESS = """
import sys
from flax_vlm.training.peers import Peers
from flax_vlm.training.roll_call import answer_roll, call_roll, open_port
index, count, port, timeout, silence = map(int, sys.argv[1:])
if index == 0:
    hosts, links = call_roll(open_port(port), count, timeout)
else:
    hosts, links = answer_roll(("localhost", port), index, count, timeout)
with Peers(index, hosts, links, silence) as peers:
    print("met", len(hosts), flush=True)
    order = sys.stdin.readline().strip()
    if order == "raise":
        raise RuntimeError("an error of its own")
    peers.leave(int(order))
print("left", flush=True)
"""


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def start(port):
    started = []

    def start(index, count, timeout=60, silence=30):
        numbers = map(str, (index, count, port, timeout, silence))
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *numbers],
            cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def meet(start, count, **limits):
    processes = [start(index, count, **limits) for index in range(count)]
    assert [p.stdout.readline() for p in processes] == [f"met {count}\n"] * count
    return processes


def end(process):
    """Returns the exit code and what was printed to stderr."""
    return process.wait(timeout=60), process.stderr.read()


def tell(process, order):
    process.stdin.write(f"{order}\n")
    process.stdin.flush()


@pytest.mark.parametrize("victim", [0, 2])
def test_all_end_and_name_the_process_that_was_killed(start, victim):
    processes = meet(start, 4)
    processes[victim].kill()
    for index, process in enumerate(processes):
        code, printed = end(process)
        if index != victim:
            assert code == 69
            assert f"process {victim} of 4 (host {HOST}) is gone" in printed.splitlines()[-1]
            assert f"Process {index} ends too; start all 4 again" in printed.splitlines()[-1]


@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_and_name_the_process_that_fell_silent(start, victim):
    processes = meet(start, 3, silence=3)
    processes[victim].send_signal(signal.SIGSTOP)
    for index, process in enumerate(processes):
        if index != victim:
            code, printed = end(process)
            assert code == 69
            assert f"process {victim} of 3 (host {HOST}) has not been heard from for 3 s" in printed


@pytest.mark.parametrize(("victim", "order"), [(0, "1"), (1, "raise")])
def test_an_error_in_one_process_ends_the_others_with_the_code_of_an_error(start, victim, order):
    processes = meet(start, 3)
    tell(processes[victim], order)
    for index, process in enumerate(processes):
        code, printed = end(process)
        assert code == 1
        if index != victim:
            assert f"process {victim} of 3 (host {HOST}) stopped with an error" in printed
        elif order == "raise":
            assert printed.endswith("RuntimeError: an error of its own\n")


def test_processes_that_fail_together_each_end_with_their_own_error(start):
    processes = meet(start, 3)
    for process in processes:
        tell(process, "raise")
    for code, printed in map(end, processes):
        assert code == 1 and printed.endswith("RuntimeError: an error of its own\n")


def test_processes_that_are_done_leave_one_after_another(start):
    processes = meet(start, 3)
    for process, code in zip((processes[0], processes[2], processes[1]), (0, 75, 0), strict=True):
        tell(process, code)
        assert process.stdout.readline() == "left\n"
        assert end(process) == (0, "")


def test_the_processes_that_have_not_come_are_named(start):
    for process in [start(index, 5, timeout=4) for index in (0, 2, 3)]:
        code, printed = end(process)
        assert code == 1
        assert "after 4 s 3 of 5 processes are here, missing: 1, 4" in printed.splitlines()[-1]


def test_process_0_that_has_not_come_is_named_with_its_address(start, port):
    code, printed = end(start(1, 2, timeout=1))
    assert code == 1 and f"process 0 of 2 did not answer at localhost:{port} within 1 s" in printed


def test_two_processes_of_one_number_and_other_counts_are_refused(start):
    first, twins = start(0, 3), [start(1, 3), start(1, 3)]
    deadline = time.monotonic() + 60
    while all(p.poll() is None for p in twins) and time.monotonic() < deadline:
        time.sleep(0.05)
    twins.sort(key=lambda process: process.poll() is None)
    code, printed = end(twins[0])
    assert code == 1 and f"--process_id=1 is also that of a process on {HOST}" in printed
    code, printed = end(start(2, 4))
    assert code == 1 and "--num_processes is 4 here and 3 in process 0" in printed
    assert {p.stdout.readline() for p in (first, twins[1], start(2, 3))} == {"met 3\n"}


def test_strangers_are_dropped_and_one_that_died_can_come_again(start, port):
    first, second = start(0, 3), start(1, 3)
    connected = False
    while not connected:
        with socket.socket() as stranger:
            connected = not stranger.connect_ex(("localhost", port))
            if connected:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert stranger.recv(1) == b""
    third = start(2, 3)
    third.kill()
    assert {p.stdout.readline() for p in (first, second, start(2, 3))} == {"met 3\n"}


def test_a_port_that_is_taken_is_named(start, port):
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as taken:
        taken.bind(("", port))
        taken.listen()
        code, printed = end(start(0, 2))
    assert code == 1 and f"listen on port {port}" in printed and os.strerror(98) in printed
