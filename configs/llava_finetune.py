# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a published LLaVA on drawn shapes and digits: adapters and the connector learn.

    python train.py --config configs/llava_finetune.py --workdir runs/llava_finetune
    python train.py --config configs/llava_finetune.py:llava-hf/llava-1.5-7b-hf \
        --workdir runs/llava_7b_finetune

The argument is a hub id, which is downloaded, or a folder: any LLaVA that `flax_vlm.load` asks. Its
config says which model it is; its tokenizer, chat template, mean and standard deviation are used.
The image encoder is frozen; the language model learns through LoRA adapters of its queries and
values (Hu et al., 2021, arXiv:2106.09685), the connector as a whole.

Not trained to the end by us: there is no hub where it was written. Tiny folders go through it in
the tests.
"""

from configs.defaults import defaults, sealed
from flax_vlm.build import build
from flax_vlm.hub.checkpoint_config import checkpoint_config
from flax_vlm.models import MODELS

WORDS, ANSWER = 256, 32  # tokens of a conversation besides its image, of a written answer


def get_config(start="llava-hf/llava-interleave-qwen-0.5b-hf"):
    """Returns the recipe."""
    found = checkpoint_config(start)
    model = build(MODELS, found["model"], "model")
    config = defaults()
    config.steps = 200
    config.batch_size = 16
    config.log_every = 10
    config.checkpoint.every = 100
    config.data.name = "instructions"
    config.data.options = {"image_size": 128, "turns": 1}
    config.data.rows = "conversations"
    config.data.chat.template = found["data"]["chat"]["template"]
    with config.ignore_type():  # a pair
        config.data.image_size = found["data"]["image_size"]
    config.data.train_ops = config.data.eval_ops = found["data"]["eval_ops"]
    config.data.text.tokenizer = "chat"
    config.data.text.path = start
    longest = model.language_model.length - ANSWER
    config.data.text.length = min(model.tokens_per_image + WORDS, longest)
    config.model = found["model"]
    config.objective = {**found["objective"], "max_new_tokens": ANSWER}
    config.init_from = start
    config.lora = {
        "rules": (("language_model/.*/(q|v)/kernel", 8),),
        "alpha": 16.0,
        "train": ("connector/.*",),
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-4,
        "grad_clip": 1.0,
        "schedule": {"name": "warmup_cosine", "warmup": 0.03},
    }
    config.evals = {
        "test": {
            "name": "answers",
            "every": 0,
            "batch_size": 16,
            "data": {"name": "instructions", "split": "test"},
        },
    }
    return sealed(config)
