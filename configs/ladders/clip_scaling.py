# SPDX-License-Identifier: Apache-2.0
"""Model size against examples seen: reproducible scaling laws of CLIP.

    python -m flax_vlm.tools.ladder run configs/ladders/clip_scaling.py --out runs/clip --jobs 2
    python -m flax_vlm.tools.ladder fit configs/ladders/clip_scaling.py --out runs/clip --form power
    python -m flax_vlm.tools.ladder commands configs/ladders/clip_scaling.py:published \
        --out /shared/clip --on slurm

`published` is the grid of Cherti et al., 2022, arXiv:2212.07143, on one data set: six models, 3, 13
and 34 billion pairs (12.8 is their "13"). `shapes` (the default): three widths, three numbers of
scenes, every scene seen once.
"""

from __future__ import annotations

from typing import Any

from configs.ladders.clusters import slice_for
from configs.ladders.shapes_sizes import sized
from flax_vlm.scaling.ladder import Ladder

BATCH = 86_016  # published
SHAPES_BATCH = 32
MODELS = ("B/32", "B/16", "L/14", "H/14", "g/14", "G/14")


def shapes() -> Ladder:
    """Returns the miniature."""

    def changes(width: int, scenes: int) -> dict[str, Any]:
        return {
            **sized(width, scenes // SHAPES_BATCH),
            "objective.pair_loss.name": "softmax",
            "data.options.train_size": 80_000,
            "batch_size": SHAPES_BATCH,
            "optimizer.lr": 1e-3 * 64 / width,
            "log_every": 1,
        }

    return Ladder(
        config="configs/siglip_shapes.py",
        dials={"width": (24, 48, 80), "scenes": (6_400, 19_200, 38_400)},
        changes=changes,
        metrics=("train/loss", "retrieval/i2t@1"),
        curves="width",
        x="scenes",
    )


def published() -> Ladder:
    """Returns the grid of the paper."""
    return Ladder(
        config="configs/clip.py:{model},folder:/shared/pairs+folder:/shared/imagenet_val",
        dials={"model": MODELS, "billions": (3, 12.8, 34)},
        changes=lambda model, billions: {"steps": round(billions * 1e9 / BATCH)},
        metrics=("zero_shot/accuracy",),
        curves="model",
        x="billions",
        machine=lambda model, billions: slice_for(BATCH, per_chip=336),
    )


def get_ladder(size: str = "shapes") -> Ladder:
    """Returns the ladder.

    Args:
        size: "shapes" or "published".
    """
    return {"shapes": shapes, "published": published}[size]()
