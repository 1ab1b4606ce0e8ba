# SPDX-License-Identifier: Apache-2.0
"""Weights of a language model in int8: which axes of which kernel share a scale.

Kernels and the embedding are stored in int8 (nn/int8.py), a quarter of float32's bytes; norms and
biases stay as they are. Kernels of the blocks become floats again one layer at a time, inside the
scan; the output's does so as a whole where the compiler does not fuse it with the product (XLA on
CPU does not).
"""

from __future__ import annotations

from typing import Any

import jax

from flax_vlm.nn.int8 import quantize_kernel
from flax_vlm.trees import map_with_path

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
        return quantize_kernel(leaf, _INPUTS[layer]) if name in ("kernel", "embedding") else leaf

    return map_with_path(one, params)
