# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses as a config names them: which loss, which form, which negatives.

    {"name": "softmax", "form": "sharded", "tile": 1024, "hard_negatives": 64, "random_share": 0.25}

becomes a function of (image_embedding, text_embedding, logit_scale, logit_bias, *, pairs, rng,
symmetric, mesh) with the same meaning in every form.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from flax_vlm.losses import contrastive, contrastive_sharded
from flax_vlm.losses.hard_negatives import HardNegatives
from flax_vlm.losses.pairs import PairRules, Pairs
from flax_vlm.losses.ring import Ring

FORMS = ("dense", "sharded")


@dataclasses.dataclass(frozen=True)
class _Contrastive:
    """What both losses are configured by.

    Attributes:
        form: "dense" (all B x M logits at once) or "sharded" (tiles on a ring, flat memory).
        same_text: what pairs of equal captions are: "ignore", "positive" or "negative".
        ceiling: cosine above which a pair i != j is left out, or None.
        hard_negatives: negatives that a positive keeps; 0 keeps all.
        random_share: part of hard_negatives that is drawn at random.
        precision: of the matrix products, a name of jax.lax.Precision, or None.
        tile: of the sharded form, see Ring.
        bidirectional: of the sharded form, see Ring.
    """

    form: str = "dense"
    same_text: str = "ignore"
    ceiling: float | None = None
    hard_negatives: int = 0
    random_share: float = 0.0
    precision: str | None = None
    tile: int = 1024
    bidirectional: bool = False

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}")
        # what these refuse is refused here, not in the first step
        self._options()
        self._ring(None)

    def _options(self) -> dict[str, Any]:
        return {
            "rules": PairRules(self.same_text, self.ceiling),
            "negatives": HardNegatives(self.hard_negatives, self.random_share),
            "precision": self.precision,
        }

    def _ring(self, mesh: Mesh | None) -> Ring:
        return Ring(self.tile, bidirectional=self.bidirectional, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class SigmoidContrastive(_Contrastive):
    """The sigmoid loss of SigLIP.

    Attributes:
        any_cotangent: of the sharded form, see sigmoid_contrastive_loss_sharded.
    """

    any_cotangent: bool = False

    def __call__(
        self,
        image_embedding: jax.Array,
        text_embedding: jax.Array,
        logit_scale: jax.Array,
        logit_bias: jax.Array | None,
        *,
        pairs: Pairs | None = None,
        rng: jax.Array | None = None,
        symmetric: bool = True,
        mesh: Mesh | None = None,
    ) -> jax.Array:
        """Returns the loss of every image [B]; see contrastive.sigmoid_contrastive_loss.

        Args:
            image_embedding: [B, E].
            text_embedding: [M, E].
            logit_scale: [].
            logit_bias: [] or None.
            pairs: ids and masks.
            rng: key for random negatives.
            symmetric: taken so that all losses have one signature; a pair is counted once here.
            mesh: of the sharded form; None takes that of jax.set_mesh, or one device.
        """
        inputs = (image_embedding, text_embedding, logit_scale, logit_bias)
        options = {"pairs": pairs, "rng": rng, **self._options()}
        if self.form == "dense":
            return contrastive.sigmoid_contrastive_loss(*inputs, **options)
        return contrastive_sharded.sigmoid_contrastive_loss_sharded(
            *inputs, ring=self._ring(mesh), any_cotangent=self.any_cotangent, **options
        )


@dataclasses.dataclass(frozen=True)
class SoftmaxContrastive(_Contrastive):
    """The softmax loss of CLIP and CoCa, with the weights of HN-NCE where beta is not 0.

    Attributes:
        alpha: weight of the positive.
        beta: concentration on hard negatives.
        differentiate_weights: whether gradients flow through the weights of the negatives.
    """

    alpha: float = 1.0
    beta: float = 0.0
    differentiate_weights: bool = True

    def _options(self) -> dict[str, Any]:
        weighting = contrastive.HnNce(self.alpha, self.beta, self.differentiate_weights)
        return {**super()._options(), "weighting": weighting}

    def __call__(
        self,
        image_embedding: jax.Array,
        text_embedding: jax.Array,
        logit_scale: jax.Array,
        logit_bias: jax.Array | None = None,
        *,
        pairs: Pairs | None = None,
        rng: jax.Array | None = None,
        symmetric: bool = True,
        mesh: Mesh | None = None,
    ) -> jax.Array:
        """Returns the loss of every pair [B]; see contrastive.softmax_contrastive_loss.

        Args:
            image_embedding: [B, E].
            text_embedding: [M, E].
            logit_scale: [].
            logit_bias: [] or None; not seen by a softmax.
            pairs: ids and masks.
            rng: key for random negatives.
            symmetric: False leaves the loss of the texts over the images out.
            mesh: of the sharded form; None takes that of jax.set_mesh, or one device.
        """
        inputs = (image_embedding, text_embedding, logit_scale, logit_bias)
        options = {"pairs": pairs, "rng": rng, "symmetric": symmetric, **self._options()}
        if self.form == "dense":
            return contrastive.softmax_contrastive_loss(*inputs, **options)
        return contrastive_sharded.softmax_contrastive_loss_sharded(
            *inputs, ring=self._ring(mesh), **options
        )


LOSSES = {"sigmoid": SigmoidContrastive, "softmax": SoftmaxContrastive}
