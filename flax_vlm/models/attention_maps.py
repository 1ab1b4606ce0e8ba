# SPDX-License-Identifier: Apache-2.0
"""What the pooled vector of an image encoder looks at: attention weights over the patches.

"map": the probe of the pooling head; "cls": the class token in the last block, which is what the
DINO papers draw (Caron et al. 2021, arXiv:2104.14294, figure 1). A mean over the patches ("gap")
has no weights of its own.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn


def pooling_attention(model: nn.Module, params: Any, image: Any) -> jax.Array:
    """Returns [B, N, P] float32: softmax weights per head, those of prefix tokens left out.

    Args:
        model: an image encoder or a two-tower model.
        params: its parameters.
        image: [B, H, W, C] float32, normalised, or PackedPatches.

    Raises:
        ValueError: if the encoder pools by a mean.
    """
    tower, params = (model.image, params["image"]) if hasattr(model, "image") else (model, params)
    if tower.pooling == "gap":
        raise ValueError('a mean over the patches has no attention, got pooling "gap"')
    _, seen = tower.apply({"params": params}, image, mutable=["intermediates"])
    seen = seen["intermediates"]
    if tower.pooling == "map":
        weights = seen["pool"]["attention"]["attention_weights"][0]  # [B, N, 1, T]
    else:
        weights = seen["encoder"]["blocks"]["attention"]["attention_weights"][0][-1]  # [B, N, T, T]
    return weights[:, :, 0, tower.num_prefix :]
