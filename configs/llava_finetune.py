# SPDX-License-Identifier: Apache-2.0
r"""Fine-tunes a published LLaVA with adapters on questions about coloured shapes and digits.

    python train.py --config configs/llava_finetune.py --workdir runs/llava_finetune
    python train.py --config configs/llava_finetune.py:llava-hf/llava-1.5-13b-hf --workdir DIR \
        --config.mesh.fsdp=8

The argument is a hub id, which is downloaded, or a folder: any LLaVA whose images have one size.
Its config says which model it is; its tokenizer, its chat template, and its way to prepare images
are used. Adapters of rank 8 on the language model's attention are trained, and the connector; all
else is frozen. `flax_vlm.load(workdir)` merges them, `save_pretrained` writes them for
transformers.

Not trained to the end by us: there is no hub where it was written. A tiny folder of transformers
goes through it in the tests.
"""

from configs.defaults import defaults, sealed
from flax_vlm.hub.checkpoint_config import checkpoint_config


def get_config(start="llava-hf/llava-1.5-7b-hf"):
    """Returns the recipe."""
    found = checkpoint_config(start)
    config = defaults()
    config.steps = 500
    config.batch_size = 16
    config.log_every = 10
    config.checkpoint.every = 100
    config.data.name = "instructions"
    config.data.options = {"kinds": ("counting", "color", "relation", "digit")}
    config.data.rows = "conversations"
    config.data.chat.template = found["data"]["chat"]["template"]
    config.data.image_size = found["model"]["image"]["image_size"]
    config.data.train_ops = found["data"]["eval_ops"]
    config.data.eval_ops = found["data"]["eval_ops"]
    config.data.text.tokenizer = "chat"
    config.data.text.path = start
    config.data.text.length = min(1024, found["model"]["language_model"]["length"])
    config.model = found["model"]
    config.objective = {**found["objective"], "max_new_tokens": 16}
    config.init_from = start
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-4,
        "grad_clip": 1.0,
        "schedule": {"name": "warmup_cosine", "warmup": 0.03},
    }
    config.lora = {
        "rules": (("language_model/.*/attention/(q|k|v|o)/kernel", 8),),
        "alpha": 16.0,
        "train": ("connector/.*",),
    }
    config.evals = {
        "test": {
            "name": "answers",
            "every": 0,
            "batch_size": 16,
            "data": {
                "name": "instructions",
                "split": "test",
                "options": {**config.data.options.to_dict(), "test_size": 200},
            },
        },
    }
    return sealed(config)
