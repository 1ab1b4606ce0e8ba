# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a published SigLIP on handwritten digits, at a resolution of four by four patches.

    python train.py --config configs/siglip_finetune.py --workdir runs/siglip_finetune
    python train.py --config configs/siglip_finetune.py:google/siglip2-base-patch16-224 \
        --workdir runs/siglip2_finetune

The argument is a hub id, which is downloaded, or a folder: any SigLIP or CLIP that transformers
loads. Its config says which model it is, its tokenizer and its mean and standard deviation are
used. The text tower is frozen, the position table is resampled to the new grid, and the image tower
learns at a tenth of the rate of its pooling head, more slowly the deeper the layer.

LoRA instead: --config.lora is {"rules": (("image/.*/(q|v)/kernel", 8),), "alpha": 16.0}.

Not trained to the end by us: there is no hub where it was written. A tiny folder of transformers
goes through it in the tests.
"""

from configs.defaults import defaults, sealed
from configs.siglip_digits import TEMPLATES
from flax_vlm.hub.checkpoint_config import checkpoint_config

SIDE = 4  # patches


def get_config(start="google/siglip-base-patch16-224"):
    """Returns the recipe."""
    found = checkpoint_config(start)
    patch_size = found["model"]["image"]["patch_size"]
    size = SIDE * patch_size
    config = defaults()
    config.steps = 200
    config.batch_size = 64
    config.log_every = 10
    config.checkpoint.every = 100
    config.data.name = "digits"
    config.data.image_size = size
    config.data.train_ops = ({"name": "rotate", "degrees": 12}, {"name": "resize", "size": size})
    config.data.eval_ops = ({"name": "resize", "size": size},)
    config.data.text.tokenizer = "pretrained"
    config.data.text.path = start
    config.data.text.length = found["data"]["text"]["length"]
    config.model = found["model"]
    config.model.image.image_size = size
    config.model.image.drop_remainder = False
    config.objective = found["objective"]
    config.objective.pair_loss.same_text = "positive"
    config.init_from = start
    config.init.resize_positions = "bicubic_torch"
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-4,
        "b2": 0.95,
        "grad_clip": 1.0,
        "schedule": {"name": "warmup_cosine", "warmup": 0.1},
        "freeze": ("text/.*",),
        "lr_multipliers": (("image/(?!pool/).*", 0.1),),
        "layer_decay": 0.9,
    }
    config.evals = {
        "zero_shot": {
            "name": "zero_shot",
            "every": 100,
            "data": {"name": "digits", "split": "test"},
            "templates": TEMPLATES,
        },
    }
    return sealed(config)
