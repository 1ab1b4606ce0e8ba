# SPDX-License-Identifier: Apache-2.0
"""Images and texts -> batch, as a model was evaluated in training, or as its checkpoint asks."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_vlm.data.anyres import AnyRes
from flax_vlm.data.hf_images import ImageRecipe
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.data.images import BrokenImage, read_image
from flax_vlm.data.naflex import NaflexRecipe
from flax_vlm.data.text import Tokenizer
from flax_vlm.data.tile_rows import TileRows


@dataclasses.dataclass(frozen=True)
class Processor:
    """Images and texts -> batch.

    Attributes:
        image_recipe: operations on pixels, mean and std; for NaFlex, packing; tiles for LLaVA-NeXT,
            OneVision, Idefics3; None where the model takes no images.
        text_recipe: tokenizer and length; None where the model takes no texts, or its folder has no
            tokenizer.
    """

    image_recipe: ImageRecipe | NaflexRecipe | AnyRes | TileRows | None
    text_recipe: TextRecipe | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: if there is none.
        """
        if self.text_recipe is None:
            raise ValueError(
                "texts need a tokenizer, and there is none: the model is an image encoder, or its "
                "folder has no tokenizer files"
            )
        return self.text_recipe.tokenizer

    def image_batch(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """Returns what `predict` takes of images: {"image": [n, H, W, 3] uint8}, or for NaFlex
        {"patches": [n, P, h w 3] uint8, "spatial_shape": [n, 2] int32}.

        Args:
            images: PIL images, [h, w, 3] or [h, w] uint8 arrays, encoded bytes or paths (mixed
                sizes are fine).

        Raises:
            ValueError: if one of them cannot be read, with its position and the reason; if there
                are none.
        """
        if self.image_recipe is None:
            raise ValueError("this model reads text alone, it takes no images")
        if len(images) == 0:
            raise ValueError("images must be a list of at least one, got an empty one")
        pixels = [_read(image, i) for i, image in enumerate(images)]
        if isinstance(self.image_recipe, NaflexRecipe):
            packed = [self.image_recipe(image) for image in pixels]
            return {key: np.stack([p[key] for p in packed]) for key in ("patches", "spatial_shape")}
        if not isinstance(self.image_recipe, ImageRecipe):
            raise ValueError(
                "this model cuts an image into tiles, as many as its shape asks for: what it makes "
                "of one is seen with a prompt alone (generate)"
            )
        rng = np.random.default_rng(0)  # operations of evaluation draw nothing from it
        ops, rows = self.image_recipe.build_ops(), []
        for image in pixels:
            for op in ops:
                image = op(image, rng)
            rows.append(image)
        return {"image": np.stack(rows)}

    def images(self, images: Sequence[Any]) -> np.ndarray | list[np.ndarray]:
        """Returns the images as the model sees them, [n, H, W, 3] uint8; for NaFlex a list of
        arrays [H, W, 3] of several sizes. For the arguments see `image_batch`.
        """
        batch = self.image_batch(images)
        if "image" in batch:
            return batch["image"]
        return [unpacked(p, s) for p, s in zip(*batch.values(), strict=True)]

    def grids(self, batch: Mapping[str, np.ndarray], grid: tuple[int, int]) -> np.ndarray:
        """Returns the (rows, columns) of patches of every row of a batch, [n, 2].

        Args:
            batch: of `image_batch`.
            grid: of the model, for images of its one size.
        """
        return batch.get("spatial_shape", np.tile(grid, (len(next(iter(batch.values()))), 1)))

    def texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns {"text": [n, L] int32, "text_mask": [n, L] bool}; longer texts are cut.

        Raises:
            ValueError: if there is no tokenizer.
        """
        ids, mask, _ = self.tokenizer.encode(list(texts), self.text_recipe.length)
        return {"text": ids, "text_mask": mask}


def _read(image: Any, index: int) -> np.ndarray:
    try:
        image = pathlib.Path(image) if isinstance(image, str) else image
        return read_image(image)[0]
    except BrokenImage as error:
        raise ValueError(f"image {index} could not be read: {error}") from error


def unpacked(patches: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Returns the image [h rows, w columns, 3] of packed square patches [P, h w 3]."""
    rows, columns = (int(n) for n in shape)
    side = int((patches.shape[-1] // 3) ** 0.5)
    image = patches[: rows * columns].reshape(rows, columns, side, side, 3)
    return image.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
