# SPDX-License-Identifier: Apache-2.0
r"""LLaVA-1.5 7B, second stage: visual instruction tuning. Liu et al., arXiv:2310.03744, table 9.

    python train.py --config configs/llava15_7b_stage2.py:/data/mix665k.json,/data/images \
        --workdir /data/llava_stage2 --config.init_from=/data/llava_stage1

The published figures: batch 128, one epoch of 665k conversations, learning rate 2e-5 with cosine
and 3 % warmup, no weight decay, AdamW, bfloat16, 2048 tokens; the image encoder is frozen,
connector and language model are trained. The mesh is 64 ways of fsdp; on which topologies that
fits: docs/scaling_out.md.

LoRA instead: --config.lora is {"rules": (("language_model/.*/kernel", 128),), "alpha": 256.0,
"train": ("connector/.*",)}, --config.optimizer.lr is 2e-4.

Not trained by us: there is neither the hub nor a pod where it was written.
"""

from configs.defaults import defaults, sealed
from flax_vlm.models.clip import IMAGE_DEFAULTS

START = "llava-hf/llava-1.5-7b-hf"
CONVERSATIONS = 665_000


def get_config(data: str = "llava.json,images"):
    """Returns the recipe.

    Args:
        data: "file of LLaVA's JSON format,folder of its images".
    """
    file, _, images = data.partition(",")
    config = defaults()
    config.batch_size = 128
    config.steps = CONVERSATIONS // 128
    config.log_every = 10
    config.checkpoint.every = 1000
    config.mesh.fsdp = 64
    config.data.name = f"llava:{file}"
    config.data.options = {"images": images or None}
    config.data.rows = "conversations"
    config.data.chat.template = "vicuna_v1"
    config.data.workers = 16
    config.data.image_size = 336
    # the whole image, padded to a square with the mean colour, as LLaVA does
    config.data.train_ops = (
        {"name": "pad_to_square", "color": (122, 116, 104)},
        {"name": "resize", "size": 336, "kind": "bicubic"},
    )
    config.data.eval_ops = config.data.train_ops
    config.data.text.tokenizer = "chat"
    config.data.text.path = START
    config.data.text.length = 2048
    config.model = {
        "name": "llava",
        "image": {
            **IMAGE_DEFAULTS,
            "variant": "L/14",
            "image_size": 336,
            "activation": "quick_gelu",
            "dtype": "bfloat16",
        },
        "connector": {"name": "mlp"},
        "language_model": {
            "variant": "Llama-2-7b",
            "vocab_size": 32064,
            "length": 4096,
            "norm_eps": 1e-5,
            "dtype": "bfloat16",
            "remat": "full",
        },
        "image_token_id": 32000,
        "feature_layer": 23,
    }
    config.objective = {
        "name": "next_token",
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "stop_ids": (2,),
        "logit_chunk": 512,
    }
    config.optimizer = {
        "name": "adamw",
        "lr": 2e-5,
        "grad_clip": 1.0,
        "schedule": {"name": "warmup_cosine", "warmup": 0.03},
        "freeze": ("image/.*",),
    }
    config.init_from = START
    return sealed(config)
