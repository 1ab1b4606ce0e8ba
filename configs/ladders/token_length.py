# SPDX-License-Identifier: Apache-2.0
"""Fewer image tokens at equal examples: CLIPA's inverse scaling (arXiv:2305.07017).

    python -m flax_vlm.tools.ladder run configs/ladders/token_length.py --out runs/tokens --jobs 2
    python -m flax_vlm.tools.ladder commands configs/ladders/token_length.py:clipa \
        --out /shared/tokens --on slurm

Images are resized, which was the best of the paper's four ways to drop tokens. The claim is that
larger encoders lose less. `shapes` (the default): 4, 9 or 16 tokens, two widths. `clipa`: CLIP B/16
and L/16 at 64 to 224 pixels, 16 to 196 tokens, 2.56 billion pairs, before any fine-tuning at full
length; `--config.init_from` and `init.resize_positions` are that second stage.
"""

from __future__ import annotations

from typing import Any

from configs.ladders.clusters import slice_for
from configs.ladders.shapes_sizes import sized
from flax_vlm.scaling.ladder import Ladder

BATCH, EXAMPLES = 32_768, 2_560_000_000


def _image(size: int) -> dict[str, Any]:
    return {
        "data.image_size": size,
        "data.train_ops": ({"name": "resize", "size": size},),
        "data.eval_ops": ({"name": "resize", "size": size},),
        "model.image.image_size": size,
    }


def shapes() -> Ladder:
    """Returns the miniature."""

    def changes(width: int, tokens: int) -> dict[str, Any]:
        return {
            **sized(width, 800),
            **_image(8 * round(tokens**0.5)),
            "objective.pair_loss.name": "softmax",
            "data.options.train_size": 80_000,
            "batch_size": 32,
            "optimizer.lr": 1e-3 * 64 / width,
        }

    return Ladder(
        config="configs/siglip_shapes.py",
        dials={"width": (32, 80), "tokens": (4, 9, 16)},
        changes=changes,
        metrics=("retrieval/i2t@1", "swapped/accuracy"),
        x="tokens",
        curves="width",
    )


def clipa() -> Ladder:
    """Returns the ladder at the size of real models."""

    def changes(size: str, tokens: int) -> dict[str, Any]:
        return {
            **_image(16 * round(tokens**0.5)),
            "batch_size": BATCH,
            "steps": EXAMPLES // BATCH,
        }

    return Ladder(
        config="configs/clip.py:{size},folder:/shared/pairs+folder:/shared/imagenet_val",
        dials={"size": ("B/16", "L/16"), "tokens": (16, 36, 64, 100, 196)},
        changes=changes,
        metrics=("zero_shot/accuracy",),
        x="tokens",
        curves="size",
        machine=lambda size, tokens: slice_for(BATCH, per_chip=128),
    )


def get_ladder(size: str = "shapes") -> Ladder:
    """Returns the ladder.

    Args:
        size: "shapes" or "clipa".
    """
    return {"shapes": shapes, "clipa": clipa}[size]()
