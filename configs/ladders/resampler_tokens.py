# SPDX-License-Identifier: Apache-2.0
"""Visual tokens: how many latents does a Perceiver Resampler need on the shapes world?

    python -m flax_vlm.tools.ladder run configs/ladders/resampler_tokens.py --out runs/r --jobs 2
    python -m flax_vlm.tools.ladder commands configs/ladders/resampler_tokens.py:siglip \
        --out /shared/resampler --on slurm

Equal steps and examples. `shapes` (the default): 16 patches per image, 25,600 scenes. `siglip`:
SigLIP B/16, 196 patches, 1.28 billion pairs.
"""

from __future__ import annotations

from configs.ladders.clusters import slice_for
from flax_vlm.scaling.ladder import Ladder

BATCH, EXAMPLES = 32_768, 1_280_000_000


def shapes() -> Ladder:
    """Returns the miniature."""
    return Ladder(
        config="configs/shapes_resampler.py:{latents}",
        dials={"latents": (1, 2, 4, 8, 16)},
        seeds=(0, 1, 2),
        metrics=("retrieval/i2t@1", "swapped/accuracy"),
        x="latents",
    )


def siglip() -> Ladder:
    """Returns the ladder at the size of a real model."""
    data = "folder:/shared/pairs+folder:/shared/imagenet_val"
    return Ladder(
        config=f"configs/siglip_b16_resampler.py:{{latents}},{data}",
        dials={"latents": (1, 4, 16, 64, 144)},
        changes=lambda latents: {"batch_size": BATCH, "steps": EXAMPLES // BATCH},
        metrics=("zero_shot/accuracy",),
        x="latents",
        machine=lambda latents: slice_for(BATCH, per_chip=256),
    )


def get_ladder(size: str = "shapes") -> Ladder:
    """Returns the ladder.

    Args:
        size: "shapes" or "siglip".
    """
    return {"shapes": shapes, "siglip": siglip}[size]()
