# SPDX-License-Identifier: Apache-2.0
"""Position embeddings of image grids: the sine-cosine table, and resizing a learned table.

Runs in numpy float64 on the host: tables are made once, and a checkpoint is resized once, when it
is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flax_vlm.build import lookup

Grid = tuple[int, int]


def sincos2d(grid: Grid, width: int, temperature: float = 10_000.0) -> np.ndarray:
    """Returns the fixed 2-D table [P, D] float32, rows in row-major order of the grid.

        omega_i = temperature^(-i / (D/4 - 1)), i = 0 .. D/4 - 1
        table(y, x) = [sin(x omega), cos(x omega), sin(y omega), cos(y omega)]

    Args:
        grid: (rows, columns) of patches.
        width: D, a multiple of 4 that is at least 8.
        temperature: the longest wavelength over 2 pi.

    Raises:
        ValueError: if the width cannot be cut into four parts of at least two frequencies.

    Source: MoCo v3 (arXiv:2104.02057) in the order of big_vision `models/vit.py`, posemb_sincos_2d.
    """
    if width % 4 or width < 8:
        raise ValueError(f"sincos2d needs a width that is a multiple of 4 and >= 8, got {width}")
    omega = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1) * omega  # [P, D/4] each
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def resize_positions(
    positions: np.ndarray, old_grid: Grid, new_grid: Grid, *, method: str, num_prefix: int = 0
) -> np.ndarray:
    """Returns a learned table resampled to another grid; dtype and rank stay.

        before: [prefix 0 .. prefix n-1 | old rows x old columns, row-major]
        after:  [prefix 0 .. prefix n-1 | new rows x new columns, row-major]

    The prefix (class token, registers) is copied; the same grid in and out changes nothing.

    Args:
        positions: [T, D] or [1, T, D] with T = num_prefix + old rows * old columns.
        old_grid: (rows, columns) of the table.
        new_grid: (rows, columns) wanted.
        method: a key of RESIZE_METHODS; what to choose depends on where the checkpoint comes from.
        num_prefix: leading entries without a place in the grid.

    Raises:
        ValueError: if the table does not have the size that `old_grid` and `num_prefix` say.
    """
    resize_axis = lookup(RESIZE_METHODS, method, "resize method")
    table = np.asarray(positions)
    flat = table.reshape(-1, table.shape[-1])
    if flat.shape[0] != num_prefix + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"a {old_grid[0]} x {old_grid[1]} grid with {num_prefix} prefix tokens needs "
            f"{num_prefix + old_grid[0] * old_grid[1]} positions, got {flat.shape[0]}"
        )
    if old_grid == new_grid:
        return table
    prefix, patches = flat[:num_prefix], flat[num_prefix:].astype(np.float64)
    patches = patches.reshape(*old_grid, -1)  # [rows, columns, D]
    rows, columns = (resize_axis(o, n) for o, n in zip(old_grid, new_grid, strict=True))
    patches = np.einsum("ij,kl,jld->ikd", rows, columns, patches, optimize=True)
    patches = patches.reshape(-1, flat.shape[1])
    result = np.concatenate([prefix, patches.astype(table.dtype)])  # [T', D]
    return result if table.ndim == 2 else result[None]


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the Keys kernel: a = -0.5 with antialias everywhere, -0.75 in torch without."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


def _resizer(
    kernel: Callable[[np.ndarray], np.ndarray], *, antialias: bool, replicate_edge: bool = False
) -> Callable[[int, int], np.ndarray]:
    """Returns a function (old, new) -> [new, old], a matrix that resamples one axis.

    Pixel centres lie at half integers.
    """

    def matrix(old: int, new: int) -> np.ndarray:
        scale = old / new
        width = max(scale, 1.0) if antialias else 1.0
        centre = (np.arange(new) + 0.5) * scale - 0.5  # [new]
        if not replicate_edge:
            weights = kernel((centre[:, None] - np.arange(old)[None, :]) / width)
            return weights / weights.sum(1, keepdims=True)
        taps = np.floor(centre)[:, None] + np.arange(-1, 3)[None, :]  # [new, 4]
        weights = np.zeros((new, old))
        rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
        columns = np.clip(taps, 0, old - 1).astype(int)
        np.add.at(weights, (rows, columns), kernel(centre[:, None] - taps))
        return weights

    return matrix


# name: function (old, new) -> [new, old]. jax.image.resize has no "bicubic_torch": a is -0.75 and
# edges are repeated there
RESIZE_METHODS: dict[str, Callable[[int, int], np.ndarray]] = {
    "bilinear": _resizer(_triangle, antialias=False),
    "bilinear_antialias": _resizer(_triangle, antialias=True),  # SigLIP 2 NaFlex
    "bicubic_antialias": _resizer(_cubic(-0.5), antialias=True),  # DINOv2 with registers
    # ViT, CLIP, SigLIP and DINOv2 in Hugging Face
    "bicubic_torch": _resizer(_cubic(-0.75), antialias=False, replicate_edge=True),
}
