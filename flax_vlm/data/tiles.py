# SPDX-License-Identifier: Apache-2.0
"""Pictures of any size for an encoder of one size: they become tiles, and more text.

What is the same for data.anyres (LLaVA-NeXT, OneVision) and data.tile_rows (Idefics3, SmolVLM).
Which visual token stands where is a table of indices into the tokens of all tiles of a row, one
tile after the other (`visual_index` of models/llava.py). Numpy alone; sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Size = tuple[int, int]
Channels = tuple[float, float, float]
NEWLINE = -1  # in a table of indices: the learned token that ends rows


class Layout(Protocol):
    """How a picture becomes tiles, text and indices. `alone`: it is the only one of its row."""

    mean: Channels
    std: Channels

    @property
    def image_size(self) -> Size:
        """Of a tile."""

    @property
    def num_places(self) -> int:
        """J: tokens that a marker stands for, a weighted sum."""

    def num_tiles(self, size: Size, alone: bool) -> int:
        """Returns how many tiles a picture of a size becomes."""

    def tiles(self, image: np.ndarray, alone: bool) -> np.ndarray:
        """Returns [n, H, W, 3] uint8 for a picture [h, w, 3] uint8."""

    def text(self, size: Size, alone: bool) -> str:
        """Returns what stands in a prompt, one marker per visual token."""

    def places(self, size: Size, alone: bool) -> tuple[np.ndarray, np.ndarray]:
        """Returns (index [Q, J] int32 into the tokens of the tiles or NEWLINE, weight [Q, J]) of
        the markers in `text`.
        """

    def to_config(self) -> dict[str, Any]:
        """Returns the preprocessor_config.json that transformers reads."""


def row_places(
    layout: Layout, sizes: Sequence[Size], num_tiles: int, tokens_per_tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (index [Q, J] int32, weight [Q, J] float32) of all markers of a row, in order.

    Args:
        layout: of the pictures.
        sizes: of the pictures of the row.
        num_tiles: I of the row's images; the newline token lies behind all their tokens.
        tokens_per_tile: P.
    """
    alone, first, parts = len(sizes) == 1, 0, []
    for size in sizes:
        index, weight = layout.places(size, alone)
        newline = num_tiles * tokens_per_tile
        parts.append((np.where(index == NEWLINE, newline, index + first), weight))
        first += layout.num_tiles(size, alone) * tokens_per_tile
    index, weight = (np.concatenate(x) for x in zip(*parts, strict=True))
    return index.astype(np.int32), weight.astype(np.float32)


def one_side(size: dict[str, int]) -> int:
    """Returns the side of square tiles.

    Raises:
        ValueError: if they are no squares.
    """
    sides = {value for value in size.values() if value is not None}
    if len(sides) != 1:
        raise ValueError(f"tiles must be squares, got the size {dict(size)}")
    return int(sides.pop())
