# SPDX-License-Identifier: Apache-2.0
"""One process of a run: DEVICES STEP:SIGNAL -- flags of train.py.

It prints which part of the batch it loads, and sends itself the signal after the step ("-" = none).
"""

import os
import runpy
import sys

import jax

devices, order = sys.argv[1:3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(devices))

from flax_vlm.data.pipeline import Dataset  # noqa: E402
from flax_vlm.training.distributed import Preemption  # noqa: E402

batches, reached = Dataset.batches, Preemption.reached


def batches_and_say(self, step, **kwargs):
    print(f"part {kwargs['shard']} of {kwargs['num_shards']} of each batch", flush=True)
    return batches(self, step, **kwargs)


def signal_and_reached(self, step):
    at, _, number = order.partition(":")
    if str(step) == at:
        os.kill(os.getpid(), int(number))
    return reached(self, step)


Dataset.batches, Preemption.reached = batches_and_say, signal_and_reached
sys.argv = ["train.py", *sys.argv[4:]]
runpy.run_path("train.py", run_name="__main__")
