# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 g-opt/16 at 256 px, with the first SigLIP's recipe (sizes: arXiv:2502.14786).

    python train.py --config configs/siglip_g16.py:folder:/data/pairs --workdir DIR
    python -m flax_vlm.tools.aot_compile --config configs/siglip_g16.py --topology v5e:16x16

The argument names the data. Recipe: siglip_family.py. Not trained by us: WebLI, its data, is
closed. The published model adds captioning, self-distillation and masked prediction, which this
recipe has not. What fits which pod: docs/scaling_out.md.
"""

from configs.siglip_family import siglip_pretraining


def get_config(data: str = "folder:/data/pairs"):
    """Returns the recipe; `data` as in siglip_family.py."""
    return siglip_pretraining("g-opt/16-v2", image_size=256, data=data)
