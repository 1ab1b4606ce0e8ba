# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 NaFlex in the Hugging Face format (Siglip2Model): any aspect ratio, packed patches.

The SigLIP 2 files of fixed resolution are SigLIP's (siglip.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert.clip import tower_config, vision_fields
from flax_vlm.convert.family import Config, Family, check_value, fill, write_size
from flax_vlm.convert.layers import dense
from flax_vlm.convert.rules import CONV_LINEAR, Rule, Shape
from flax_vlm.convert.siglip import VISION_DEFAULTS, read_text, shared_rules, write_text
from flax_vlm.models.siglip import SigLIP
from flax_vlm.nn.patches import as_pair

NUM_PATCHES = 256  # default of Siglip2VisionConfig; the positions are a square of that many


def read(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model."""
    given = config.get("vision_config")
    vision = fill(given, dict(VISION_DEFAULTS, num_patches=NUM_PATCHES))
    check_value(given, "num_channels", 3)
    check_value(given, "vision_use_head", True)
    count = vision["num_patches"]
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"num_patches of config.json must be a square, got {count}")
    vision["image_size"] = tuple(side * p for p in as_pair(vision["patch_size"]))
    text = read_text(config.get("text_config"))
    return dict(
        name="siglip",
        image={**vision_fields(vision), "name": "naflex_vit"},
        text=text,
        embed_dim=text["embed_dim"],
    )


def write(model: nn.Module) -> dict[str, Any]:
    """Returns config.json."""
    vision = {
        **tower_config(model.image),
        "num_patches": math.prod(model.image.grid),
        "patch_size": write_size(model.image.patch_size),
        "num_channels": 3,
        "model_type": "siglip2_vision_model",
    }
    return dict(
        architectures=["Siglip2Model"],
        vision_config=vision,
        text_config=write_text(model.text, "siglip2_text_model"),
    )


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of SigLIP 2 NaFlex: its patch embedding is a linear layer."""
    patches = dense("vision_model.embeddings.patch_embedding", "image/patches", CONV_LINEAR)
    return [*patches, *shared_rules()]


FAMILY = Family((SigLIP,), read, write, rules, resize="bilinear_antialias")
