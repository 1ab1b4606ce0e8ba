# SPDX-License-Identifier: Apache-2.0
"""Compute: wider models on more scenes, and whether the law predicts a larger one.

    python -m flax_vlm.tools.ladder run configs/ladders/compute.py --out runs/compute --jobs 2
    python -m flax_vlm.tools.ladder fit configs/ladders/compute.py --out runs/compute

Eight rungs over two decades of training compute on the shapes world, every scene seen once; model
and data grow alike: width with the fourth root of compute, scenes with the square root. What is
measured is the softmax loss among 128 pairs in the last tenth of the steps: on scenes that were
not seen before, so it is a test loss. Learning rate: 2e-3 x 64 / width. The widest rung is held
out: no law is fitted to it.
"""

from __future__ import annotations

from typing import Any

from flax_vlm.scaling.ladder import Ladder

BATCH, DEPTH = 128, 3
# width: steps
STEPS = {24: 40, 32: 48, 40: 62, 48: 82, 56: 110, 64: 155, 72: 250, 80: 415, 104: 600}
HELD_OUT = 104


def changes(width: int) -> dict[str, Any]:
    """Returns what a width changes."""
    steps = STEPS[width]
    sizes = {"width": width, "depth": DEPTH, "mlp_dim": 4 * width}
    towers = {
        f"model.{tower}.{field}": value
        for tower in ("image", "text")
        for field, value in sizes.items()
    }
    return {
        **towers,
        "model.embed_dim": width,
        "objective.pair_loss.name": "softmax",
        "data.options.train_size": 80_000,
        "batch_size": BATCH,
        "steps": steps,
        "optimizer.lr": 2e-3 * 64 / width,
        "log_every": 1,
        "checkpoint.every": steps,
        "evals.retrieval.every": 0,
        "evals.swapped.every": 0,
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
