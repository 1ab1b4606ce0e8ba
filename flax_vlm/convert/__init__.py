# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other libraries, in and out: families by the `model_type` of their config.json."""

from flax_vlm.convert import clip, dinov2, language_model, siglip, siglip2, vit
from flax_vlm.convert.family import Family

FAMILIES: dict[str, Family] = {
    "vit": vit.FAMILY,
    "clip": clip.FAMILY,
    "siglip": siglip.FAMILY,
    "siglip2": siglip2.FAMILY,
    "dinov2": dinov2.FAMILY,
    "dinov2_with_registers": dinov2.WITH_REGISTERS,
    **language_model.FAMILIES,
}
