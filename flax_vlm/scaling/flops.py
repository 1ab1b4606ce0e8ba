# SPDX-License-Identifier: Apache-2.0
"""Training FLOPs per example in closed form: the numerator of MFU and the x axis of scaling laws.

Conventions, to be stated wherever a number is shown:

- one multiply-add is 2 FLOPs; matmuls alone are counted (projections, scores q k^T, weights times
  v, patch embedding, heads); softmax, norms, activations, embedding look-ups and the loss are not;
- attention is counted in full, causal or not (MaxText halves causal attention, Levanter does not);
- the backward pass costs twice the forward pass: a trained tower counts 3 times, a frozen one once;
- what rematerialisation computes again is not counted, nor are patches that patch dropout drops.

XLA counts a few per cent more on an unrolled model without remat; its count of a scanned model is
meaningless (the loop's body is counted once). Source: Kaplan et al. 2020,
arXiv:2001.08361, section 2.1; PaLM, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn

from flax_vlm.models.language_model import LanguageModel
from flax_vlm.models.text_encoder import TextEncoder
from flax_vlm.models.two_towers import TwoTowers
from flax_vlm.models.vit import VisionTransformer, ViTClassifier
from flax_vlm.nn.patches import Size, as_pair, grid_size, num_kept
from flax_vlm.scaling.decoder_flops import forward_flops

TOWERS = ("image", "text")
PARTS = (*TOWERS, "encoder")  # what can be frozen


def encoder_flops(
    depth: int, width: int, mlp_dim: int, tokens: int, *, gated_mlp: bool = False
) -> int:
    """Returns the forward FLOPs of a transformer encoder on one sequence.

    depth * (tokens * 2 * (4 D^2 + 2 D M) + 4 tokens^2 D), with 3 D M where the MLP is gated
    """
    matmuls = tokens * 2 * (4 * width * width + (3 if gated_mlp else 2) * width * mlp_dim)
    return depth * (matmuls + 4 * tokens * tokens * width)


def map_head_flops(width: int, mlp_dim: int, tokens: int) -> int:
    """Returns the forward FLOPs of a MAP head: all keys and values, and one query."""
    keys_values = 2 * tokens * 2 * width * width
    return keys_values + 4 * tokens * width + 2 * (2 * width * width + 2 * width * mlp_dim)


def vision_flops(
    model: VisionTransformer, image_size: Size | None = None, channels: int = 3
) -> int:
    """Returns the forward FLOPs of an image encoder on one image, in a training step.

    Args:
        model: a VisionTransformer or ViTClassifier.
        image_size: pixels; None takes the model's.
        channels: C.
    """
    size = model.image_size if image_size is None else image_size
    rows, columns = grid_size(size, model.patch_size, drop_remainder=model.drop_remainder)
    patch_h, patch_w = as_pair(model.patch_size)
    flops = 2 * rows * columns * patch_h * patch_w * channels * model.width
    tokens = num_kept(rows * columns, model.patch_dropout) + model.num_prefix
    flops += encoder_flops(
        model.depth, model.width, model.mlp_dim, tokens, gated_mlp=model.gated_mlp
    )
    if model.pooling == "map":
        flops += map_head_flops(model.width, model.mlp_dim, tokens)
    outputs = model.num_classes if isinstance(model, ViTClassifier) else model.embed_dim or 0
    return flops + 2 * model.width * outputs


def text_flops(model: TextEncoder, text_length: int | None = None) -> int:
    """Returns the forward FLOPs of a text encoder on one text.

    Args:
        model: a TextEncoder.
        text_length: tokens, padding included; None takes the model's context.
    """
    tokens = model.length if text_length is None else text_length
    flops = encoder_flops(model.depth, model.width, model.mlp_dim, tokens)
    return flops + 2 * model.width * (model.embed_dim or 0)


def train_flops_per_example(
    model: nn.Module,
    image_size: Size | None = None,
    text_length: int | None = None,
    frozen: Sequence[str] = (),
) -> int:
    """Returns the FLOPs of one training step divided by its batch size.

    Args:
        model: a VisionTransformer, ViTClassifier, TextEncoder, CLIP or SigLIP.
        image_size: pixels; None takes the model's.
        text_length: tokens per text; None takes the model's context.
        frozen: what is not trained, forward pass alone: towers of a two-tower model ("image",
            "text"), or the "encoder" of a single one (the backward pass of its head is left out).

    Raises:
        ValueError: for a model that has no formula here, or a part that it does not have.
    """
    parts = TOWERS if isinstance(model, TwoTowers) else ("encoder",)
    unknown = [name for name in frozen if name not in parts]
    if unknown:
        raise ValueError(
            f"frozen names parts of a {type(model).__name__} ({list(parts)}), got {unknown}"
        )
    passes = 1 if "encoder" in frozen else 3
    if isinstance(model, VisionTransformer):
        return passes * vision_flops(model, image_size)
    if isinstance(model, TextEncoder):
        return passes * text_flops(model, text_length)
    if isinstance(model, LanguageModel):
        return passes * forward_flops(model, text_length)
    if isinstance(model, TwoTowers):
        image = vision_flops(model.image, image_size)
        text = text_flops(model.text, text_length)
        return image * (1 if "image" in frozen else 3) + text * (1 if "text" in frozen else 3)
    raise ValueError(
        "there is a FLOP formula for vit, text_encoder, clip and siglip, "
        f"got {type(model).__name__}"
    )
