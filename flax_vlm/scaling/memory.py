# SPDX-License-Identifier: Apache-2.0
"""Parameters and activation memory in closed form, per tower.

Activations are what the forward pass keeps for the backward pass, per example and without the
parameters. Per block of T tokens, with s bytes per value of the compute dtype:

    remat "full"           s T D                        the block's input
    remat "dots_no_batch"  s T (5 D + M')               also q, k, v, o and fc1; M' = 2 M if gated
    remat "dots"           + s T D + 4 N T^2            also the attention's output and scores
    remat "none"           everything; the MLP alone keeps 4 to 6 values of width M, by activation

Scores count where XLA computes attention; cuDNN's and splash's kernels do not keep them
(`scores=False`). Left out: masks, one vector per example in the heads, what a step holds besides
(batch, logits of the loss, gradients, optimizer). "none" is as jax 0.10 keeps it; later versions
keep up to a seventh less. Checked against the residuals of `jax.vjp`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.models.text_encoder import TextEncoder
from flax_vlm.models.two_towers import TwoTowers
from flax_vlm.models.vit import VisionTransformer, ViTClassifier
from flax_vlm.nn.patches import Size, as_pair, grid_size
from flax_vlm.nn.resampler import PerceiverResampler
from flax_vlm.scaling.flops import num_tokens, tower_costs

# values of width M that are kept without rematerialisation, plain and gated MLP
KEPT_BY_MLP = {"gelu_tanh": (6, 8), "gelu_erf": (4, 6), "quick_gelu": (4, 6), "silu": (4, 6)}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Returns {tower: number of parameters}; "logits" holds scale and bias of two towers.

    Args:
        model: a VisionTransformer, ViTClassifier, TextEncoder, CLIP or SigLIP.

    Raises:
        ValueError: for a model that has no formula here.
    """
    counts = tower_costs(model, PARAMETERS)
    if isinstance(model, TwoTowers):
        counts["logits"] = 1 + (model.init_bias is not None)
    return counts


def activation_bytes(
    model: nn.Module,
    image_size: Size | None = None,
    text_length: int | None = None,
    *,
    scores: bool = True,
) -> dict[str, int]:
    """Returns {tower: bytes kept for the backward pass, per example}.

    The models' fields remat and dtype decide.

    Args:
        model: a VisionTransformer, ViTClassifier, TextEncoder, CLIP or SigLIP.
        image_size: pixels; None takes the model's.
        text_length: tokens per text; None takes the model's context.
        scores: attention keeps its scores, N T^2 values, for policies that keep what it computes.

    Raises:
        ValueError: for a model that has no formula here.
    """
    return tower_costs(model, ACTIVATIONS, image_size, text_length, scores=scores)


def mlp_parameters(width: int, mlp_dim: int, *, gated: bool = False) -> int:
    """Returns the number of parameters of an MLP with biases."""
    return (2 + gated) * width * mlp_dim + (1 + gated) * mlp_dim + width


def block_parameters(model: VisionTransformer | TextEncoder) -> int:
    """Returns the number of parameters of one block: 4 D^2 + 2 D M, norms and biases."""
    width, mlp_dim = model.width, model.mlp_dim
    biases = len(getattr(model, "qkv_bias", "qkv")) + 1
    count = 4 * width * width + biases * width + 4 * width  # two norms
    count += mlp_parameters(width, mlp_dim, gated=getattr(model, "gated_mlp", False))
    if getattr(model, "sub_norm", False):
        count += 2 * width + 2 * mlp_dim
    if getattr(model, "layer_scale", None) is not None:
        count += 2 * width
    return count


def _head_parameters(model: VisionTransformer | TextEncoder) -> int:
    if isinstance(model, ViTClassifier):
        return (model.width + 1) * model.num_classes
    return (model.width + model.head_bias) * (model.embed_dim or 0)


