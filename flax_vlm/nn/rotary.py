# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: q and k are turned by angles that grow with the position.

Papers: RoFormer, Su et al. 2021, arXiv:2104.09864 (1-D); EVA-02, Fang et al. 2023, arXiv:2303.11331
(section 2.1, 2-D). On image grids pairs are interleaved, (0, 1), (2, 3), ..., as in RoFormer; the
first half of a head's width turns with the row, the second with the column; tokens without a place
in the grid (class token) are not turned. In language models, which differ from the paper here,
pairs are a half apart, (0, K/2), (1, K/2 + 1), ...
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Cosine and sine of every token's angles; a pair shares its angle.

    Attributes:
        cos: [T, K] or [B, T, K] float32.
        sin: likewise.
        halves: a pair is (i, i + K/2), not (2 i, 2 i + 1).
    """

    cos: jax.Array
    sin: jax.Array
    halves: bool = dataclasses.field(default=False, metadata={"static": True})


def rotary2d(
    grid: tuple[int, int],
    head_dim: int,
    *,
    reference: tuple[int, int],
    num_prefix: int = 0,
    temperature: float = 10_000.0,
) -> Rotary:
    """Returns the angles of a grid of patches in row-major order, behind `num_prefix` still tokens.

        angle(y, i) = y reference_rows / rows * temperature^(-4 i / K),  i = 0 .. K/4 - 1

    and the same for x: another grid than the one that was trained on covers the same range.

    Args:
        grid: (rows, columns) of patches.
        head_dim: K, a multiple of 4.
        reference: (rows, columns) of the grid that was trained on.
        num_prefix: leading tokens that are not turned.
        temperature: the longest wavelength over 2 pi.

    Raises:
        ValueError: if 4 does not divide the head's width.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary embedding needs a head width that 4 divides, got {head_dim}")
    frequencies = temperature ** (-np.arange(head_dim // 4) * 4.0 / head_dim)
    y, x = (np.arange(n) / n * r for n, r in zip(grid, reference, strict=True))
    y, x = (a.reshape(-1, 1) for a in np.meshgrid(y, x, indexing="ij"))  # [P, 1] each
    angles = np.concatenate([y * frequencies, x * frequencies], axis=1)  # [P, K/2]
    angles = np.concatenate([np.zeros((num_prefix, head_dim // 2)), angles]).repeat(2, axis=1)
    return Rotary(
        jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    )  # [T, K] each


def rotary1d(positions: jax.Array, frequencies: jax.Array, factor: float = 1.0) -> Rotary:
    """Returns the angles of a language model's tokens, position times frequency.

    Args:
        positions: [B, T] int32.
        frequencies: [K/2] float32, radians per position; see nn/rope_scaling.py.
        factor: cosine and sine are multiplied by it (YaRN).
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    angles = jnp.concatenate([angles, angles], axis=-1)  # [B, T, K]
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor, halves=True)


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Returns x [B, T, N, K], every pair (a, b) turned to (a cos - b sin, b cos + a sin)."""
    if rotary.halves:
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    else:
        turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    tokens, width = rotary.cos.shape[-2:]
    cos, sin = (
        a.astype(x.dtype).reshape(-1, tokens, 1, width) for a in (rotary.cos, rotary.sin)
    )  # [1|B, T, 1, K]
    return x * cos + turned * sin
