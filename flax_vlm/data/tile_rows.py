# SPDX-License-Identifier: Apache-2.0
r"""Idefics3 and SmolVLM: a picture is resized to whole tiles, each announced in words.

    +----+----+    <fake_token_around_image><row_1_col_1> <image> ..  \
    | 11 | 12 |    <fake_token_around_image><row_1_col_2> <image> .. \n     a line per row of tiles
    +----+----+    \n<fake_token_around_image><global-img> <image> .. <fake_token_around_image>

Source: Idefics3 (arXiv:2408.12637, section 4.1); rounding as in transformers 5.24.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_vlm.data.chat_templates import IMAGE_MARKER
from flax_vlm.data.images import KINDS, resize_image
from flax_vlm.data.tiles import Channels, Size


@dataclasses.dataclass(frozen=True)
class TileRows:
    """Idefics3 and SmolVLM.

    Attributes:
        processor: class of transformers.
        longest: the longer side of a picture before it is made of whole tiles.
        tile: side of a tile in pixels.
        mean: per channel, in units of x / 255.
        std: per channel, in units of x / 255.
        kind: of resize, a key of images.KINDS.
        is_cut: False sees the whole alone.
        grid: (rows, columns) of a tile's tokens.
    """

    processor: str
    longest: int
    tile: int
    mean: Channels
    std: Channels
    kind: str = "lanczos"
    is_cut: bool = True
    grid: Size = (1, 1)

    @property
    def image_size(self) -> Size:
        """Of a tile."""
        return (self.tile, self.tile)

    @property
    def num_places(self) -> int:
        """J: tokens that a marker stands for."""
        return 1

    def num_tiles(self, size: Size, alone: bool) -> int:
        """Returns how many tiles a picture becomes, the whole included."""
        return math.prod(self._tile_grid(size)) + 1

    def tiles(self, image: np.ndarray, alone: bool) -> np.ndarray:
        """Returns [n, tile, tile, 3] uint8, the whole last."""
        side = self.tile
        image = resize_image(image, longest_edge(image.shape[:2], self.longest), self.kind)
        if not self.is_cut:
            return resize_image(image, self.image_size, self.kind)[None]
        size = whole_tiles(image.shape[:2], side)
        image = resize_image(image, size, self.kind)
        if size == self.image_size:
            return image[None]
        rows, columns = (n // side for n in size)
        cut = image.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        whole = resize_image(image, self.image_size, self.kind)
        return np.concatenate([cut.reshape(-1, side, side, 3), whole[None]])

    def text(self, size: Size, alone: bool) -> str:
        """Returns the markers of every tile behind the words that announce it."""
        fake, markers = "<fake_token_around_image>", IMAGE_MARKER * math.prod(self.grid)
        rows, columns = self._tile_grid(size)
        text = ""
        for row in range(1, rows + 1):
            tiles = range(1, columns + 1)
            text += "".join(f"{fake}<row_{row}_col_{column}>{markers}" for column in tiles) + "\n"
        return f"{text}{chr(10) * bool(rows)}{fake}<global-img>{markers}{fake}"

    def places(self, size: Size, alone: bool) -> tuple[np.ndarray, np.ndarray]:
        """Returns (index [Q, 1], weight [Q, 1]): all tokens in their order."""
        number = self.num_tiles(size, alone) * math.prod(self.grid)
        return np.arange(number, dtype=np.int32)[:, None], np.ones((number, 1), np.float32)

    def at_size(self, tile: int, config: Mapping[str, Any]) -> TileRows:
        """Returns the layout for tiles of another size, up to as many of them.

        Args:
            tile: side in pixels.
            config: config.json of the model.
        """
        return dataclasses.replace(self, tile=tile, longest=self.longest // self.tile * tile)

    def to_config(self) -> dict[str, Any]:
        """Returns the preprocessor_config.json that transformers reads."""
        return {
            "image_processor_type": self.processor,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"longest_edge": self.longest},
            "do_image_splitting": self.is_cut,
            "max_image_size": {"longest_edge": self.tile},
            "resample": int(KINDS[self.kind]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def _tile_grid(self, size: Size) -> Size:
        """Returns (rows, columns) of tiles; (0, 0) where there is the whole alone."""
        size = whole_tiles(longest_edge(size, self.longest), self.tile)
        if not self.is_cut or size == self.image_size:
            return (0, 0)
        return size[0] // self.tile, size[1] // self.tile


def longest_edge(size: Size, longest: int) -> Size:
    """Returns a size whose longer side is `longest` and whose shorter one is even."""
    height, width = size
    if width >= height:
        short = int(longest / (width / height))
        return max(short + short % 2, 1), longest
    short = int(longest * (width / height))
    return longest, max(short + short % 2, 1)


def whole_tiles(size: Size, tile: int) -> Size:
    """Returns a size rounded up to whole tiles: the longer side first, the other follows its shape.

    Args:
        size: after `longest_edge`.
        tile: side in pixels.
    """
    height, width = size
    shape = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / shape) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * shape) / tile) * tile


def read_tile_rows(config: Mapping[str, Any], mean: Channels, std: Channels, kind: str) -> TileRows:
    """Returns the layout of a preprocessor_config.json of Idefics3 or SmolVLM.

    Args:
        config: its keys, defaults filled in.
        mean: see TileRows.
        std: see TileRows.
        kind: see TileRows.
    """
    return TileRows(
        config["image_processor_type"],
        int(config["size"]["longest_edge"]),
        int(config["max_image_size"]["longest_edge"]),
        mean,
        std,
        kind,
        bool(config["do_image_splitting"]),
    )
