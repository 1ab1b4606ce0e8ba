# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other libraries, in and out: families by the `model_type` of their config.json."""

from flax_vlm.convert import (
    big_vision,
    blip2_vision,
    clip,
    dinov2,
    eva,
    idefics3,
    language_model,
    llava,
    siglip,
    siglip2,
    vit,
)
from flax_vlm.convert.family import Family

FAMILIES: dict[str, Family] = {
    "vit": vit.FAMILY,
    "clip": clip.FAMILY,
    "siglip": siglip.FAMILY,
    "siglip2": siglip2.FAMILY,
    "dinov2": dinov2.FAMILY,
    "dinov2_with_registers": dinov2.WITH_REGISTERS,
    "blip_2_vision_model": blip2_vision.FAMILY,
    "timm": eva.TIMM,
    "open_clip": eva.OPEN_CLIP,
    "big_vision": big_vision.FAMILY,
    **language_model.FAMILIES,
    **llava.FAMILIES,
    **idefics3.FAMILIES,
}
