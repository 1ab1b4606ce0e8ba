# SPDX-License-Identifier: Apache-2.0
"""Weights of a language model in int8, one scale per output channel: a quarter of float32's bytes.

    w ~ round(w / s) s,  s = max |w| over the inputs of a channel / 127

Kernels and the embedding are stored so; norms and biases stay as they are. They become floats again
where they are used, one layer at a time inside the scan. Post-training, weights alone, as in
LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) without its outlier columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_vlm.trees import map_with_path

VALUES, SCALE = "int8", "scale_of_int8"

# Axes, counted from the last, that a channel sums over.
_INPUTS = {
    "q": (-3,),  # [D, N, K]
    "k": (-3,),
    "v": (-3,),
    "o": (-3, -2),  # [N, K, D]
    "fc1": (-2,),  # [D, M]
    "gate": (-2,),
    "fc2": (-2,),
    "lm_head": (-2,),
    "embedding": (-1,),  # [V, D]
}


def quantize(params: Any) -> dict[str, Any]:
    """Returns the parameters for a LanguageModel with weights="int8".

    Args:
        params: of one with weights="float".
    """

    def one(path: str, leaf: jax.Array) -> Any:
        *_, layer, name = ("", *path.split("/"))
        if name not in ("kernel", "embedding"):
            return leaf
        w = jnp.asarray(leaf, jnp.float32)
        scale = jnp.abs(w).max(axis=_INPUTS[layer], keepdims=True) / 127.0
        scale = jnp.maximum(scale, 1e-12)
        return {VALUES: jnp.round(w / scale).astype(jnp.int8), SCALE: scale}

    return map_with_path(one, params)


def dequantize(params: Any) -> Any:
    """Returns the parameters as floats: the inverse of `quantize`, but for the rounding."""
    if not isinstance(params, Mapping):
        return params
    if VALUES in params:
        return params[VALUES].astype(jnp.float32) * params[SCALE]
    return {name: dequantize(value) for name, value in params.items()}
