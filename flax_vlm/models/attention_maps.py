# SPDX-License-Identifier: Apache-2.0
"""What a model looks at: attention weights over the patches of an image, from the pooled vector of
an encoder, or from every token of a text that a language model reads.

"map": the probe of the pooling head; "cls": the class token in the last block, which is what the
DINO papers draw (Caron et al. 2021, arXiv:2104.14294, figure 1). A mean over the patches ("gap")
has no weights of its own.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from flax_vlm.models.llava import Llava


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


def text_attention(model: Llava, params: Any, text: jax.Array, images: Any, **inputs: Any) -> Any:
    """Returns [B, L, L] float32, mean of the softmax weights over all layers and heads: row l is
    what the l-th token looks at, itself and those before it.

    The columns of an image's placeholders are its visual tokens. Most of the weight lies on the
    first token of a text whatever it is (Xiao et al. 2023, arXiv:2309.17453): compare columns with
    each other, not with one.

    Args:
        model: a Llava.
        params: its parameters.
        text: [B, L] int32, placeholders expanded.
        images: [B, I, H, W, C] float32, normalised.
        **inputs: text_mask, visual_index ..., see Llava.
    """
    variables = {"params": params}
    _, seen = model.apply(variables, text, images, **inputs, mutable=["intermediates"])
    blocks = seen["intermediates"]["language_model"]["blocks"]
    weights = blocks["attention"]["attention_weights"][0]  # [layers, B, N, L, L]
    return weights.mean(axis=(0, 2))
