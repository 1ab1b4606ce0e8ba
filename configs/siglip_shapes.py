# SPDX-License-Identifier: Apache-2.0
"""SigLIP on the shapes world: compositional captions, retrieval, swapped attributes.

    python train.py --config configs/siglip_shapes.py --workdir runs/siglip_shapes

Result: MEASURED
"""

from configs.defaults import defaults, sealed


def get_config():
    """Returns the recipe."""
    config = defaults()
    config.steps = 2400
    config.batch_size = 128
    config.log_every = 20
    config.checkpoint.every = 500
    config.data.name = "shapes"
    config.data.image_size = 32
    config.data.train_ops = ({"name": "resize", "size": 32},)
    config.data.eval_ops = ({"name": "resize", "size": 32},)
    config.data.text.length = 24
    config.data.text.vocab_size = 384
    tower = {"width": 96, "depth": 4, "mlp_dim": 384, "num_heads": 4}
    config.model = {
        "name": "siglip",
        "embed_dim": 96,
        "image": {"name": "vit", "image_size": 32, "patch_size": 8, "pool": "map", **tower},
        "text": {"name": "text_encoder", "vocab_size": 384, "length": 24, **tower},
    }
    config.objective = {"name": "contrastive", "pair_loss": {"name": "sigmoid"}}
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-3,
        "b2": 0.95,
        "weight_decay": 0.05,
        "grad_clip": 1.0,
        "schedule": {"name": "warmup_cosine", "warmup": 0.05},
    }
    test = {"split": "test"}
    config.evals = {
        "retrieval": {"name": "retrieval", "every": 800, "data": test},
        "swapped": {"name": "two_choice", "every": 800, "data": test},
    }
    return sealed(config)
