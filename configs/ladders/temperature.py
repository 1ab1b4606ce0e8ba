# SPDX-License-Identifier: Apache-2.0
"""Temperature: fixed from 0.01 to 1, or learned, with the softmax loss.

    python -m flax_vlm.tools.ladder run configs/ladders/temperature.py --out runs/t --jobs 2
    python -m flax_vlm.tools.ladder commands configs/ladders/temperature.py:clip \
        --out /shared/temperature --on slurm

A small one sharpens: only the nearest negatives are felt; a large one feels all alike (Wang and
Liu, 2021, arXiv:2012.09740). `digits` (the default) is the miniature, `clip` is CLIP B/32 on 1.28
billion pairs.
"""

from __future__ import annotations

from configs.ladders.clusters import slice_for
from flax_vlm.scaling.ladder import Ladder

TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, "learned")
BATCH, EXAMPLES = 32_768, 1_280_000_000


def digits() -> Ladder:
    """Returns the miniature."""
    return Ladder(
        config="configs/digits_temperature.py:{temperature}",
        dials={"temperature": TEMPERATURES},
        seeds=(0, 1, 2),
        metrics=("zero_shot/accuracy",),
        x="temperature",
    )


def clip() -> Ladder:
    """Returns the ladder at the size of a real model."""
    return Ladder(
        config="configs/clip.py:B/32,folder:/shared/pairs+folder:/shared/imagenet_val,{temperature}",
        dials={"temperature": TEMPERATURES},
        changes=lambda temperature: {"batch_size": BATCH, "steps": EXAMPLES // BATCH},
        metrics=("zero_shot/accuracy",),
        x="temperature",
        machine=lambda temperature: slice_for(BATCH, per_chip=512),
    )


def get_ladder(size: str = "digits") -> Ladder:
    """Returns the ladder.

    Args:
        size: "digits" or "clip".
    """
    return {"digits": digits, "clip": clip}[size]()
