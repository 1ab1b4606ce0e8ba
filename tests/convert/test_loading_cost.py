# SPDX-License-Identifier: Apache-2.0
"""What loading a large folder costs; the times, which belong to a machine, are in
docs/benchmarks.md."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_loading_a_large_folder_takes_less_than_twice_its_size_of_host_memory(tmp_path):
    command = [sys.executable, "benchmarks/loading.py", "--rounds", "1", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["bytes"] > 3.5e9
    assert figures["flax_vlm"]["peak_bytes"] < 2 * figures["bytes"]
