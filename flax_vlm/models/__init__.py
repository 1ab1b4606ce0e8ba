# SPDX-License-Identifier: Apache-2.0
"""Models by name: what a config's `model.name` may be."""

from collections.abc import Callable

from flax import linen as nn

from flax_vlm.models.clip import build_clip
from flax_vlm.models.language_model import build_language_model
from flax_vlm.models.llava import build_llava
from flax_vlm.models.siglip import build_siglip
from flax_vlm.models.vit import build_vit

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": build_vit,
    "clip": build_clip,
    "siglip": build_siglip,
    "language_model": build_language_model,
    "llava": build_llava,
}
