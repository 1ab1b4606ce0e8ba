# SPDX-License-Identifier: Apache-2.0
"""CLIP with the softmax loss, as in Cherti et al., 2022, arXiv:2212.07143.

    python train.py --config configs/clip.py:L/14,folder:/data/pairs --workdir DIR
    python -m flax_vlm.tools.aot_compile --config configs/clip.py:L/14 --topology v5e:16x16

The argument is a size of models/clip.py PRESETS; after a comma the data, as in siglip_family.py;
after another a fixed temperature (without one, or with "learned", it is learned from 0.07).
Batch 86,016, learning rate 1e-3 with 2,000 steps of warmup: the paper's runs on LAION-400M; b2 0.98
and weight decay 0.2 are OpenCLIP's. Not trained by us. The tokenizer is to be given, 49,408 tokens.
"""

from configs.siglip_family import siglip_pretraining


def get_config(argument: str = "B/32,folder:/data/pairs"):
    """Returns the recipe."""
    variant, data, temperature = (*argument.split(","), "", "")[:3]
    data = data or "folder:/data/pairs"
    config = siglip_pretraining(variant, image_size=224, text_length=77, data=data).unlock()
    config.batch_size = 86_016
    config.steps = 149_000  # 12.8e9 examples
    config.model.name = "clip"
    config.model.image.image_size = 224
    config.objective.pair_loss.name = "softmax"
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.2
    config.optimizer.schedule.warmup = 2_000
    if temperature not in ("", "learned"):
        config.model.init_scale = 1.0 / float(temperature)
        config.optimizer.freeze = ("logit_scale",)
    if "zero_shot" in config.evals:
        config.evals.zero_shot.canonicalize = False
    return config.lock()
