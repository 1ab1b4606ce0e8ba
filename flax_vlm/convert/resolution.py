# SPDX-License-Identifier: Apache-2.0
"""Another image size for a loaded checkpoint: its positions are resampled as its family does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.family import drops_remainder
from flax_vlm.convert.loading import Pretrained
from flax_vlm.models import MODELS
from flax_vlm.nn.positions import resize_positions


def with_image_size(loaded: Pretrained, image_size: int | Sequence[int]) -> Pretrained:
    """Returns the checkpoint for images of another size.

    Args:
        loaded: an image encoder or a two-tower model with learned positions.
        image_size: pixels, a number or (height, width).

    Raises:
        ValueError: if the patches do not fit the image.
    """
    two_towers = "image" in loaded.spec
    spec = {**(loaded.spec["image"] if two_towers else loaded.spec)}
    spec |= {
        "image_size": image_size,
        "drop_remainder": drops_remainder(image_size, spec["patch_size"]),
    }
    new_spec = {**loaded.spec, "image": spec} if two_towers else spec
    old, new = (build(MODELS, s, "model") for s in (loaded.spec, new_spec))
    old, new = (m.image if two_towers else m for m in (old, new))
    tower = loaded.params["image"] if two_towers else loaded.params
    positions = resize_positions(
        np.asarray(tower["positions"]),
        old.grid,
        new.grid,
        method=FAMILIES[loaded.model_type].resize,
        num_prefix=int(old.class_token and old.class_position),
    )
    tower = {**tower, "positions": positions}
    params = {**loaded.params, "image": tower} if two_towers else tower
    return dataclasses.replace(loaded, spec=new_spec, params=params)
