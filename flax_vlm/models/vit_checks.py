# SPDX-License-Identifier: Apache-2.0
"""What a vision encoder refuses: fields that contradict each other, and images of another size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flax_vlm.nn.patches import Size, as_pair, num_kept

if TYPE_CHECKING:
    from flax_vlm.models.vit import VisionTransformer

POOLINGS = ("cls", "gap", "map", "resampler")
POSITION_EMBEDDINGS = ("learned", "sincos2d")


def check_choices(model: VisionTransformer) -> None:
    """Raises ValueError if the fields of a VisionTransformer contradict each other."""
    if model.pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {model.pooling!r}, choose one of {list(POOLINGS)}")
    if (model.pooling == "resampler") != (model.resampler is not None):
        raise ValueError(
            f'pooling "resampler" and the field resampler go together, got {model.pooling!r} and '
            f"{model.resampler}"
        )
    if model.pooling == "cls" and not model.class_token:
        raise ValueError('pooling "cls" needs class_token=True, got False; choose "gap" or "map"')
    if model.position_embedding not in POSITION_EMBEDDINGS:
        raise ValueError(
            f"unknown position_embedding {model.position_embedding!r}, "
            f"choose one of {list(POSITION_EMBEDDINGS)}"
        )
    num_kept(1, model.patch_dropout)
    if model.patch_dropout and model.rotary_grid is not None:
        raise ValueError(
            f"rotary positions need every patch, got patch_dropout {model.patch_dropout}; set 0"
        )
    _ = model.grid


def check_image(image: jax.Array, image_size: Size) -> None:
    """Raises ValueError if an image is not float, or has another size than the encoder's."""
    height, width = as_pair(image_size)
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"images must be normalised floats, got {image.dtype}; see batch.normalize_image"
        )
    if image.ndim != 4 or image.shape[1:3] != (height, width):
        raise ValueError(
            f"this encoder was built for images [B, {height}, {width}, C], "
            f"got {tuple(image.shape)}; set image_size, or resize it in the data config"
        )
