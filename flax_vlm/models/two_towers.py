# SPDX-License-Identifier: Apache-2.0
"""An image tower and a text tower in one embedding space: what CLIP and SigLIP have in common.

The towers are chosen by config from IMAGE_ENCODERS and TEXT_ENCODERS: anything with
VisionTransformer's or TextEncoder's signature and outputs can be added to the tables. Embeddings,
logit scale and bias are float32 whatever the towers compute in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.build import build
from flax_vlm.models.naflex import build_naflex_vit
from flax_vlm.models.text_encoder import build_text_encoder
from flax_vlm.models.vit import build_vit
from flax_vlm.nn.norms import l2_normalize

IMAGE_ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "vit": build_vit,
    "naflex_vit": build_naflex_vit,
}
TEXT_ENCODERS: dict[str, Callable[..., nn.Module]] = {"text_encoder": build_text_encoder}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContrastiveOutput:
    """What a two-tower model returns.

    Attributes:
        image_embedding: [B, E] float32, unit norm.
        text_embedding: [B, E] float32, unit norm.
        logit_scale: [] float32, exp(the parameter): logits are scale * cosine + bias.
        logit_bias: [] float32, or None where the model has none (CLIP).
    """

    image_embedding: jax.Array
    text_embedding: jax.Array
    logit_scale: jax.Array
    logit_bias: jax.Array | None


class TwoTowers(nn.Module):
    """Embeds images and texts.

    Parameters: `image/...`, `text/...`, `logit_scale` (the logarithm of the scale), `logit_bias`.

    Attributes:
        image: the image encoder; its pooled vector is the image embedding before normalisation.
        text: the text encoder, likewise.
        init_scale: initial logit scale, before the logarithm.
        init_bias: initial logit bias; None has no bias.
    """

    image: nn.Module
    text: nn.Module
    init_scale: float = 1.0
    init_bias: float | None = None

    def setup(self) -> None:
        """Creates the scale and the bias; the towers are fields."""
        scale = nn.initializers.constant(math.log(self.init_scale))
        self.logit_scale = self.param("logit_scale", scale, (), jnp.float32)
        if self.init_bias is not None:
            bias = nn.initializers.constant(self.init_bias)
            self.logit_bias = self.param("logit_bias", bias, (), jnp.float32)

    def __call__(
        self,
        image: jax.Array,
        text: jax.Array,
        text_mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> ContrastiveOutput:
        """Returns both embeddings, and the scale and bias of their logits.

        Args:
            image: [B, H, W, C] float32, normalised.
            text: [B, L] int32 token ids.
            text_mask: [B, L] bool, True = real token; only text encoders with `mask_padding` look
                at it.
            train: dropout is on.
        """
        image_embedding = self.encode_image(image, train=train)
        text_embedding = self.encode_text(text, text_mask, train=train)
        if image_embedding.shape[-1] != text_embedding.shape[-1]:
            raise ValueError(
                "both towers must embed into the same width, got "
                f"{image_embedding.shape[-1]} (image) and {text_embedding.shape[-1]} (text); "
                "set embed_dim"
            )
        return ContrastiveOutput(image_embedding, text_embedding, *self.logit_parameters())

    def encode_image(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns [B, E] float32, unit norm, for images [B, H, W, C] float32 (normalised)."""
        return l2_normalize(self.image(image, train=train).pooled)

    def encode_text(
        self, text: jax.Array, text_mask: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Returns [B, E] float32, unit norm, for token ids [B, L] int32."""
        return l2_normalize(self.text(text, text_mask, train=train).pooled)

    def image_tokens(self, image: jax.Array) -> jax.Array:
        """Returns [B, T, D]: the image encoder's output after its final norm."""
        return self.image(image).tokens

    def logit_parameters(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns (scale [] > 0, bias [] or None), float32."""
        return jnp.exp(self.logit_scale), None if self.init_bias is None else self.logit_bias


def build_towers(image: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Returns the two towers of a config.

    Args:
        image: {"name": a key of IMAGE_ENCODERS, **its arguments}.
        text: {"name": a key of TEXT_ENCODERS, **its arguments}.

    Raises:
        ValueError: for an unknown name or argument.
    """
    return (
        build(IMAGE_ENCODERS, image, "image encoder"),
        build(TEXT_ENCODERS, text, "text encoder"),
    )
