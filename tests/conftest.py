# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: 8 virtual CPU devices, float32 matmuls in full precision, a persistent
compilation cache."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub
# A device of XLA's CPU client may wait in two collectives at once, each on a thread of one pool
# that has as many threads as there are devices: all wait, none can join, the process aborts.
os.environ.setdefault("PJRT_NPROC", "32")

import jax

_CACHE = os.environ.get(
    "FLAX_VLM_TEST_CACHE", str(pathlib.Path(tempfile.gettempdir()) / "flax_vlm_test_cache")
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE  # programs that tests start share it
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
