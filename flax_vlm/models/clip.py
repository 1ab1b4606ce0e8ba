# SPDX-License-Identifier: Apache-2.0
"""CLIP: two towers trained with a softmax over the batch.

Paper: Radford et al. 2021, arXiv:2103.00020; the larger models: OpenCLIP (Cherti et al. 2022,
arXiv:2212.07143). The image tower is a ViT with a class token, a norm before the first block, no
bias in the patch embedding and a bias-free projection; the text tower is causal, pools the
end-of-text token and has a bias-free projection. Epsilon is torch's 1e-5. OpenAI's weights (B/32,
B/16, L/14, L/14-336) use quick_gelu; the others are LAION's and use the exact GELU.

Differs from the paper: the released ResNet towers are absent; MLP biases start at zero; the clamp
of the scale to 100 belongs to the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_vlm.build import lookup
from flax_vlm.models.two_towers import TwoTowers, build_towers

Spec = Mapping[str, Any]


class CLIP(TwoTowers):
    """Two towers with a logit scale that starts at 1 / 0.07 and no bias."""

    init_scale: float = 1 / 0.07
    init_bias: float | None = None


IMAGE_DEFAULTS: dict[str, Any] = dict(
    name="vit",
    pool="cls",
    pre_norm=True,
    patch_bias=False,
    head_bias=False,
    activation="quick_gelu",
    norm_eps=1e-5,
    init_scheme="clip_image",
)
TEXT_DEFAULTS: dict[str, Any] = dict(
    name="text_encoder",
    vocab_size=49_408,
    length=77,
    pool="eos",
    is_causal=True,
    head_bias=False,
    activation="quick_gelu",
    norm_eps=1e-5,
    init_scheme="clip_text",
)


def _preset(
    vision: str, embed_dim: int, text: tuple[int, int, int], activation: str, image_size: int = 224
) -> dict[str, Any]:
    width, depth, num_heads = text
    size = dict(width=width, depth=depth, num_heads=num_heads, mlp_dim=4 * width)
    return {
        "image": {"variant": vision, "image_size": image_size, "activation": activation},
        "text": {**size, "activation": activation},
        "embed_dim": embed_dim,
    }


# Source: open_clip 3.3.0 model configs; the text tower is (width, depth, heads). "G/14" is called
# bigG there.
PRESETS: dict[str, dict[str, Any]] = {
    "S/32": _preset("S/32", 384, (384, 12, 6), "gelu_erf"),
    "S/16": _preset("S/16", 384, (384, 12, 6), "gelu_erf"),
    "M/32": _preset("M/32", 512, (512, 12, 8), "gelu_erf"),
    "M/16": _preset("M/16", 512, (512, 12, 8), "gelu_erf"),
    "B/32": _preset("B/32", 512, (512, 12, 8), "quick_gelu"),
    "B/16": _preset("B/16", 512, (512, 12, 8), "quick_gelu"),
    "L/14": _preset("L/14", 768, (768, 12, 12), "quick_gelu"),
    "L/14-336": _preset("L/14", 768, (768, 12, 12), "quick_gelu", 336),
    "H/14": _preset("H/14", 1024, (1024, 24, 16), "gelu_erf"),
    "g/14": _preset("g/14", 1024, (1024, 24, 16), "gelu_erf"),
    "G/14": _preset("G/14", 1280, (1280, 32, 20), "gelu_erf"),
    "e/14": _preset("e/14", 1280, (1280, 36, 20), "gelu_erf"),
}


def build_clip(
    variant: str | None = None,
    *,
    image: Spec | None = None,
    text: Spec | None = None,
    embed_dim: int | None = None,
    init_scale: float = 1 / 0.07,
) -> CLIP:
    """Returns a CLIP model.

    Args:
        variant: a key of PRESETS, a released model; None takes the sizes of both towers from
            `image` and `text`.
        image: {"name": "vit", "variant": "B/32", "image_size": 224, ...}, added to IMAGE_DEFAULTS
            and the preset's.
        text: {"name": "text_encoder", "variant": "M", ...}, added to TEXT_DEFAULTS and the
            preset's. With a tokenizer whose end-of-text id is not the largest, give its `eos_id`.
        embed_dim: E; None takes the preset's, or the text tower's width.
        init_scale: initial logit scale, before the logarithm.

    Raises:
        ValueError: for an unknown preset, tower or argument.
    """
    preset = lookup(PRESETS, variant, "CLIP variant") if variant is not None else {}
    image = {**IMAGE_DEFAULTS, **preset.get("image", {}), **dict(image or {})}
    text = {**TEXT_DEFAULTS, **preset.get("text", {}), **dict(text or {})}
    image_tower, text_tower = build_towers(image, text)
    embed_dim = embed_dim or preset.get("embed_dim") or text_tower.width
    return CLIP(
        image_tower.clone(embed_dim=embed_dim),
        text_tower.clone(embed_dim=embed_dim),
        init_scale=init_scale,
    )
