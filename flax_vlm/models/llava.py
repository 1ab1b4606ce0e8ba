# SPDX-License-Identifier: Apache-2.0
"""LLaVA and its kin: an image encoder, a connector, and a language model that reads both.

    images --encoder--> features --connector--> visual tokens
                                                     |
    text   [ a  b <img> <img> <img>  c ]             |
    x    = [ a  b   v0    v1    v2   c ]  <----------+     logits = language model(x)

Papers: LLaVA arXiv:2304.08485, LLaVA-1.5 arXiv:2310.03744, LLaVA-NeXT (AnyRes; blog, January 2024),
LLaVA-OneVision arXiv:2408.03326, Idefics3 arXiv:2408.12637 and SmolVLM arXiv:2504.05299. Fields
tell them apart; which visual token stands where is a table of indices that the host makes
(`visual_index`), so that tiles, newlines and cut-off padding are no business of the model.

Differs from the papers' code: placeholders are expanded before the model, one id per visual token,
where LLaVA's own code splices embeddings in at a sentinel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.build import build
from flax_vlm.models.fastv import prune
from flax_vlm.models.language_model import LanguageModel, LanguageOutput, build_language_model
from flax_vlm.models.two_towers import IMAGE_ENCODERS
from flax_vlm.nn.compression import Compression, TokenMerging, build_compression
from flax_vlm.nn.connectors import ResamplerConnector, build_connector
from flax_vlm.nn.patches import as_pair
from flax_vlm.shapes import check_shapes


class Llava(nn.Module):
    """A language model that sees.

    Parameters: `image/...`, `connector/...`, `language_model/...`, `newline`.

    Attributes:
        image: a VisionTransformer.
        connector: one of nn.connectors.
        language_model: what reads text and visual tokens.
        image_token_id: the id that stands for a visual token in a text.
        feature_layer: after how many blocks of the encoder features are taken, without its final
            norm; None takes its output. transformers' vision_feature_layer -2 is depth - 1.
        keep_prefix: the class token and registers are visual tokens too.
        newline: there is a learned token that ends rows of patches (LLaVA-NeXT, OneVision); it is
            the last of the visual tokens.
        compression: one of nn.compression, between features and connector; None keeps all tokens.
    """

    image: nn.Module
    connector: nn.Module
    language_model: LanguageModel
    image_token_id: int
    feature_layer: int | None = None
    keep_prefix: bool = False
    newline: bool = False
    compression: Compression | None = None

    def setup(self) -> None:
        """Creates the newline token; all else is fields."""
        if self.newline:
            width = self.language_model.width
            init = nn.initializers.normal(width**-0.5)
            self.newline_token = self.param("newline", init, (width,), jnp.float32)

    def example_inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Returns what the model is called with, as shapes, for a batch of one."""
        size = as_pair(self.image.image_size)
        return [
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
            jax.ShapeDtypeStruct((1, 1, *size, 3), jnp.float32),
        ]

    @property
    def tokens_per_image(self) -> int:
        """Q, how many visual tokens an image (or tile) becomes."""
        rows, columns = self.image.grid
        prefix = self.image.num_prefix if self.keep_prefix else 0
        patches = rows * columns + prefix
        if self.compression is not None:
            patches = self.compression.num_tokens(patches)
        return self.connector.num_tokens(patches)

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """(rows, columns) in which the visual tokens of an image lie, row by row; None where they
        have no places: latents, merged tokens, a class token among them.
        """
        rows, columns = self.image.grid
        for part in (self.compression, self.connector):
            if isinstance(part, TokenMerging | ResamplerConnector):
                return None
            scale = getattr(part, "scale", 1)
            rows, columns = rows // scale, columns // scale
        return None if self.keep_prefix and self.image.num_prefix else (rows, columns)

    def visual_tokens(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns [B, I Q, D] (with a newline [B, I Q + 1, D]): the tokens of all images of a row,
        one image after the other, D of the language model.

        Args:
            images: [B, I, H, W, C] or [B, H, W, C] float32, normalised. Images that a row does not
                have may hold anything: no placeholder asks for them.
            train: dropout of the encoder is on.
        """
        if images.ndim == 4:
            images = images[:, None]
        batch, count = images.shape[:2]
        flat = images.reshape(batch * count, *images.shape[2:])
        features = self.image.features(flat, self.feature_layer, train=train)  # [B I, T, D]
        if not self.keep_prefix:
            features = features[:, self.image.num_prefix :]
        if self.compression is not None:
            features, _ = self.compression(features)
        tokens, _ = self.connector(features)  # [B I, Q, D]
        tokens = tokens.reshape(batch, count * tokens.shape[1], tokens.shape[2])
        if self.newline:
            last = jnp.broadcast_to(self.newline_token, (batch, 1, tokens.shape[2]))
            tokens = jnp.concatenate([tokens, last.astype(tokens.dtype)], axis=1)
        return tokens

    def image_tokens(self, images: jax.Array) -> jax.Array:
        """Returns [B, I T, D]: the encoder's output after its final norm, class token, registers
        and patches in row-major order, image after image.

        Args:
            images: [B, I, H, W, C] or [B, H, W, C] float32, normalised.
        """
        flat = images.reshape(-1, *images.shape[-3:])
        tokens = self.image.features(flat)
        return tokens.reshape(images.shape[0], -1, tokens.shape[-1])

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Returns [..., V] float32 for tokens [..., D] after the final norm."""
        return self.language_model.logits(tokens)

    def embed(
        self,
        text: jax.Array,
        images: jax.Array | None = None,
        *,
        visual_index: jax.Array | None = None,
        visual_weight: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Returns [B, L, D]: the embedded text with visual tokens in place of the placeholders.

        before: [ a  <img> <img>  b  <img> ]    visual_index: [ .  0  1  .  2 ]
        after:  [ a   v0    v1    b   v2   ]

        Args:
            text: [B, L] int32 token ids, one `image_token_id` per visual token.
            images: [B, I, H, W, C] or [B, H, W, C] float32, normalised; None for text alone.
            visual_index: [B, L] or [B, L, J] int32, positions among `visual_tokens`; read at the
                placeholders alone. None takes them in their order.
            visual_weight: [B, L, J] float32: a placeholder stands for a weighted sum of J visual
                tokens (tiles that are resampled). None with [B, L].
            train: dropout of the encoder is on.
        """
        if visual_weight is None:
            check_shapes("B L; B L", text, visual_index)
        else:
            check_shapes("B L; B L J; B L J", text, visual_index, visual_weight)
        x = self.language_model.embed(text)
        if images is None:
            return x
        here = text == self.image_token_id  # [B, L]
        visual = self.visual_tokens(images, train=train)
        if visual_index is None:
            visual_index = jnp.maximum(jnp.cumsum(here, axis=1) - 1, 0)
        put = gather_tokens(visual, visual_index, visual_weight)
        return jnp.where(here[:, :, None], put.astype(x.dtype), x)

    def __call__(
        self,
        text: jax.Array,
        images: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        *,
        visual_index: jax.Array | None = None,
        visual_weight: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        train: bool = False,
    ) -> LanguageOutput:
        """Returns the language model's logits and tokens.

        Args:
            text: [B, L] int32, see `embed`.
            images: see `embed`.
            text_mask: [B, L] bool, True = real token; visual tokens are real.
            visual_index: see `embed`.
            visual_weight: see `embed`.
            positions: see LanguageModel.
            segments: see LanguageModel.
            train: dropout of the encoder is on.
        """
        x = self.embed(
            text, images, visual_index=visual_index, visual_weight=visual_weight, train=train
        )
        return self.language_model(
            mask=text_mask, embeddings=x, positions=positions, segments=segments, train=train
        )


def gather_tokens(
    tokens: jax.Array, index: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
    """Returns [B, L, D], tokens of every row by their numbers, or weighted sums of them.

    Args:
        tokens: [B, P, D].
        index: [B, L] int32 in 0..P - 1, or [B, L, J] with a weight.
        weight: [B, L, J].
    """
    if weight is None:
        return jnp.take_along_axis(tokens, index[:, :, None], axis=1)
    batch, length, number = index.shape
    flat = jnp.take_along_axis(tokens, index.reshape(batch, -1)[:, :, None], axis=1)
    parts = flat.reshape(batch, length, number, -1)  # [B, L, J, D]
    return jnp.einsum("bljd,blj->bld", parts, weight.astype(parts.dtype))


def build_llava(
    image: Mapping[str, Any],
    connector: Mapping[str, Any],
    language_model: Mapping[str, Any],
    *,
    image_token_id: int,
    feature_layer: int | None = None,
    keep_prefix: bool = False,
    newline: bool = False,
    compression: Mapping[str, Any] | None = None,
    pruning: Mapping[str, int] | None = None,
) -> Llava:
    """Returns a Llava.

    Args:
        image: {"name": a key of two_towers.IMAGE_ENCODERS, **its arguments}.
        connector: {"name": a key of connectors.CONNECTORS, **its arguments}.
        language_model: arguments of `build_language_model`.
        image_token_id: see Llava.
        feature_layer: see Llava.
        keep_prefix: see Llava.
        newline: see Llava.
        compression: {"name": a key of compression.COMPRESSIONS, **its arguments}; None has none.
        pruning: {"layer": K, "keep": R}: a prompt keeps R visual tokens of an image after K layers
            of the language model (models/fastv.py); None keeps all.

    Raises:
        ValueError: for an unknown name or argument.
    """
    decoder = build_language_model(**{k: v for k, v in language_model.items() if k != "name"})
    model = Llava(
        build(IMAGE_ENCODERS, image, "image encoder"),
        build_connector(connector, decoder.width, decoder.dtype),
        decoder,
        image_token_id=image_token_id,
        feature_layer=feature_layer,
        keep_prefix=keep_prefix,
        newline=newline,
        compression=None if compression is None else build_compression(compression),
    )
    return model if pruning is None else _pruned(model, **pruning)


def _pruned(model: Llava, layer: int, keep: int) -> Llava:
    if not 0 <= keep <= model.tokens_per_image:
        raise ValueError(
            f"pruning keeps between 0 and {model.tokens_per_image} visual tokens, those of an "
            f"image, got {keep}"
        )
    pruned = prune(model.language_model, layer, model.tokens_per_image - keep)
    return model.clone(language_model=pruned)
