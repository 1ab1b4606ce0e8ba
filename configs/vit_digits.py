# SPDX-License-Identifier: Apache-2.0
"""A ViT classifier (CLS token, label smoothing) on real handwritten digits.

    python train.py --config configs/vit_digits.py --workdir runs/vit_digits

Result, one run, seed 0: accuracy 99.2 % of the 360 test images (95 % interval 97.6 to 99.7). Time:
106 seconds on two CPU cores, compilation included.
"""

from configs.siglip_digits import get_config as siglip_digits


def get_config():
    """Returns the recipe: the data and schedule of siglip_digits, another model and objective."""
    config = siglip_digits().copy_and_resolve_references()
    config.unlock()
    config.model = {
        "name": "vit",
        "image_size": 16,
        "patch_size": 4,
        "width": 64,
        "depth": 4,
        "mlp_dim": 256,
        "num_heads": 4,
        "pool": "cls",
        "num_classes": 10,
    }
    config.objective = {"name": "classification", "label_smoothing": 0.1}
    config.evals = {
        "classification": {
            "name": "classification",
            "every": 500,
            "data": {"name": "digits", "split": "test"},
        }
    }
    return config.lock()
