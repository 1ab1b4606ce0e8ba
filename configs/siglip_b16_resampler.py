# SPDX-License-Identifier: Apache-2.0
"""SigLIP B/16 whose image embedding is the mean of a Perceiver Resampler's latents.

    python train.py --config configs/siglip_b16_resampler.py:64,folder:/data/pairs --workdir DIR

The argument is the number of latents, and after a comma the data, as in siglip_family.py. The
resampler has Flamingo's feed-forward net and 6 layers, and heads of the encoder's size. Not trained
by us.
"""

from configs.siglip_family import siglip_pretraining


def get_config(argument: str = "64,folder:/data/pairs"):
    """Returns the recipe."""
    latents, _, data = argument.partition(",")
    data = data or "folder:/data/pairs"
    config = siglip_pretraining("B/16", image_size=224, fsdp=1, data=data).unlock()
    config.model.image.pool = "resampler"
    config.model.image.resampler = {
        "num_latents": int(latents),
        "depth": 6,
        "num_heads": 12,
        "head_dim": 64,
    }
    return config.lock()
