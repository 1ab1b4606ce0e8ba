# SPDX-License-Identifier: Apache-2.0
"""The image of a batch as a model takes it: pixels of one size, or packed patches (NaFlex)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from flax_vlm.batch import normalize_image
from flax_vlm.models.naflex import PackedPatches
from flax_vlm.objectives.base import Batch


def image_input(
    batch: Batch, mean: Sequence[float], std: Sequence[float]
) -> jax.Array | PackedPatches:
    """Returns [B, H, W, C] float32, or PackedPatches where the batch has "patches"; normalised.

    Args:
        batch: "image" [B, H, W, C], or "patches" [B, P, h w C] and "spatial_shape" [B, 2]; uint8 is
            normalised here, float32 is taken as it is.
        mean: per channel, in units of x / 255.
        std: per channel, in units of x / 255.
    """
    if "patches" not in batch:
        return normalize_image(batch["image"], mean, std)
    patches = batch["patches"]  # [B, P, h w C]
    pixels = patches.reshape(*patches.shape[:2], -1, len(mean))  # [B, P, h w, C]
    pixels = normalize_image(pixels, mean, std).reshape(patches.shape)
    return PackedPatches(pixels, batch["spatial_shape"])
