# SPDX-License-Identifier: Apache-2.0
"""Compute: wider models on more scenes, and whether the law predicts a larger one.

    python -m flax_vlm.tools.ladder run configs/ladders/compute.py --out runs/compute --jobs 2
    python -m flax_vlm.tools.ladder fit configs/ladders/compute.py --out runs/compute

Eight rungs over two decades of training compute on the shapes world, every scene seen once; model
and data grow alike: width with the fourth root of compute, scenes with the square root. What is
measured is the softmax loss among 32 pairs in the last tenth of the steps: on scenes that were
not seen before, so it is a test loss. Learning rate: 1e-3 x 64 / width. The widest rung is held
out: no law is fitted to it.
"""

from __future__ import annotations

from typing import Any

from configs.ladders.shapes_sizes import sized
from flax_vlm.scaling.ladder import Ladder

BATCH = 32
# width: steps
STEPS = {24: 160, 32: 192, 40: 248, 48: 328, 56: 440, 64: 620, 72: 1000, 80: 1660, 104: 2400}
HELD_OUT = 104


def changes(width: int) -> dict[str, Any]:
    """Returns what a width changes."""
    return {
        **sized(width, STEPS[width]),
        "objective.pair_loss.name": "softmax",
        "data.options.train_size": 80_000,
        "batch_size": BATCH,
        "optimizer.lr": 1e-3 * 64 / width,
        "log_every": 1,
    }


def get_ladder() -> Ladder:
    """Returns the ladder."""
    return Ladder(
        config="configs/siglip_shapes.py",
        dials={"width": tuple(STEPS)},
        changes=changes,
        held_out=lambda width: width == HELD_OUT,
        seeds=(0, 1),
        metrics=("train/loss", "retrieval/i2t@1"),
        x="compute",
    )
