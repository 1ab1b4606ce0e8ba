# SPDX-License-Identifier: Apache-2.0
"""Contrastive pretraining over the global batch: SigLIP's sigmoid and CLIP's softmax loss.

Zhai et al., 2023, arXiv:2303.15343; Radford et al., 2021, arXiv:2103.00020.

The loss compares every image with every text, so a batch cannot be cut into micro-batches whose
losses are summed. `micro_batches` > 1 turns on a gradient cache instead (Gao et al., 2021,
arXiv:2101.06983): the encoders run micro-batch by micro-batch under `jax.checkpoint`, the loss once
over all embeddings. The gradient is that of the whole batch; the memory is that of one micro-batch
plus [B, E] embeddings; the price is one more forward pass of the encoders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from flax_vlm.batch import join_micro_batches, split_micro_batches
from flax_vlm.build import build
from flax_vlm.losses import LOSSES
from flax_vlm.losses.pairs import Pairs
from flax_vlm.meters import Mean
from flax_vlm.objectives.base import Aux, Batch, Extras, Params, PredictFn
from flax_vlm.objectives.inputs import image_input

# what the model is given of a batch
_MODEL_KEYS = ("image", "patches", "spatial_shape", "text", "text_mask")


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Images and texts that belong together get similar embeddings.

    Attributes:
        model: two-tower module (models/clip.py, models/siglip.py).
        pair_loss: {"name": "sigmoid" or "softmax", ...}, see losses/contrastive_form.py: dense or
            sharded form, what pairs of equal captions are, hard negatives.
        image_mean: per channel, in units of x / 255.
        image_std: per channel, in units of x / 255.
        micro_batches: of the gradient cache; 1 = off.
    """

    model: nn.Module
    pair_loss: Mapping[str, Any]
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    micro_batches: int = 1

    def __post_init__(self) -> None:
        build(LOSSES, self.pair_loss, "pair_loss")  # raises for a wrong setting

    @property
    def additive(self) -> bool:
        """False: every example is compared with every other."""
        return False

    @property
    def predictions(self) -> Mapping[str, PredictFn]:
        """Functions of (params, extras, batch); embeddings are [B, E] float32, unit norm."""
        return {
            "image_embedding": lambda params, extras, batch: self._apply(
                params, self._image(batch), method="encode_image"
            ),
            "text_embedding": lambda params, extras, batch: self._apply(
                params, batch["text"], batch.get("text_mask"), method="encode_text"
            ),
            "image_tokens": lambda params, extras, batch: self._apply(
                params, self._image(batch), method="image_tokens"
            ),
            "logits": self._logits,
        }

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns random parameters and no extras."""
        image, text = self._image(batch), batch["text"]
        return self.model.init(rng, image, text, batch.get("text_mask"))["params"], {}

    def loss(
        self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[Mean, Aux]:
        """Returns the loss summed over images, and logit scale and bias as metrics.

        The sharded form of the loss runs over the mesh of `jax.set_mesh`.
        """
        image, text = self._embed(params, batch, rng, train)  # [B, E] each
        scale, bias = self._apply(params, method="logit_parameters")
        mask = batch.get("example_mask")
        pairs = Pairs(text_id=batch.get("text_id"), example_mask=mask)
        pair_loss = build(LOSSES, self.pair_loss, "pair_loss")
        mining = jax.random.fold_in(rng, 2)  # 0 and 1 are the encoders'
        values = pair_loss(image, text, scale, bias, pairs=pairs, rng=mining)
        return Mean.of(values, mask), Aux(logit_metrics(scale, bias))

    def after_update(
        self, params: Params, extras: Extras, stats: dict[str, Any], step: jax.Array
    ) -> Extras:
        """Returns the extras as they are."""
        return extras

    def _apply(self, params: Params, *args: Any, method: str, **kwargs: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method, **kwargs)

    def _image(self, batch: Batch) -> Any:
        return image_input(batch, self.image_mean, self.image_std)

    def _logits(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Returns the logits of every image against every text of the batch, [B, B] float32."""
        image, text = self._encode(params, batch, jax.random.key(0), train=False)
        scale, bias = self._apply(params, method="logit_parameters")
        return scale * (image @ text.T) + (0.0 if bias is None else bias)

    def _embed(
        self, params: Params, batch: Batch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (image, text) embeddings [B, E], computed micro-batch by micro-batch."""
        count = self.micro_batches
        if count == 1:
            return self._encode(params, batch, rng, train)
        inputs = {key: batch[key] for key in _MODEL_KEYS if key in batch}

        @jax.checkpoint
        def encode(rows: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._encode(params, rows, rng, train)

        # the random keys are arguments: recomputation sees the same dropout
        micro = split_micro_batches(inputs, count), jax.random.split(rng, count)
        return join_micro_batches(jax.lax.map(lambda xs: encode(*xs), micro))

    def _encode(
        self, params: Params, rows: Batch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (image, text) embeddings [B, E] of some rows at once."""
        names = ("dropout", "patch_dropout") if train else ()
        out = self.model.apply(
            {"params": params},
            self._image(rows),
            rows["text"],
            rows.get("text_mask"),
            train=train,
            rngs={name: jax.random.fold_in(rng, i) for i, name in enumerate(names)},
        )
        return out.image_embedding, out.text_embedding


def logit_metrics(scale: jax.Array, bias: jax.Array | None) -> dict[str, Mean]:
    """Returns the metrics of logit_scale, and of logit_bias where the model has one."""
    values = {"logit_scale": scale, "logit_bias": bias}
    return {name: Mean.of(value) for name, value in values.items() if value is not None}
