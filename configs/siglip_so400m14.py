# SPDX-License-Identifier: Apache-2.0
"""SigLIP So400m/14 at 224 px, global batch 32,768, as published (arXiv:2303.15343).

    python train.py --config configs/siglip_so400m14.py:folder:/data/pairs --workdir DIR
    python -m flax_vlm.tools.aot_compile --config configs/siglip_so400m14.py --topology v5e:16x16

The argument names the data. Recipe: siglip_family.py. Not trained by us: WebLI, its data, is
closed. What fits which pod: docs/scaling_out.md.
"""

from configs.siglip_family import siglip_pretraining


def get_config(data: str = "folder:/data/pairs"):
    """Returns the recipe; `data` as in siglip_family.py."""
    return siglip_pretraining("So400m/14", image_size=224, text_length=16, data=data)
