# SPDX-License-Identifier: Apache-2.0
"""The quickstart with the softmax loss at a fixed temperature, or at a learned one.

    python train.py --config configs/digits_temperature.py:0.05 --workdir DIR
    python train.py --config configs/digits_temperature.py:learned --workdir DIR

The logit scale is 1 / temperature; `learned` starts at 0.1. All temperatures with three seeds:
configs/ladders/temperature.py.

Result: docs/scaling.md.
"""

from configs import siglip_digits


def get_config(temperature: str = "learned"):
    """Returns the recipe.

    Args:
        temperature: a number, or "learned".
    """
    config = siglip_digits.get_config().unlock()
    config.steps = 200
    config.ema_decay = 0.0
    config.checkpoint.every = 200
    config.evals.zero_shot.every = 0
    config.objective.pair_loss.name = "softmax"
    if temperature != "learned":
        config.model.init_scale = 1.0 / float(temperature)
        config.optimizer.freeze = ("logit_scale",)
    return config.lock()
