# SPDX-License-Identifier: Apache-2.0
"""NaFlex: a vision tower for images of any aspect ratio, packed into one number of patches.

Paper: SigLIP 2, Tschannen et al. 2025, arXiv:2502.14786, section 2.4.2. Every image is cut into
rows x columns patches of its own, at most P; the rest is padding that nothing attends to. The
learned grid of positions is resampled to each image's grid (bilinear, antialiased), inside the
compiled program, so that all images share one.

Differs from the paper: padding gets the position of the first patch, as in transformers; nothing
sees it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_vlm.models.vit import VisionOutput, VisionTransformer, vit_fields
from flax_vlm.models.vit_checks import check_choices
from flax_vlm.nn.masks import padding_mask
from flax_vlm.nn.patches import grid_size, patchify
from flax_vlm.shapes import check_shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPatches:
    """Images of several sizes as one batch.

    Attributes:
        pixels: [B, P, h w C] float32, normalised, patches in row-major order, then padding.
        shapes: [B, 2] int32, rows and columns of patches; their product is at most P.
    """

    pixels: jax.Array
    shapes: jax.Array

    @property
    def mask(self) -> jax.Array:
        """[B, P] bool, True = a patch, False = padding."""
        count = self.shapes[:, 0] * self.shapes[:, 1]
        return jnp.arange(self.pixels.shape[1])[None, :] < count[:, None]


def packed_positions(table: jax.Array, shapes: jax.Array, length: int) -> jax.Array:
    """Returns the positions of every image's patches, [B, P, D].

    Args:
        table: [rows, columns, D].
        shapes: [B, 2] int32.
        length: P.
    """
    index = jnp.arange(length)[None, :]  # [1, P]
    rows, columns = shapes[:, :1], shapes[:, 1:]  # [B, 1] each
    index = jnp.where(index < rows * columns, index, 0)  # [B, P]
    by_row = _resample(index // columns, rows, table.shape[0])  # [B, P, rows]
    by_column = _resample(index % columns, columns, table.shape[1])  # [B, P, columns]
    weights = by_row[:, :, :, None] * by_column[:, :, None, :]
    weights = weights.reshape(*index.shape, -1)  # [B, P, rows columns]
    return weights @ table.reshape(-1, table.shape[-1])


def _resample(index: jax.Array, new: jax.Array, old: int) -> jax.Array:
    """Returns [B, P, old]: how much of each old entry the new entry `index` takes (a triangle)."""
    scale = old / new  # [B, 1]
    centre = (index + 0.5) * scale - 0.5  # [B, P]
    distance = centre[:, :, None] - jnp.arange(old)[None, None, :]
    width = jnp.maximum(scale, 1)[:, :, None]  # antialias: wider where the new grid is coarser
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(distance) / width)
    return weights / weights.sum(-1, keepdims=True)


class NaFlexVisionTransformer(VisionTransformer):
    """A VisionTransformer with pooling "map" that also takes PackedPatches.

    Images [B, H, W, C] may have any size that the patches divide. `image_size` is the grid of the
    learned positions, in pixels.
    """

    def setup(self) -> None:
        """Creates the tower's parts.

        Raises:
            ValueError: for fields that packed images do not go with.
        """
        wanted = dict(
            pooling="map",
            class_token=False,
            num_registers=0,
            mask_token=False,
            position_embedding="learned",
            rotary_grid=None,
            patch_dropout=0.0,
        )
        wrong = {k: getattr(self, k) for k, v in wanted.items() if getattr(self, k) != v}
        if wrong:
            raise ValueError(f"naflex_vit needs {wanted}, got {wrong}")
        super().setup()

    def _encode(
        self,
        image: jax.Array | PackedPatches,
        *,
        train: bool,
        masked: jax.Array | None = None,
    ) -> VisionOutput:
        packed = image if isinstance(image, PackedPatches) else self._pack(image)
        sizes = check_shapes("B P _; B 2", packed.pixels, packed.shapes)
        x = self.patches(packed.pixels)  # [B, P, D]
        table = self.positions.reshape(*self.grid, self.width)
        x = x + packed_positions(table, packed.shapes, sizes["P"]).astype(x.dtype)
        x = self.embedding_dropout(x, deterministic=not train)
        if self.pre_norm:
            x = self.ln_pre(x)
        mask = padding_mask(packed.mask)
        tokens = self.encoder(x, mask, deterministic=not train)
        return VisionOutput(tokens, self.pool(tokens, mask))

    def _pack(self, image: jax.Array) -> PackedPatches:
        shape = grid_size(image.shape[1:3], self.patch_size, drop_remainder=self.drop_remainder)
        pixels = patchify(image, self.patch_size, drop_remainder=self.drop_remainder)
        return PackedPatches(pixels, jnp.broadcast_to(jnp.array(shape), (image.shape[0], 2)))


def build_naflex_vit(
    variant: str | None = None, *, pool: str = "map", **fields: Any
) -> NaFlexVisionTransformer:
    """Returns a NaFlexVisionTransformer.

    Args:
        variant: size and patch size, "B/16"; None takes the sizes from `fields`.
        pool: "map".
        **fields: other fields of VisionTransformer.

    Raises:
        ValueError: for fields that contradict each other.
    """
    model = NaFlexVisionTransformer(**vit_fields(variant, pool, False, fields))
    check_choices(model)
    return model