def vision_parameters(model: VisionTransformer, image_size: Size | None = None) -> int:
    """Returns the number of parameters of an image encoder; positions are those of `image_size`."""
    width = model.width
    patch_h, patch_w = as_pair(model.patch_size)
    size = model.image_size if image_size is None else image_size
    rows, columns = grid_size(size, model.patch_size, drop_remainder=model.drop_remainder)
    vectors = model.patch_bias + model.class_token + model.num_registers + model.mask_token
    vectors += 2 * model.pre_norm + 2  # the final norm
    if model.position_embedding == "learned":
        vectors += rows * columns + (model.class_token and model.class_position)
    count = width * (3 * patch_h * patch_w + vectors) + model.depth * block_parameters(model)
    if model.pooling == "map":  # probe, attention, norm
        count += 4 * width * width + 7 * width + mlp_parameters(width, model.mlp_dim)
    if model.pooling == "resampler":
        count += resampler_parameters(width, PerceiverResampler(**model.resampler))
    return count + _head_parameters(model)


def resampler_parameters(width: int, resampler: PerceiverResampler) -> int:
    """Returns the number of parameters of a Perceiver Resampler of that width."""
    block = 4 * width * resampler.num_heads * resampler.head_dim  # q, k, v, o
    block += 2 * resampler.mlp_ratio * width * width + 6 * width  # feed-forward net, three norms
    block += 4 * resampler.head_dim if resampler.qk_norm else 0
    vectors = resampler.num_latents + resampler.num_frames + 2  # the final norm
    return resampler.depth * block + vectors * width


def text_parameters(model: TextEncoder, text_length: int | None = None) -> int:
    """Returns the number of parameters of a text encoder, embeddings included."""
    length = model.length if text_length is None else text_length
    count = model.width * (model.vocab_size + length + 2) + model.depth * block_parameters(model)
    return count + _head_parameters(model)


def _norm_bytes(tokens: int, width: int, itemsize: int) -> int:
    return 4 * tokens * (3 * width + 2) + itemsize * tokens * width


def block_bytes(model: VisionTransformer | TextEncoder, tokens: int, *, scores: bool = True) -> int:
    """Returns the bytes that one block keeps for the backward pass, per example.

    Args:
        model: an encoder, with its remat and dtype.
        tokens: T.
        scores: attention keeps its scores.
    """
    item, width, mlp_dim = jnp.dtype(model.dtype).itemsize, model.width, model.mlp_dim
    gated = getattr(model, "gated_mlp", False)
    square = model.num_heads * tokens * tokens if scores else 0
    if model.remat == "full":
        return item * tokens * width
    if model.remat.startswith("dots"):
        kept = item * tokens * (5 * width + (1 + gated) * mlp_dim)
        return kept if model.remat == "dots_no_batch" else kept + item * tokens * width + 4 * square
    widths = [width, width, *([width, mlp_dim] if getattr(model, "sub_norm", False) else [])]
    kept = sum(_norm_bytes(tokens, w, item) for w in widths)
    kept += item * tokens * (4 * width + KEPT_BY_MLP[model.activation][gated] * mlp_dim)
    softmax = 8 * model.num_heads * tokens if scores else 0
    return kept + (4 + item) * square + softmax


def vision_bytes(
    model: VisionTransformer, image_size: Size | None = None, *, scores: bool = True
) -> int:
    """Returns the bytes that an image encoder keeps for the backward pass, per image."""
    if model.pooling == "resampler":
        raise ValueError("there is no formula for the activations of a resampler; ask aot_compile")
    item = jnp.dtype(model.dtype).itemsize
    patches, tokens = num_tokens(model, image_size)
    patch_h, patch_w = as_pair(model.patch_size)
    kept = item * patches * patch_h * patch_w * 3
    kept += model.depth * block_bytes(model, tokens, scores=scores)
    kept += (1 + model.pre_norm) * 4 * tokens * (3 * model.width + 2)
    return kept + (3 * item * tokens * model.width if model.pooling == "map" else 0)


def text_bytes(model: TextEncoder, text_length: int | None = None, *, scores: bool = True) -> int:
    """Returns the bytes that a text encoder keeps for the backward pass, per text."""
    tokens = model.length if text_length is None else text_length
    kept = model.depth * block_bytes(model, tokens, scores=scores)
    return kept + 4 * tokens * (3 * model.width + 2)


# a new kind of encoder is one more line
PARAMETERS: list[tuple[type, Callable[..., int]]] = [
    (VisionTransformer, vision_parameters),
    (TextEncoder, text_parameters),
]
ACTIVATIONS: list[tuple[type, Callable[..., int]]] = [
    (VisionTransformer, vision_bytes),
    (TextEncoder, text_bytes),
]
