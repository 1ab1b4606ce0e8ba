# SPDX-License-Identifier: Apache-2.0
"""Named image operations: uint8 pixels in, uint8 pixels out; Pillow does the resampling.

Every operation is a frozen dataclass, built by `build(IMAGE_OPS, {"name": "resize", "size": 32},
"image op")` and called with (image [H, W, 3] uint8, generator). All randomness comes from the
generator, so an example looks the same in every process. Sizes are an int or (height, width).
Pixels stay uint8 up to the device, which normalises them (`flax_vlm.batch.normalize_image`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from flax_vlm.build import lookup
from flax_vlm.data.decode import REASONS, BrokenImage, decode_image, read_image

__all__ = ["IMAGE_OPS", "REASONS", "BrokenImage", "ImageOp", "decode_image", "read_image"]

Size = int | Sequence[int]

KINDS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageOp(Protocol):
    """An operation on one image."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the changed image [H', W', 3] uint8; the given one [H, W, 3] is left alone."""


def pair(size: Size) -> tuple[int, int]:
    """Returns a size as (height, width), having checked that both are positive ints."""
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or any(not isinstance(s, int) or s < 1 for s in sides):
        raise ValueError(f"a size must be a positive int or (height, width), got {size!r}")
    return sides


def _check_kind(kind: str, antialias: bool = True) -> None:
    lookup(KINDS, kind, "kind of resize")
    if not antialias and kind in ("box", "lanczos"):
        raise ValueError(f"resize without antialias must be nearest, bilinear or bicubic: {kind!r}")


def resize_image(
    image: np.ndarray, size: tuple[int, int], kind: str, antialias: bool = True
) -> np.ndarray:
    """Returns the image [H, W, 3] uint8 at `size`, (height, width); see `Resize`."""
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    picture = Image.fromarray(image)
    if antialias:
        return np.asarray(picture.resize(size[::-1], KINDS[kind]))
    # Pillow's resize always widens its filter when it shrinks; its transform never does
    extent, whole = Image.Transform.EXTENT, (0, 0, width, height)
    return np.asarray(picture.transform(size[::-1], extent, whole, KINDS[kind]))


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes to exactly `size`, whatever the aspect ratio.

    Attributes:
        size: of the result.
        kind: a key of `KINDS`.
        antialias: widen the filter when shrinking (Pillow's and torchvision's rule); False samples
            points, as `tf.image.resize` does by default.
    """

    size: Size
    kind: str = "bilinear"
    antialias: bool = True

    def __post_init__(self):
        pair(self.size)
        _check_kind(self.kind, self.antialias)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return resize_image(image, pair(self.size), self.kind, self.antialias)


@dataclasses.dataclass(frozen=True)
class ResizeSmall:
    """Resizes so that the smaller side becomes `size`, keeping the aspect ratio.

    Attributes:
        size: of the smaller side.
        kind: a key of `KINDS`.
        antialias: as in `Resize`.
        floor: round the longer side down, as torchvision and transformers do, instead of to the
            nearest int.
    """

    size: int
    kind: str = "bilinear"
    antialias: bool = True
    floor: bool = False

    def __post_init__(self):
        pair(self.size)
        _check_kind(self.kind, self.antialias)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        sides, small = image.shape[:2], min(image.shape[:2])
        if self.floor:
            height, width = (self.size * side // small for side in sides)
        else:
            scale = self.size / small
            height, width = (max(self.size, round(side * scale)) for side in sides)
        return resize_image(image, (height, width), self.kind, self.antialias)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Cuts out the middle.

    Attributes:
        size: of the result.
        fill: value in 0..255 of what lies outside a smaller image; None raises ValueError there.
    """

    size: Size
    fill: int | None = None

    def __post_init__(self):
        pair(self.size)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        (height, width), (h, w) = image.shape[:2], pair(self.size)
        top, left = (height - h) // 2, (width - w) // 2
        if self.fill is None:
            _check_room((h, w), (height, width), "center_crop")
        elif top < 0 or left < 0:
            window = np.full((h, w, 3), self.fill, np.uint8)
            inside = image[max(top, 0) : max(top, 0) + h, max(left, 0) : max(left, 0) + w]
            y, x = max(-top, 0), max(-left, 0)
            window[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
            return window
        return image[top : top + h, left : left + w]


def _check_room(size: tuple[int, int], room: tuple[int, int], name: str) -> None:
    if size[0] > room[0] or size[1] > room[1]:
        raise ValueError(
            f"{name} of {size[0]} x {size[1]} must fit into the image, got {room[0]} x {room[1]}; "
            f"put resize_small before it or add a pad"
        )


def _edge(index: np.ndarray, size: int) -> np.ndarray:
    return np.minimum(np.maximum(index, 0), size - 1)


def _reflect(index: np.ndarray, size: int) -> np.ndarray:
    period = max(1, 2 * (size - 1))
    index = np.abs(index) % period
    return np.minimum(index, period - index)


# what lies outside an image: positions -> positions inside; "constant" is handled by the caller
PADDINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "edge": _edge,
    "reflect": _reflect,
    "constant": _edge,
}


