# SPDX-License-Identifier: Apache-2.0
"""NaFlex: an image of any aspect ratio as at most so many patches, padded to that number.

Paper: SigLIP 2, Tschannen et al. 2025, arXiv:2502.14786, section 2.4.2. The aspect ratio is kept up
to whole patches, so the image is squeezed by less than a patch.

Differs from big_vision: the image is resized as uint8 by Pillow, as transformers does, not as
float32 in -1..1, and padding is pixel value 0 in uint8; what it becomes on the device is hidden by
the mask.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from flax_vlm.build import lookup
from flax_vlm.data.images import KINDS, resize_image

# the scale is found by bisection; these decide which of two sizes wins, so they are transformers'
_SCALES = (1e-6, 100.0)
_PRECISION = 1e-5


def naflex_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """Returns the (height, width) in pixels that an image is resized to.

    The greatest scale s for which ceil(s h / p) * ceil(s w / p) is at most `max_num_patches`; each
    side is at least one patch. An image may grow.

    Source: transformers, image_processing_siglip2, get_image_size_for_max_num_patches.
    """

    def sides(scale: float) -> tuple[int, int]:
        return tuple(
            max(1, math.ceil(side * scale / patch_size)) * patch_size for side in (height, width)
        )

    low, high = _SCALES
    while high - low >= _PRECISION:
        scale = (low + high) / 2
        rows, columns = (side // patch_size for side in sides(scale))
        low, high = (scale, high) if rows * columns <= max_num_patches else (low, scale)
    return sides(low)


@dataclasses.dataclass(frozen=True)
class NaflexRecipe:
    """How a SigLIP 2 NaFlex checkpoint wants its images.

    Attributes:
        mean: per channel, in units of x / 255.
        std: per channel, in units of x / 255.
        patch_size: pixels.
        max_num_patches: P.
        kind: of resize, a key of `flax_vlm.data.images.KINDS`.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    patch_size: int = 16
    max_num_patches: int = 256
    kind: str = "bilinear"

    def __post_init__(self):
        lookup(KINDS, self.kind, "kind of resize")
        if self.patch_size < 1 or self.max_num_patches < 1:
            raise ValueError(
                f"NaFlex needs patch_size and max_num_patches of at least 1, "
                f"got {self.patch_size} and {self.max_num_patches}"
            )

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the packed patches of an image.

        Args:
            image: [H, W, 3] uint8, as `flax_vlm.data.decode.decode_image` returns it.

        Returns:
            "patches" [P, p p 3] uint8, row-major order, the pixels of a patch in (y, x, channel)
            order, then zeros; "patch_mask" [P] bool, True = a patch; "spatial_shape" [2] int32,
            rows and columns of patches.
        """
        p = self.patch_size
        size = naflex_size(*image.shape[:2], p, self.max_num_patches)
        rows, columns = (side // p for side in size)
        pixels = resize_image(image, size, self.kind)
        cut = pixels.reshape(rows, p, columns, p, 3).transpose(0, 2, 1, 3, 4)
        patches = np.zeros((self.max_num_patches, p * p * 3), np.uint8)
        patches[: rows * columns] = cut.reshape(rows * columns, -1)
        return {
            "patches": patches,  # [P, p p 3]
            "patch_mask": np.arange(self.max_num_patches) < rows * columns,
            "spatial_shape": np.array([rows, columns], np.int32),
        }

    def normalize(self, patches: np.ndarray) -> np.ndarray:
        """Returns patches [..., p p 3] as the model wants them: float32, (x / 255 - mean) / std."""
        pixels = patches.reshape(*patches.shape[:-1], -1, 3).astype(np.float32) / 255
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return pixels.reshape(patches.shape)

    def to_config(self) -> dict[str, object]:
        """Returns the preprocessor_config.json that transformers reads."""
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "patch_size": self.patch_size,
            "max_num_patches": self.max_num_patches,
            "resample": int(KINDS[self.kind]),
            "rescale_factor": 1 / 255,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
