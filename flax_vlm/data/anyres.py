# SPDX-License-Identifier: Apache-2.0
r"""AnyRes of LLaVA-NeXT and LLaVA-OneVision: a picture in the grid of tiles that fits it best.

    +----+----+  padded to the grid that         [whole]  a b c d      whole, row by row,
    |####|####|  wastes least; '#' is picture    [tile 1] e f g h      then rows of all tiles,
    +----+----+                                  [tile 2] i j k l      padding cut off, each ended
                                                                       by the newline token:
                                                 a b c d  e f i j NL  g h k l NL

Sources: LLaVA-NeXT (blog, January 2024), LLaVA-OneVision (arXiv:2408.03326, section 3.2); rounding
as in transformers 5.24, where LLaVA's own code differs by a row at times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_vlm.data.chat_templates import IMAGE_MARKER
from flax_vlm.data.images import KINDS, resize_image
from flax_vlm.data.tiles import NEWLINE, Channels, Size, one_side


@dataclasses.dataclass(frozen=True)
class AnyRes:
    """LLaVA-NeXT and LLaVA-OneVision.

    Attributes:
        processor: class of transformers.
        pinpoints: sizes in pixels that a picture is padded to.
        tile: side of a tile in pixels.
        mean: per channel, in units of x / 255.
        std: per channel, in units of x / 255.
        kind: of resize, a key of images.KINDS.
        grid: (rows, columns) of a tile's tokens.
        max_tiles: the rows of tiles are shrunk to about so many tiles' tokens (OneVision, "anyres_
            max_9"); several pictures in a row are then not cut at all. None does neither (NeXT).
    """

    processor: str
    pinpoints: tuple[Size, ...]
    tile: int
    mean: Channels
    std: Channels
    kind: str = "bicubic"
    grid: Size = (1, 1)
    max_tiles: int | None = None

    @property
    def image_size(self) -> Size:
        """Of a tile."""
        return (self.tile, self.tile)

    @property
    def num_places(self) -> int:
        """J: tokens that a marker stands for, a weighted sum."""
        return 1 if self.max_tiles is None else 4

    def num_tiles(self, size: Size, alone: bool) -> int:
        """Returns how many tiles a picture becomes, the whole included."""
        return 1 + math.prod(self._tile_grid(size)) if self._is_cut(alone) else 1

    def tiles(self, image: np.ndarray, alone: bool) -> np.ndarray:
        """Returns [n, tile, tile, 3] uint8, the whole first."""
        if not self._is_cut(alone):
            return self._resized(self._squared(image), self.image_size)[None]
        size, side = image.shape[:2], self.tile
        target = best_pinpoint(size, self.pinpoints)
        inner = fitted(size, target)
        canvas = np.zeros((*target, 3), np.uint8)
        top, left = ((outer - n) // 2 for outer, n in zip(target, inner, strict=True))
        canvas[top : top + inner[0], left : left + inner[1]] = self._resized(image, inner)
        rows, columns = self._tile_grid(size)
        cut = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        whole = self._resized(image, self.image_size)
        return np.concatenate([whole[None], cut.reshape(-1, side, side, 3)])

    def text(self, size: Size, alone: bool) -> str:
        """Returns one marker per visual token."""
        return IMAGE_MARKER * len(self.places(size, alone)[0])

    def places(self, size: Size, alone: bool) -> tuple[np.ndarray, np.ndarray]:
        """Returns (index [Q, J], weight [Q, J])."""
        number = self.num_places
        whole = np.arange(math.prod(self.grid))  # [P]
        if not self._is_cut(alone):
            return _padded(np.append(whole, NEWLINE)[:, None], number)
        index = tile_index(self._tile_grid(size), self.grid)  # [rows, columns] of all tiles
        index = index[unpadded(size, index.shape)]
        index, weight = self._shrunk(index)  # [rows, columns, J]
        index = np.pad(index, [(0, 0), (0, 1), (0, 0)], constant_values=NEWLINE)
        weight = np.pad(weight, [(0, 0), (0, 1), (0, 0)], constant_values=1.0)
        weight[:, -1, 1:] = 0.0
        first = _padded(whole[:, None], number)
        return (
            np.concatenate([first[0], index.reshape(-1, number)]).astype(np.int32),
            np.concatenate([first[1], weight.reshape(-1, number)]).astype(np.float32),
        )

    def at_size(self, tile: int, config: Mapping[str, Any]) -> AnyRes:
        """Returns the layout for tiles of another size.

        Args:
            tile: side in pixels.
            config: config.json of the model; its image_grid_pinpoints are taken where it has them.
        """
        scaled = [[n // self.tile * tile for n in size] for size in self.pinpoints]
        found = config.get("image_grid_pinpoints", scaled)
        pinpoints = tuple((int(h), int(w)) for h, w in found)
        return dataclasses.replace(self, tile=tile, pinpoints=pinpoints)

    def to_config(self) -> dict[str, Any]:
        """Returns the preprocessor_config.json that transformers reads."""
        side = {"height": self.tile, "width": self.tile}
        return {
            "image_processor_type": self.processor,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": side if self.max_tiles else {"shortest_edge": self.tile},
            "resample": int(KINDS[self.kind]),
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            **self.model_config(),
        }

    def model_config(self) -> dict[str, Any]:
        """Returns the keys of config.json that say the same."""
        given: dict[str, Any] = {"image_grid_pinpoints": [list(size) for size in self.pinpoints]}
        if self.max_tiles:
            given["vision_aspect_ratio"] = f"anyres_max_{self.max_tiles}"
        return given

    def _is_cut(self, alone: bool) -> bool:
        return alone or self.max_tiles is None

    def _tile_grid(self, size: Size) -> Size:
        height, width = best_pinpoint(size, self.pinpoints)
        return height // self.tile, width // self.tile

    def _resized(self, image: np.ndarray, size: Size) -> np.ndarray:
        return resize_image(image, size, self.kind)

    def _squared(self, image: np.ndarray) -> np.ndarray:
        """Returns a picture in the middle of a square of the mean colour."""
        height, width = image.shape[:2]
        side = max(height, width)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = [int(255 * m) for m in self.mean]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = image
        return square

    def _shrunk(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns ([rows, columns, J], weights): bilinear where there are too many tokens."""
        if self.max_tiles is None:
            return index[:, :, None], np.ones((*index.shape, 1))
        ratio = math.sqrt(index.size / (self.max_tiles * self.grid[0] ** 2))
        if ratio <= 1.1:
            found = _padded(index.reshape(-1, 1), 4)
            return tuple(x.reshape(*index.shape, 4) for x in found)
        rows, columns = (bilinear(n, int(n // ratio)) for n in index.shape)
        near = index[rows[0][:, :, None, None], columns[0]]  # [rows, 2, columns, 2]
        weight = rows[1][:, :, None, None] * columns[1]
        shape = (near.shape[0], near.shape[2], 4)
        return near.swapaxes(1, 2).reshape(shape), weight.swapaxes(1, 2).reshape(shape)


def best_pinpoint(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Returns the size in which the most of a picture's pixels survive, then the least is wasted.

    Args:
        size: of the picture.
        pinpoints: to choose from; the first of equals wins.
    """

    def worth(target: Size) -> tuple[int, int]:
        scale = min(target[1] / size[1], target[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - target[0] * target[1]

    return max(pinpoints, key=worth)


def fitted(size: Size, target: Size) -> Size:
    """Returns the largest size of a picture's shape inside the target, rounded up."""
    scale = [outer / n for outer, n in zip(target, size, strict=True)]
    if scale[1] < scale[0]:
        return min(math.ceil(size[0] * scale[1]), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * scale[0]), target[1])


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """Returns the rows and columns of a padded grid of tokens that the picture covers.

    Args:
        size: of the picture before it was padded.
        grid: (rows, columns) of the tokens of all tiles.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        inner = int(round(height * (columns / width), 7))  # 7 digits: a whole number stays one
        cut = (rows - inner) // 2
        return slice(cut, rows - cut), slice(None)
    inner = int(round(width * (rows / height), 7))
    cut = (columns - inner) // 2
    return slice(None), slice(cut, columns - cut)


def tile_index(tiles: Size, grid: Size) -> np.ndarray:
    """Returns [rows, columns] int32 of all tiles together: the number of each token, where the
    whole comes first, then tile by tile.
    """
    (m, n), (rows, columns) = tiles, grid
    index = rows * columns + np.arange(m * n * rows * columns, dtype=np.int32)
    return index.reshape(m, n, rows, columns).swapaxes(1, 2).reshape(m * rows, n * columns)


def bilinear(size: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (index [target, 2], weight [target, 2]) of a resize along one axis, half pixels and
    no antialiasing (torch's interpolate).
    """
    at = np.maximum((np.arange(target) + 0.5) * (size / target) - 0.5, 0.0)
    low = np.floor(at).astype(np.int32)
    part = at - low
    index = np.stack([low, np.minimum(low + 1, size - 1)], axis=1)
    return index, np.stack([1 - part, part], axis=1)


def _padded(index: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (index [Q, J], weight [Q, J]) for [Q, 1]: the rest has no weight."""
    shape = (len(index), number)
    weight = np.zeros(shape, np.float32)
    weight[:, 0] = 1.0
    return np.broadcast_to(index, shape).astype(np.int32), weight


def read_any_res(config: Mapping[str, Any], mean: Channels, std: Channels, kind: str) -> AnyRes:
    """Returns the layout of a preprocessor_config.json of LLaVA-NeXT or OneVision.

    Args:
        config: its keys, defaults filled in.
        mean: see AnyRes.
        std: see AnyRes.
        kind: see AnyRes.
    """
    pinpoints = tuple((int(h), int(w)) for h, w in config["image_grid_pinpoints"])
    side = one_side(config["size"])
    bad = [size for size in pinpoints if size[0] % side or size[1] % side]
    if bad or not pinpoints:
        raise ValueError(
            f"image_grid_pinpoints must be sizes of whole tiles of {side} pixels, got {bad}"
        )
    return AnyRes(config["image_processor_type"], pinpoints, side, mean, std, kind)
