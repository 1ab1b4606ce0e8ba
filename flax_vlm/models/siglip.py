# SPDX-License-Identifier: Apache-2.0
"""SigLIP and SigLIP 2: two towers trained with a pairwise sigmoid loss.

Papers: Zhai et al. 2023, arXiv:2303.15343; Tschannen et al. 2025, arXiv:2502.14786. The image tower
is a ViT with a MAP head and, where its width is the embedding's, no projection; the text tower sees
its padding, pools the last position and has a projection with bias. Nothing here depends on the
loss: it is losses/contrastive.py that makes the difference.

Differs from big_vision: logit_scale and logit_bias are scalars, not vectors of one element.
Sources: big_vision 0127fb6; open_clip 3.3.0 model configs; the GELU is tanh in both towers, as in
big_vision and Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_vlm.build import lookup
from flax_vlm.models.two_towers import TwoTowers, build_towers
from flax_vlm.models.variants import decode_variant

Spec = Mapping[str, Any]


class SigLIP(TwoTowers):
    """Two towers; the logit scale starts at 10 and the logit bias at -10 (paper, table 4)."""

    init_scale: float = 10.0
    init_bias: float | None = -10.0


def _preset(
    vision: str,
    text: str,
    image_size: int,
    length: int = 64,
    vocab_size: int = 32_000,
    **image: Any,
) -> dict[str, Any]:
    return {
        "image": {"variant": vision, "image_size": image_size, **image},
        "text": {"variant": text, "length": length, "vocab_size": vocab_size},
        "embed_dim": decode_variant(vision)["width"],
    }


_GEMMA = 256_000  # SigLIP 2 reads the Gemma vocabulary
# The released models. "-v2" is SigLIP 2; a number at the end is the image size.
PRESETS: dict[str, dict[str, Any]] = {
    "B/16": _preset("B/16", "B", 224),
    "B/16-256": _preset("B/16", "B", 256),
    "B/16-384": _preset("B/16", "B", 384),
    "B/16-512": _preset("B/16", "B", 512),
    "B/16-i18n": _preset("B/16", "B", 256, vocab_size=250_000),
    "L/16": _preset("L/16", "L", 256),
    "L/16-384": _preset("L/16", "L", 384),
    "So400m/14": _preset("So400m/14", "So400m", 224, length=16),
    # 384 is no multiple of 14: 27 x 27 patches, the border is not seen
    "So400m/14-384": _preset("So400m/14", "So400m", 384, drop_remainder=True),
    "B/16-v2": _preset("B/16", "B", 224, vocab_size=_GEMMA),
    "L/16-v2": _preset("L/16", "L", 256, vocab_size=_GEMMA),
    "So400m/14-v2": _preset("So400m/14", "So400m", 224, vocab_size=_GEMMA),
    "So400m/16-v2": _preset("So400m/16", "So400m", 256, vocab_size=_GEMMA),
    "g-opt/16-v2": _preset("g-opt/16", "So400m", 256, vocab_size=_GEMMA),
}


def build_siglip(
    variant: str | None = None,
    *,
    image: Spec | None = None,
    text: Spec | None = None,
    embed_dim: int | None = None,
    init_scale: float = 10.0,
    init_bias: float = -10.0,
) -> SigLIP:
    """Returns a SigLIP model.

    Args:
        variant: a key of PRESETS, a released model; None takes both towers from `image` and `text`.
        image: {"name": "vit", "variant": "B/16", "image_size": 224, ...}, added to the preset's;
            pool is "map" unless given.
        text: {"name": "text_encoder", "variant": "B", "vocab_size": 32000, "length": 64, ...},
            likewise.
        embed_dim: E; None takes the preset's, or the image tower's width. The image tower gets a
            projection only if its width differs.
        init_scale: initial logit scale, before the logarithm.
        init_bias: initial logit bias.

    Raises:
        ValueError: for an unknown preset, tower or argument.
    """
    preset = lookup(PRESETS, variant, "SigLIP variant") if variant is not None else {}
    image = {"name": "vit", "pool": "map", **preset.get("image", {}), **dict(image or {})}
    text = {"name": "text_encoder", **preset.get("text", {}), **dict(text or {})}
    image_tower, text_tower = build_towers(image, text)
    embed_dim = embed_dim or preset.get("embed_dim") or image_tower.width
    if image_tower.width != embed_dim:
        image_tower = image_tower.clone(embed_dim=embed_dim)
    return SigLIP(
        image_tower,
        text_tower.clone(embed_dim=embed_dim),
        init_scale=init_scale,
        init_bias=init_bias,
    )
