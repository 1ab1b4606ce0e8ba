# SPDX-License-Identifier: Apache-2.0
"""SigLIP So400m/14 at 224 px, global batch 32,768 (Zhai et al., 2023, arXiv:2303.15343).

    python -m flax_vlm.tools.aot_compile --config configs/siglip_so400m14.py --topology v5e:16x16
    python train.py --config configs/siglip_so400m14.py:folder:/data/pairs --workdir DIR

The argument names the data. Tokenizer: a 32,000-token tokenizer.json at data.text.path (the
published one, c4_en, is SentencePiece), 16 tokens per text. Not trained by us: WebLI, its data, is
closed. Released model: 83.2 % ImageNet zero-shot at 384 px (paper, table 3). What fits which pod is
measured in docs/scaling_out.md.
"""

from configs.defaults import defaults, sealed


def get_config(data: str = "folder:/data/pairs"):
    """Returns the recipe.

    Args:
        data: name of the data, e.g. "folder:/data/pairs" or "tfds:NAME".
    """
    config = defaults()
    config.batch_size = 32_768
    config.steps = 1_220_000  # 4e10 examples
    config.checkpoint.every = 2_000
    config.data.name = data
    config.data.workers = 16
    config.data.image_size = 224
    config.data.train_ops = ({"name": "resize", "size": 224},)
    config.data.eval_ops = ({"name": "resize", "size": 224},)
    config.data.text.tokenizer = "file"
    config.data.text.path = "tokenizer.json"
    config.data.text.length = 16
    tower = {"dtype": "bfloat16", "remat": "full"}
    config.model = {
        "name": "siglip",
        "variant": "So400m/14",
        "image": dict(tower),
        "text": dict(tower),
    }
    config.objective = {"name": "contrastive", "pair_loss": {"name": "sigmoid", "form": "sharded"}}
    # 877 M parameters with AdamW are 10 GB in float32: a 16 GB chip holds a part of them
    config.mesh.fsdp = 16
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
