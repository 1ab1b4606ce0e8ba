# SPDX-License-Identifier: Apache-2.0
"""Batch size, sigmoid against softmax, at equal examples seen.

    python -m flax_vlm.tools.ladder run configs/ladders/batch_size.py --out runs/batch --jobs 2
    python -m flax_vlm.tools.ladder commands configs/ladders/batch_size.py:published \
        --out /shared/sweep --on slurm

`digits` (the default) is the miniature: the quickstart's model and data, 25,600 examples, learning
rate proportional to the square root of the batch. `published` is table 5 of SigLIP (Zhai et al.,
2023, arXiv:2303.15343) at its size: B/16 from scratch, 3 and 9 billion examples, one learning rate.
"""

from __future__ import annotations

import math
from typing import Any

from configs.ladders.clusters import slice_for
from flax_vlm.scaling.ladder import Ladder

LOSSES = ("sigmoid", "softmax")
EXAMPLES = 25_600
# in the paper's table 5 the longer run skips small batches, the shorter one two large ones
NOT_PUBLISHED = {(3, 16_384), (3, 307_200), (9, 512), (9, 1024), (9, 2048)}


def digits() -> Ladder:
    """Returns the miniature."""

    def changes(loss: str, batch: int) -> dict[str, Any]:
        steps = EXAMPLES // batch
        return {
            "objective.pair_loss.name": loss,
            "batch_size": batch,
            "steps": steps,
            "optimizer.lr": 2e-3 * math.sqrt(batch / 128),
            "ema_decay": 0.0,
            "checkpoint.every": steps,
            "evals.zero_shot.every": 0,
        }

    return Ladder(
        config="configs/siglip_digits.py",
        dials={"loss": LOSSES, "batch": (16, 32, 64, 128, 256)},
        changes=changes,
        seeds=(0, 1, 2),
        metrics=("zero_shot/accuracy",),
        x="batch",
        curves="loss",
    )


def published() -> Ladder:
    """Returns SigLIP's sweep."""

    def changes(billions: int, loss: str, batch: int) -> dict[str, Any]:
        return {
            "objective.pair_loss.name": loss,
            "batch_size": batch,
            "steps": round(billions * 1e9 / batch),
        }

    return Ladder(
        config="configs/siglip_b16.py:folder:/shared/pairs+folder:/shared/imagenet_val",
        dials={
            "billions": (3, 9),
            "loss": LOSSES,
            "batch": (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 98_304, 307_200),
        },
        changes=changes,
        skip=lambda billions, loss, batch: (billions, batch) in NOT_PUBLISHED,
        metrics=("zero_shot/accuracy",),
        x="batch",
        curves="loss",
        machine=lambda billions, loss, batch: slice_for(batch, per_chip=256),
    )


def get_ladder(size: str = "digits") -> Ladder:
    """Returns the ladder.

    Args:
        size: "digits" or "published".
    """
    return {"digits": digits, "published": published}[size]()
