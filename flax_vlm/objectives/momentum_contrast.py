# SPDX-License-Identifier: Apache-2.0
"""Contrast with a queue of past embeddings: many negatives without a large batch.

MoCo (He et al., 2020, arXiv:1911.05722, section 3.2 and algorithm 1), between images and texts as
in ALBEF (Li et al., 2021, arXiv:2107.07651, section 3.2). Key encoders are a moving average of both
towers; images are compared with the keys of texts and texts with the keys of images: those of the
batch, among them the match, and the last K of earlier steps.

    loss_i = (L(image_i, [text keys, text queue]) + L(text_i, [image keys, image queue])) / 2
    key encoder <- m key encoder + (1 - m) encoder           after each update; keys then enter

L is the softmax loss over one row of logits (InfoNCE) or the sigmoid loss.

Differs from both papers: the other keys of the batch are negatives too, as in ALBEF, not in MoCo;
keys are computed without dropout; entries of the queue with the query's own text are not negatives
(losses/pairs.py); no batch norm, so no shuffling; no soft targets. Differs from ALBEF: the loss may
be a sigmoid, and a queue that is not full yet contributes what it has, not random vectors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_vlm.build import build
from flax_vlm.losses import LOSSES
from flax_vlm.losses.pairs import Pairs
from flax_vlm.meters import Mean
from flax_vlm.objectives.base import Aux, Batch, Extras, Params
from flax_vlm.objectives.contrastive import Contrastive, logit_metrics

TOWERS = ("image", "text")


@dataclasses.dataclass(frozen=True)
class MomentumContrast(Contrastive):
    """Images and texts get embeddings similar to the keys of their matches.

    Extras: `key_encoders/{image,text}/...`, shaped and split as the towers; `queue`: `image` and
    `text` [K, E] float32, `text_id` [K] int32, `filled` [K] bool, empty rows first, then from the
    oldest to the newest. Every device holds the whole queue: 8 K E bytes.

    Attributes:
        queue_size: K, at least 1; need not be a multiple of the batch size.
        momentum: m, in [0, 1): how much of the key encoders stays at each step.
    """

    queue_size: int = 4096
    momentum: float = 0.995

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {self.queue_size}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns random parameters, key encoders equal to them, and an empty queue."""
        params, _ = super().init(rng, batch)
        embeddings = jax.eval_shape(lambda: self._encode(params, batch, rng, train=False))
        queue = {
            name: jnp.zeros((self.queue_size, x.shape[1]), x.dtype)
            for name, x in zip(TOWERS, embeddings, strict=True)
        }
        queue |= {
            "text_id": jnp.zeros(self.queue_size, jnp.int32),
            "filled": jnp.zeros(self.queue_size, bool),
        }
        # a copy: the state is donated, and two leaves must not share a buffer
        keys = jax.tree.map(jnp.copy, {name: params[name] for name in TOWERS})
        return params, {"key_encoders": keys, "queue": queue}

    def loss(
        self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[Mean, Aux]:
        """Returns the loss summed over pairs; the keys of the batch travel in the stats.

        Raises:
            ValueError: if the batch has no text_id: the queue must know which texts are equal.
        """
        if "text_id" not in batch:
            raise ValueError(f"momentum_contrast needs text_id in the batch, got {sorted(batch)}")
        queries = self._embed(params, batch, rng, train)  # image, text [B, E]
        frozen = jax.lax.stop_gradient(params | extras["key_encoders"])
        keys = dict(zip(TOWERS, self._embed(frozen, batch, rng, train=False), strict=True))
        mask = batch.get("example_mask")
        new = keys | {
            "text_id": batch["text_id"],
            "filled": jnp.ones(batch["text_id"].shape, bool) if mask is None else mask,
        }
        queue = extras["queue"]
        columns = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, queue)  # [B + K, ...]
        pairs = Pairs(columns["text_id"], example_mask=mask, extra_mask=queue["filled"])
        scale, bias = self._apply(params, method="logit_parameters")
        pair_loss = build(LOSSES, self.pair_loss, "pair_loss")
        values = [
            pair_loss(
                query, columns[other], scale, bias,
                pairs=pairs, symmetric=False, rng=jax.random.fold_in(rng, 2 + number),
            )
            for number, (query, other) in enumerate(zip(queries, reversed(TOWERS), strict=True))
        ]  # fmt: skip
        metrics = logit_metrics(scale, bias) | {"queue_filled": Mean.of(queue["filled"])}
        return Mean.of(sum(values) / 2, mask), Aux(metrics, {"queue": new})

    def after_update(
        self, params: Params, extras: Extras, stats: dict[str, Any], step: jax.Array
    ) -> Extras:
        """Returns the key encoders moved towards the encoders, and the queue with the new keys."""
        keys = extras["key_encoders"]
        # in this order a key that equals its parameter stays equal, and m = 0 is a copy
        keys = jax.tree.map(
            lambda key, new: new + self.momentum * (key - new), keys, {k: params[k] for k in keys}
        )
        return {"key_encoders": keys, "queue": enqueue(extras["queue"], stats["queue"])}


def enqueue(queue: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the last K filled rows of both, from the oldest to the newest, empty rows first.

    Every row moves, so that there is no pointer to save, K need not be a multiple of B, and padding
    leaves no hole. The step reads the whole queue anyway.

    Args:
        queue: arrays [K, ...], among them `filled` [K] bool.
        new: the same arrays [B, ...], newer.
    """
    size = len(queue["filled"])
    rows = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), queue, new)  # [K + B, ...]
    order = jnp.argsort(rows["filled"], stable=True)[len(rows["filled"]) - size :]  # [K]
    filled = rows["filled"][order]

    def take(x: jax.Array) -> jax.Array:
        # what padding holds must not enter, not even as an empty row
        return jnp.where(filled.reshape(-1, *[1] * (x.ndim - 1)), x[order], jnp.zeros_like(x[:1]))

    return jax.tree.map(take, rows)
