# SPDX-License-Identifier: Apache-2.0
"""Image classification, as ViT is pretrained and fine-tuned. Dosovitskiy et al., arXiv:2010.11929.

`loss_kind` "sigmoid" treats each class as a yes-no question (Beyer et al., 2020, arXiv:2006.07159).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_vlm.build import lookup
from flax_vlm.losses.classification import (
    sigmoid_classification_loss,
    softmax_classification_loss,
)
from flax_vlm.meters import Mean
from flax_vlm.nn.norms import l2_normalize
from flax_vlm.objectives.base import Aux, Batch, Extras, Params, PredictFn
from flax_vlm.objectives.inputs import image_input

CLASS_LOSSES = {"softmax": softmax_classification_loss, "sigmoid": sigmoid_classification_loss}


@dataclasses.dataclass(frozen=True)
class Classification:
    """Every image has one label.

    Attributes:
        model: module with logits as output (models/vit.py with num_classes).
        class_loss: "softmax" or "sigmoid".
        label_smoothing: share of the target spread over all classes.
        image_mean: per channel, in units of x / 255.
        image_std: per channel, in units of x / 255.
    """

    model: nn.Module
    class_loss: str = "softmax"
    label_smoothing: float = 0.0
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        lookup(CLASS_LOSSES, self.class_loss, "class_loss")

    @property
    def additive(self) -> bool:
        """True: the loss of an example does not depend on the others."""
        return True

    @property
    def predictions(self) -> Mapping[str, PredictFn]:
        """Functions of (params, extras, batch); logits are [B, classes] float32, the embedding is
        what the head sees, [B, D] float32, unit norm.
        """

        def encoded(params: Params, batch: Batch) -> Any:
            return self.model.apply({"params": params}, self._image(batch), method="encode")

        return {
            "logits": lambda params, extras, batch: self.model.apply(
                {"params": params}, self._image(batch)
            ),
            "image_tokens": lambda params, extras, batch: encoded(params, batch).tokens,
            "image_embedding": lambda params, extras, batch: l2_normalize(
                encoded(params, batch).pooled
            ),
        }

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns random parameters and no extras."""
        return self.model.init(rng, self._image(batch))["params"], {}

    def loss(
        self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[Mean, Aux]:
        """Returns the loss summed over examples, and the accuracy."""
        names = ("dropout", "patch_dropout") if train else ()
        rngs = {name: jax.random.fold_in(rng, i) for i, name in enumerate(names)}
        logits = self.model.apply({"params": params}, self._image(batch), train=train, rngs=rngs)
        values = CLASS_LOSSES[self.class_loss](
            logits, batch["label"], label_smoothing=self.label_smoothing
        )
        mask = batch["label"] >= 0
        if "example_mask" in batch:
            mask = mask & batch["example_mask"]
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return Mean.of(values, mask), Aux({"accuracy": Mean.of(correct, mask)})

    def after_update(
        self, params: Params, extras: Extras, stats: dict[str, Any], step: jax.Array
    ) -> Extras:
        """Returns the extras as they are."""
        return extras

    def _image(self, batch: Batch) -> jax.Array:
        return image_input(batch, self.image_mean, self.image_std)
