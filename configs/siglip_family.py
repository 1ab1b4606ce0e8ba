# SPDX-License-Identifier: Apache-2.0
"""What the published SigLIP models share; siglip_b16.py, _l16, _so400m14 and _g16 fill it in.

Source: Zhai et al., 2023, arXiv:2303.15343, sections 4.1 and 4.6: sigmoid loss, global batch
32,768, AdamW with b2 = 0.95, learning rate 1e-3, decoupled weight decay 1e-4, 64 (or 16) text
tokens. The tokenizer, a 32,000-token tokenizer.json at data.text.path, is to be given: the
published one, c4_en, is SentencePiece.

For a pod: matmuls in bfloat16; the sharded loss; every layer computed again in the backward pass
("full"), which costs one forward pass more and fits the largest batch; parameters and optimizer
state over 16 chips. `--config.model.image.remat=none` and `--config.mesh.fsdp=1` undo that.
"""

from ml_collections import ConfigDict

from configs.defaults import defaults, sealed


def siglip_pretraining(
    variant: str, *, image_size: int, data: str, text_length: int = 64, fsdp: int = 16
) -> ConfigDict:
    """Returns the recipe of a released model.

    Args:
        variant: a key of models/siglip.py PRESETS.
        image_size: pixels.
        data: name of the data, "folder:/data/pairs" or "tfds:NAME"; "+" and the name of labelled
            images with ImageNet's classes measure zero-shot accuracy on those, at the end.
        text_length: tokens.
        fsdp: chips that share one copy of the parameters.
    """
    config = defaults()
    data, _, imagenet = data.partition("+")
    config.batch_size = 32_768
    config.steps = 274_000  # 9e9 examples
    config.checkpoint.every = 2_000
    config.mesh.fsdp = fsdp
    config.data.name = data
    config.data.workers = 16
    config.data.image_size = image_size
    config.data.train_ops = ({"name": "resize", "size": image_size},)
    config.data.eval_ops = ({"name": "resize", "size": image_size},)
    config.data.text.tokenizer = "file"
    config.data.text.path = "tokenizer.json"
    config.data.text.length = text_length
    config.model = {
        "name": "siglip",
        "variant": variant,
        "image": {"dtype": "bfloat16", "remat": "full"},
        "text": {"dtype": "bfloat16", "remat": "full"},
    }
    if imagenet:
        config.evals.zero_shot = {
            "name": "zero_shot",
            "every": 0,
            "data": {"name": imagenet},
            "class_names": "imagenet",
            "canonicalize": True,
        }
    config.objective = {"name": "contrastive", "pair_loss": {"name": "sigmoid", "form": "sharded"}}
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
