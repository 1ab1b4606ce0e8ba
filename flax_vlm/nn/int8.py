# SPDX-License-Identifier: Apache-2.0
"""A kernel in int8: {"int8": values, "scale_of_int8": one scale per output channel}.

    w ~ round(w / s) s,  s = max |w| over the inputs of a channel / 127

Post-training, weights alone, as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 2.1)
without its outlier columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

VALUES, SCALE = "int8", "scale_of_int8"


def quantize_kernel(kernel: jax.Array, inputs: Sequence[int]) -> dict[str, jax.Array]:
    """Returns the kernel in int8; off by half a step of each channel.

    Args:
        kernel: of any float dtype.
        inputs: axes that a channel sums over, counted from the last.
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    scale = jnp.abs(kernel).max(axis=tuple(inputs), keepdims=True) / 127.0
    scale = jnp.maximum(scale, 1e-12)
    return {VALUES: jnp.round(kernel / scale).astype(jnp.int8), SCALE: scale}


def dequantize(params: Any) -> Any:
    """Returns a tree of parameters with every kernel in int8 as floats."""
    if not isinstance(params, Mapping):
        return params
    if VALUES in params:
        return params[VALUES].astype(jnp.float32) * params[SCALE]
    return {name: dequantize(value) for name, value in params.items()}
