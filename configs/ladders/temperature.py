# SPDX-License-Identifier: Apache-2.0
"""Temperature: fixed from 0.01 to 1, or learned, with the softmax loss on the digits.

    python -m flax_vlm.tools.ladder run configs/ladders/temperature.py --out runs/t --jobs 2

A small one sharpens: only the nearest negatives are felt; a large one feels all alike (Wang and
Liu, 2021, arXiv:2012.09740).
"""

from __future__ import annotations

from flax_vlm.scaling.ladder import Ladder


def get_ladder() -> Ladder:
    """Returns the ladder."""
    return Ladder(
        config="configs/digits_temperature.py:{temperature}",
        dials={"temperature": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, "learned")},
        seeds=(0, 1, 2),
        metrics=("zero_shot/accuracy",),
        x="temperature",
    )
