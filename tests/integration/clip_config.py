# SPDX-License-Identifier: Apache-2.0
"""A tiny CLIP on digits: images are cropped, and the end of a text is the tokenizer's id 1."""

from configs.siglip_digits import get_config as digits


def get_config():
    """Returns the recipe."""
    config = digits().unlock()
    config.data.eval_ops = (
        {"name": "resize_small", "size": 18, "floor": True, "kind": "bicubic"},
        {"name": "center_crop", "size": 16},
    )
    config.data.text.bos = True
    config.model.name = "clip"
    config.model.image.pool = "cls"
    config.model.text.eos_id = 1
    config.objective = {"name": "contrastive", "pair_loss": {"name": "softmax"}}
    return config.lock()