@dataclasses.dataclass(frozen=True)
class PadToSquare:
    """Puts the image into the middle of a square, so that a resize keeps its aspect ratio.

    What LLaVA-1.5 does with "image_aspect_ratio": "pad", in the mean colour of its encoder.

    Attributes:
        color: RGB in 0..255 of what is added.
    """

    color: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the image padded on two sides; of an odd difference the larger half is last."""
        height, width = image.shape[:2]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = np.empty((side, side, 3), np.uint8)
        square[:] = self.color
        square[top : top + height, left : left + width] = image
        return square


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cuts out a window at a random place of the image, widened by `pad` on every side.

    With `size` equal to the image's this shifts by up to `pad` pixels.

    Attributes:
        size: of the window.
        pad: pixels added on every side.
        mode: what they hold: "edge", "reflect" or "constant".
        fill: value in 0..255 for "constant".
    """

    size: Size
    pad: int = 0
    mode: str = "edge"
    fill: int = 0

    def __post_init__(self):
        pair(self.size)
        lookup(PADDINGS, self.mode, "padding")
        if self.pad < 0:
            raise ValueError(f"random_crop needs pad >= 0, got {self.pad}")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        (height, width), (h, w), pad = image.shape[:2], pair(self.size), self.pad
        _check_room((h, w), (height + 2 * pad, width + 2 * pad), "random_crop")
        rows = np.arange(h) + int(rng.integers(-pad, height + pad - h + 1))
        columns = np.arange(w) + int(rng.integers(-pad, width + pad - w + 1))
        place = PADDINGS[self.mode]
        # two takes: five times as fast as image[rows[:, None], columns]
        window = image.take(place(rows, height), 0).take(place(columns, width), 1)  # [h, w, 3]
        if self.mode == "constant":
            window[(rows < 0) | (rows >= height)] = self.fill
            window[:, (columns < 0) | (columns >= width)] = self.fill
        return window


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts out a window of random area and aspect ratio and resizes it.

    Source: Szegedy et al., 2015, arXiv:1409.4842, section 6; the sampling (ten tries, then the
    largest window in the middle) is torchvision's.

    Attributes:
        size: of the result.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height; drawn uniformly in the logarithm.
        kind: a key of `KINDS`; always antialiased.
    """

    size: Size
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    kind: str = "bilinear"

    def __post_init__(self):
        pair(self.size)
        _check_kind(self.kind)
        for name, (low, high), top in (("scale", self.scale, 1), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= top:
                raise ValueError(
                    f"random_resized_crop needs 0 < low <= high, got {name} {low, high}"
                )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, h, w = self._window(*image.shape[:2], rng)
        return resize_image(image[top : top + h, left : left + w], pair(self.size), self.kind)

    def _window(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = rng.uniform(*self.scale) * height * width
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirrors left and right with a probability. Not for captions that say left or right."""

    probability: float = 0.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return image[:, ::-1] if rng.random() < self.probability else image


@dataclasses.dataclass(frozen=True)
class Rotate:
    """Rotates about the middle by an angle drawn from -degrees .. degrees, keeping the size.

    Attributes:
        degrees: greatest angle.
        fill: value in 0..255 of the corners that come into view.
    """

    degrees: float
    fill: int = 0

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        angle = rng.uniform(-self.degrees, self.degrees)
        fill = (self.fill,) * 3
        picture = Image.fromarray(image)
        return np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR, fillcolor=fill))


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Scales brightness, then the contrast about the image's mean; hue is kept.

    y = c (b x - m) + m, with m the mean of b x, b in 1 +- brightness, c in 1 +- contrast.

    Attributes:
        brightness: greatest relative change, 0..1.
        contrast: greatest relative change, 0..1.
    """

    brightness: float = 0.1
    contrast: float = 0.1

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        b = rng.uniform(1 - self.brightness, 1 + self.brightness)
        c = rng.uniform(1 - self.contrast, 1 + self.contrast)
        mean = b * image.mean()
        levels = c * (b * np.arange(256) - mean) + mean
        return np.clip(np.rint(levels), 0, 255).astype(np.uint8)[image]


IMAGE_OPS: dict[str, Callable[..., ImageOp]] = {
    "resize": Resize,
    "resize_small": ResizeSmall,
    "center_crop": CenterCrop,
    "pad_to_square": PadToSquare,
    "random_crop": RandomCrop,
    "random_resized_crop": RandomResizedCrop,
    "flip": Flip,
    "rotate": Rotate,
    "color_jitter": ColorJitter,
}
