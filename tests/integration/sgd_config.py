# SPDX-License-Identifier: Apache-2.0
"""A tiny SigLIP on digits, trained with SGD: the recipe by which whole runs are compared.

Adam divides a gradient by its own size, so that rounding in a gradient near zero becomes a step of
full length; SGD keeps rounding small. Width 64 with 256 hidden units is just large enough for fsdp
to split, four heads are enough for a tensor axis of four.
"""

from configs.siglip_digits import get_config as digits


def get_config():
    """Returns the recipe."""
    config = digits().unlock()
    config.steps = 12
    config.batch_size = 16
    config.log_every = 1
    config.ema_decay = 0.0
    config.model.image.depth = 1
    config.model.text.depth = 1
    config.optimizer = {"name": "sgd", "lr": 0.003, "momentum": 0.5}
    del config.evals.zero_shot
    return config.lock()
