# SPDX-License-Identifier: Apache-2.0
"""An image encoder as it is: what can be computed with a checkpoint that has no loss of its own,
such as DINOv2 or a ViT without classes. Fine-tuning gives it one (config.init_from).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn

from flax_vlm.nn.norms import l2_normalize
from flax_vlm.objectives.base import PredictFn
from flax_vlm.objectives.inputs import image_input


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The predictions of an image encoder.

    Attributes:
        model: a VisionTransformer without classes.
        image_mean: per channel, in units of x / 255.
        image_std: per channel, in units of x / 255.
    """

    model: nn.Module
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def predictions(self) -> Mapping[str, PredictFn]:
        """Functions of (params, extras, batch): the pooled vector [B, E] float32, unit norm, and
        the tokens [B, T, D].
        """

        def output(params, batch):
            image = image_input(batch, self.image_mean, self.image_std)
            return self.model.apply({"params": params}, image)

        return {
            "image_embedding": lambda params, extras, batch: l2_normalize(
                output(params, batch).pooled
            ),
            "image_tokens": lambda params, extras, batch: output(params, batch).tokens,
        }
