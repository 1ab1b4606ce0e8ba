# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes the vision encoder of siglip_digits as a classifier: LoRA adapters and a new head.

    python train.py --config configs/siglip_digits.py --workdir runs/siglip_digits
    python train.py --config configs/vit_digits_finetune.py:runs/siglip_digits \
        --workdir runs/vit_digits_finetune

The argument is the workdir of the first run. Trained: adapters of rank 4 beside the queries and
values of all blocks, and the head; all else is frozen.

Not trained to the end by us: the result is still to be measured.
"""

from configs.vit_digits import get_config as vit_digits


def get_config(start="runs/siglip_digits"):
    """Returns the recipe: the data of vit_digits, the encoder of siglip_digits."""
    config = vit_digits()
    config.unlock()
    config.steps = 300
    config.ema_decay = 0.0
    config.checkpoint.every = 100
    config.model = {
        "name": "vit",
        "image_size": 16,
        "patch_size": 4,
        "width": 64,
        "depth": 3,
        "mlp_dim": 256,
        "num_heads": 4,
        "pool": "map",
        "num_classes": 10,
    }
    config.init_from = start
    config.init.subtrees = (("image", ""),)
    config.init.fresh = ("head/.*",)
    config.lora = {
        "rules": (("encoder/blocks/attention/(q|v)/kernel", 4),),
        "alpha": 8.0,
        "train": ("head/.*",),
    }
    config.evals.classification.every = 100
    return config.lock()
