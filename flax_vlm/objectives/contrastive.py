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
import jax.numpy as jnp

from flax_vlm.batch import normalize_image
from flax_vlm.build import build
from flax_vlm.losses import LOSSES
from flax_vlm.losses.pairs import Pairs
from flax_vlm.meters import Mean
from flax_vlm.objectives.base import Aux, Batch, Extras, Params, PredictFn


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
        metrics = {"logit_scale": Mean(scale, jnp.ones(()))}
        if bias is not None:
            metrics["logit_bias"] = Mean(bias, jnp.ones(()))
        return Mean.of(values, mask), Aux(metrics)

    def after_update(
        self, params: Params, extras: Extras, stats: dict[str, Any], step: jax.Array
    ) -> Extras:
        """Returns the extras as they are."""
        return extras

    def _apply(self, params: Params, *args: Any, method: str, **kwargs: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method, **kwargs)

    def _image(self, batch: Batch) -> jax.Array:
        return normalize_image(batch["image"], self.image_mean, self.image_std)

    def _logits(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Returns the logits of every image against every text of the batch, [B, B] float32."""
        image, text = self._embed(params, batch, jax.random.key(0), train=False)
        scale, bias = self._apply(params, method="logit_parameters")
        return scale * (image @ text.T) + (0.0 if bias is None else bias)

    def _embed(
        self, params: Params, batch: Batch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (image, text) embeddings [B, E], in micro-batches where that is asked for."""
        inputs = {key: batch[key] for key in ("image", "text", "text_mask") if key in batch}

        def encode(rows: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
            names = ("dropout", "patch_dropout") if train else ()
            rngs = {name: jax.random.fold_in(rng, i) for i, name in enumerate(names)}
            out = self.model.apply(
                {"params": params},
                self._image(rows),
                rows["text"],
                rows.get("text_mask"),
                train=train,
                rngs=rngs,
            )
            return out.image_embedding, out.text_embedding

        count = self.micro_batches
        if count == 1 or not train:
            return encode(inputs, rng)
        size = len(batch["image"])
        if size % count:
            raise ValueError(f"micro_batches must divide batch_size, got {count} and {size}")
        # every A-th example, so that each micro-batch spans all devices: [B, ...] -> [A, B/A, ...]
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), inputs
        )
        # the keys are arguments: recomputation sees the same dropout
        keys = jax.random.split(rng, count)
        embedded = jax.lax.map(lambda xs: jax.checkpoint(encode)(*xs), (micro, keys))
        return jax.tree.map(lambda z: jnp.moveaxis(z, 0, 1).reshape(size, -1), embedded)
