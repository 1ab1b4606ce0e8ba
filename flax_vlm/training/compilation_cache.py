# SPDX-License-Identifier: Apache-2.0
"""The persistent compilation cache: it makes a restart after a preemption cheap."""

from __future__ import annotations

import os
import pathlib

import jax


def enable() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR, or in the user's cache folder.

    On a cluster put it on storage that all hosts share.
    """
    default = pathlib.Path.home() / ".cache" / "flax_vlm" / "xla"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(default))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
