# SPDX-License-Identifier: Apache-2.0
"""SigLIP L/16 at 256 px, global batch 32,768, as published (Zhai et al., 2023, arXiv:2303.15343).

    python train.py --config configs/siglip_l16.py --dry-run
    python train.py --config configs/siglip_l16.py:folder:/data/pairs --workdir DIR

The argument names the data. Tokenizer: a 32,000-token tokenizer.json at data.text.path (the
published one, c4_en, is SentencePiece). Not trained by us: WebLI, its data, is closed. Paper: 9
billion examples; ImageNet zero-shot of the released model 80.5 % after 40 billion.
"""

from configs.defaults import defaults, sealed


def get_config(data: str = "folder:/data/pairs"):
    """Returns the recipe.

    Args:
        data: name of the data, e.g. "folder:/data/pairs" or "tfds:NAME".
    """
    config = defaults()
    config.batch_size = 32_768
    config.steps = 274_000  # 9e9 examples
    config.checkpoint.every = 2_000
    config.data.name = data
    config.data.workers = 16
    config.data.image_size = 256
    config.data.train_ops = ({"name": "resize", "size": 256},)
    config.data.eval_ops = ({"name": "resize", "size": 256},)
    config.data.text.tokenizer = "file"
    config.data.text.path = "tokenizer.json"
    config.data.text.length = 64
    config.model = {"name": "siglip", "variant": "L/16"}
    config.objective = {"name": "contrastive", "pair_loss": {"name": "sigmoid"}}
    config.optimizer = {
        "name": "adamw",
        "lr": 1e-3,
        "b2": 0.95,
        "weight_decay": 0.1,  # the paper's 1e-4 is not multiplied by the lr: 1e-4 / 1e-3
        "grad_clip": 1.0,
        "mu_dtype": "bfloat16",
        "schedule": {"name": "warmup_cosine", "warmup": 10_000},
    }
    return sealed(config)
