# SPDX-License-Identifier: Apache-2.0
"""Encoded bytes to pixels, with every way in which that can fail given a name.

Pillow decodes. What Pillow would pass silently is settled here: only the formats of `FORMATS` are
tried (EPS would start Ghostscript), the size is read from the header before anything is decoded,
16-bit grey is scaled instead of clipped, transparent pixels are composited on a declared background
instead of showing the colour that hides under them, and the EXIF orientation is applied.
"""

from __future__ import annotations

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_ASPECT = 100  # longer side / shorter side

# The code of a reason is its position; new ones go to the end.
REASONS: tuple[str, ...] = (
    "ok",
    "unreadable",  # the file is missing or may not be read
    "empty",  # no bytes, or no pixels
    "not_an_image",  # no format of FORMATS: HTML, SVG, EPS, random bytes
    "damaged",  # truncated, or its data contradict themselves
    "too_large",  # more than MAX_PIXELS according to the header
    "too_long",  # sides differ by more than MAX_ASPECT
    "unsupported",  # float or 32-bit pixels, whose range nobody knows; LAB
    "animated",  # several frames; the first is used, so the example is not lost
    "text_too_long",  # a conversation of which no answer fits into the context
)
USABLE = ("ok", "animated")

ImageLike = bytes | pathlib.Path | np.ndarray | Image.Image

# what Pillow's decoders were seen to raise on damaged data
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")


class BrokenImage(ValueError):
    """An image that cannot be used; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(reason, str(detail))
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


def decode_image(
    image: ImageLike, *, background: tuple[int, int, int] = (255, 255, 255)
) -> np.ndarray:
    """Returns the pixels of an image, [H, W, 3] uint8; see `read_image`."""
    return read_image(image, background=background)[0]


def read_image(
    image: ImageLike, *, background: tuple[int, int, int] = (255, 255, 255)
) -> tuple[np.ndarray, str]:
    """Returns the pixels of an image and what is to be said about it.

    Args:
        image: encoded bytes, the path of a file, a Pillow image, or an array [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4 (alpha)] uint8.
        background: RGB in 0..255; seen through transparent pixels.

    Returns:
        [H, W, 3] uint8, upright according to its EXIF orientation, possibly read-only; and "ok" or
        "animated" (the first frame was taken).

    Raises:
        BrokenImage: if the image cannot be used, with the reason.
        ValueError: if an array has another shape or dtype: that is a mistake of the source.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, background), "ok"
    if isinstance(image, Image.Image):
        _check_size(image)
        return _pixels(image, background), "ok"
    if isinstance(image, pathlib.Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            raise BrokenImage("unreadable", error) from error
    if not image:
        raise BrokenImage("empty", "the file has no bytes")
    return _from_bytes(image, background)


def _from_bytes(data: bytes, background: tuple[int, int, int]) -> tuple[np.ndarray, str]:
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except _BOMB as error:
        raise BrokenImage("too_large", error) from error
    except UnidentifiedImageError as error:
        raise BrokenImage("not_an_image", f"it starts with {data[:16]!r}") from error
    except _DAMAGE as error:
        raise BrokenImage("damaged", error) from error
    _check_size(opened)
    try:
        # a JPEG with several pictures (MPO: depth or gain maps) and a TIFF with pages do not move
        moving = opened.format in ("GIF", "WEBP", "PNG") and getattr(opened, "is_animated", False)
        opened.load()
        pixels = _pixels(opened, background)
    except BrokenImage:
        raise
    except _DAMAGE as error:
        raise BrokenImage("damaged", error) from error
    return pixels, "animated" if moving else "ok"


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) == 0:
        raise BrokenImage("empty", f"it has {height} x {width} pixels")
    if width * height > MAX_PIXELS:
        raise BrokenImage("too_large", f"{height} x {width} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenImage("too_long", f"{height} x {width} is longer than {MAX_ASPECT} : 1")


def _pixels(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    # before Pillow 12 a 16-bit PNG opens as "I"
    if image.mode in _GREY_16 or (image.mode == "I" and image.format == "PNG"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 / 255 = 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("F", "I", "LAB", "HSV"):
        raise BrokenImage("unsupported", f"pixels of mode {image.mode}")
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, (*background, 255))
        below.alpha_composite(image.convert("RGBA"))
        image = below
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _from_array(array: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    shaped = array[:, :, None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or shaped.ndim != 3 or shaped.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"an image array must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] uint8, "
            f"got {array.shape} {array.dtype}; convert it in the source"
        )
    if array.size == 0:
        raise BrokenImage("empty", f"an array of shape {array.shape}")
    if shaped.shape[2] == 1:
        return np.repeat(shaped, 3, axis=2)
    return shaped if shaped.shape[2] == 3 else _pixels(Image.fromarray(array), background)
