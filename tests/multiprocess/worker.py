# SPDX-License-Identifier: Apache-2.0
"""One process of a run, with two virtual devices: RANK COUNT PORT -- flags of train.py."""

import runpy
import sys

import jax

rank, count, port = sys.argv[1:4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
sys.argv = ["train.py", *sys.argv[5:]]
if int(count) > 1:
    sys.argv += [
        "--distributed=explicit",
        f"--coordinator=localhost:{port}",
        f"--num_processes={count}",
        f"--process_id={rank}",
    ]
runpy.run_path("train.py", run_name="__main__")
