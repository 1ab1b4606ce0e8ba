# SPDX-License-Identifier: Apache-2.0
r"""LLaVA-1.5 7B, first stage: the connector alone, on captions. arXiv:2310.03744, table 9.

    python train.py --config configs/llava15_7b_stage1.py:/data/blip_558k.json,/data/images \
        --workdir /data/llava_stage1

The published figures: batch 256, one epoch of 558k captions, learning rate 1e-3 with cosine and 3 %
warmup, no weight decay, the template "plain". Image encoder and language model are frozen.

Differs: the paper starts from CLIP and Vicuna. Here both are taken out of one checkpoint, whose
language model has been through the second stage, because a run starts from one source. The
connector starts random, as there.

Not trained by us: there is neither the hub nor a pod where it was written.
"""

from configs import llava15_7b_stage2
from configs.defaults import sealed

CAPTIONS = 558_000


def get_config(data: str = "llava.json,images"):
    """Returns the recipe.

    Args:
        data: "file of LLaVA's JSON format,folder of its images".
    """
    config = llava15_7b_stage2.get_config(data).unlock()
    config.batch_size = 256
    config.steps = CAPTIONS // 256
    config.data.chat.template = "plain"
    config.optimizer.lr = 1e-3
    config.optimizer.freeze = ("image/.*", "language_model/.*")
    config.init.fresh = ("connector/.*",)
    return sealed(config)
