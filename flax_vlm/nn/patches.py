# SPDX-License-Identifier: Apache-2.0
"""From pixels to patch tokens, and dropping patches in training.

Papers: ViT, Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; FLIP, Li et al. 2023,
arXiv:2212.00794 (patch dropout).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.shapes import check_shapes

Size = int | Sequence[int]


def as_pair(size: Size) -> tuple[int, int]:
    """Returns (height, width) for a number or a pair of numbers."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def grid_size(
    image_size: Size, patch_size: Size, *, drop_remainder: bool = False
) -> tuple[int, int]:
    """Returns (rows, columns) of patches.

    Args:
        image_size: pixels, a number or (height, width).
        patch_size: pixels, a number or (height, width).
        drop_remainder: ignore the pixels at the lower and right border that fill no patch, as a
            VALID convolution
            does. SigLIP So400m/14 at 384 pixels needs it (27 x 27 patches, 6 pixels unseen).

    Raises:
        ValueError: if the patches do not fill the image and `drop_remainder` is off.
    """
    (height, width), (patch_h, patch_w) = as_pair(image_size), as_pair(patch_size)
    if (height % patch_h or width % patch_w) and not drop_remainder:
        patch = f"{patch_h}" if patch_h == patch_w else f"{patch_h} x {patch_w}"
        raise ValueError(
            f"patch_size {patch} must divide the image, got {height} x {width}; "
            "resize it in the data config (or set drop_remainder to ignore the border)"
        )
    if height < patch_h or width < patch_w:
        raise ValueError(
            f"an image must hold one patch, got {height} x {width} for {patch_h} x {patch_w}"
        )
    return height // patch_h, width // patch_w


def patchify(image: jax.Array, patch_size: Size, *, drop_remainder: bool = False) -> jax.Array:
    """Returns the pixels of every patch, [B, P, h w C], patches in row-major order.

    Args:
        image: [B, H, W, C].
        patch_size: pixels, a number or (height, width).
        drop_remainder: see `grid_size`.
    """
    batch, height, width, channels = image.shape
    patch_h, patch_w = as_pair(patch_size)
    rows, columns = grid_size((height, width), patch_size, drop_remainder=drop_remainder)
    x = image[:, : rows * patch_h, : columns * patch_w]
    x = x.reshape(batch, rows, patch_h, columns, patch_w, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)  # [B, P, h w C]


class PatchEmbed(nn.Module):
    """A linear map of every patch: a convolution whose stride is its kernel, written as one matmul.

    Attributes:
        width: D.
        patch_size: pixels, a number or (height, width).
        use_bias: CLIP has none.
        drop_remainder: see `grid_size`.
        dtype: of the matmul; parameters are float32.
        kernel_init: initialiser of the kernel [h, w, C, D].
    """

    width: int
    patch_size: Size
    use_bias: bool = True
    drop_remainder: bool = False
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Returns [B, P, D], patches in row-major order.

        Args:
            image: [B, H, W, C], or patches that are cut already, [B, P, h w C].
        """
        patch_h, patch_w = as_pair(self.patch_size)
        x = jnp.asarray(image, self.dtype)
        if x.ndim == 4:
            x = patchify(x, self.patch_size, drop_remainder=self.drop_remainder)
        channels = x.shape[-1] // (patch_h * patch_w)
        kernel = self.param(
            "kernel", self.kernel_init, (patch_h, patch_w, channels, self.width), jnp.float32
        )
        x = x @ kernel.astype(self.dtype).reshape(-1, self.width)  # [B, P, D]
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
            x = x + bias.astype(self.dtype).reshape(1, 1, -1)
        return x


def num_kept(num_patches: int, rate: float) -> int:
    """Returns how many of the patches a training step keeps: the floor of (1 - rate) P, at least 1.

    Raises:
        ValueError: if the rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"patch_dropout must be in [0, 1), got {rate}")
    # the small term keeps (1 - 0.9) * 10 = 0.99...9 at 1
    return max(1, int((1.0 - rate) * num_patches + 1e-6))


def drop_patches(tokens: jax.Array, rng: jax.Array, keep: int) -> jax.Array:
    """Returns [B, keep, D]: a uniformly random subset of each example's patches, in their order.

    Args:
        tokens: [B, P, D], with their positions already added and without class token.
        rng: a PRNG key.
        keep: how many patches stay; static, so that every step has the same shapes.
    """
    sizes = check_shapes("B P D", tokens)
    noise = jax.random.uniform(rng, (sizes["B"], sizes["P"]))
    chosen = jnp.sort(jnp.argsort(noise, axis=1)[:, :keep], axis=1)  # [B, keep]
    return jnp.take_along_axis(tokens, chosen[:, :, None], axis=1)
