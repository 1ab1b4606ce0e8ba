# SPDX-License-Identifier: Apache-2.0
"""Visual tokens: how many latents does a Perceiver Resampler need on the shapes world?

    python -m flax_vlm.tools.ladder run configs/ladders/resampler_tokens.py --out runs/r --jobs 2

Equal steps and examples; 16 patches per image.
"""

from __future__ import annotations

from flax_vlm.scaling.ladder import Ladder


def get_ladder() -> Ladder:
    """Returns the ladder."""
    return Ladder(
        config="configs/shapes_resampler.py:{latents}",
        dials={"latents": (1, 2, 4, 8, 16)},
        seeds=(0, 1, 2),
        metrics=("retrieval/i2t@1", "swapped/accuracy"),
        x="latents",
    )
