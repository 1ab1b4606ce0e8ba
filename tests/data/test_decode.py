# SPDX-License-Identifier: Apache-2.0
"""Image decoding against a list of good, odd and broken files, each with its expected outcome."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flax_vlm.data.images import REASONS, BrokenImage, decode_image, read_image
from tests.data.conftest import encoded

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.add.outer(np.arange(20) * 6, np.arange(30) * 4).astype(np.uint8)[:, :, None]
SMOOTH = np.concatenate([SMOOTH, 255 - SMOOTH, SMOOTH // 2], 2)
PNG, JPEG = encoded(PIXELS), encoded(PIXELS, "JPEG")


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(width: int, height: int, *, depth=8, color=2, data=b"", extra=b"") -> bytes:
    """Returns a PNG whose header says what is asked, true or not."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def png_with_flipped_bit() -> bytes:
    data = bytearray(PNG)
    data[len(data) // 2] ^= 16
    return bytes(data)


def jpeg_with_flipped_bit() -> bytes:
    data = bytearray(JPEG)
    data[-40] ^= 1
    return bytes(data)


def frames(kind: str, **options) -> bytes:
    others = [Image.fromarray(255 - PIXELS)]
    return encoded(Image.fromarray(PIXELS), kind, save_all=True, append_images=others, **options)


BROKEN = {
    "empty file": (b"", "empty"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), "empty"),
    "no rows": (Image.new("RGB", (5, 0)), "empty"),
    "0 x 0 in the header": (png(0, 0), ("empty", "not_an_image", "damaged")),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "damaged"),
    "truncated PNG": (PNG[: len(PNG) // 2], "damaged"),
    "PNG of its signature only": (PNG[:8], ("not_an_image", "damaged")),
    "bit flip in a PNG": (png_with_flipped_bit(), "damaged"),
    "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
    "JSON": (b'{"error": "forbidden"}', "not_an_image"),
    "random bytes": (RNG.bytes(4000), "not_an_image"),
    "zeros": (bytes(4000), "not_an_image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n", "not_an_image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not_an_image"),
    "PDF": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not_an_image"),
    "PPM, readable but not in the list": (encoded(PIXELS, "PPM"), "not_an_image"),
    "header of 8k x 8k": (png(8000, 8000), "too_large"),
    "header of 10k x 10k": (png(10_000, 10_000), "too_large"),
    "header of 20k x 20k": (png(20_000, 20_000), "too_large"),
    "1 x 65000": (png(65_000, 1), "too_long"),
    "float TIFF": (encoded(Image.fromarray(np.float32([[0.5, 2.0]])), "TIFF"), "unsupported"),
    "32-bit TIFF": (encoded(Image.fromarray(np.int32([[5, 70000]])), "TIFF"), "unsupported"),
    "PNG without data": (png(30, 20), "damaged"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_image_is_refused_with_its_reason(name):
    data, reasons = BROKEN[name]
    with pytest.raises(BrokenImage) as error:
        decode_image(data)
    assert error.value.reason in ((reasons,) if isinstance(reasons, str) else reasons)
    assert error.value.reason in REASONS[1:]


def test_large_image_is_refused_when_warnings_are_errors():
    with pytest.raises(BrokenImage, match="too_large"):
        decode_image(BROKEN["header of 10k x 10k"][0])


def test_missing_file_is_unreadable_and_an_existing_one_is_read(tmp_path):
    with pytest.raises(BrokenImage, match=r"unreadable: .*none\.png"):
        decode_image(tmp_path / "none.png")
    with pytest.raises(BrokenImage, match="unreadable"):
        decode_image(tmp_path)
    (tmp_path / "some.png").write_bytes(PNG)
    np.testing.assert_array_equal(decode_image(tmp_path / "some.png"), PIXELS)


@pytest.mark.parametrize(
    "data",
    [PNG, encoded(PIXELS, "BMP"), encoded(PIXELS, "TIFF"), encoded(PIXELS, "WEBP", lossless=True)],
    ids=["PNG", "BMP", "TIFF", "WEBP"],
)
def test_lossless_format_gives_back_the_pixels(data):
    pixels, reason = read_image(data)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert (pixels.dtype, reason) == (np.uint8, "ok")


def test_jpeg_is_decoded_and_a_bit_flip_in_its_scan_is_accepted():
    smooth = decode_image(encoded(SMOOTH, "JPEG", quality=95))
    assert np.abs(smooth.astype(int) - SMOOTH).max() < 12
    assert decode_image(jpeg_with_flipped_bit()).shape == (20, 30, 3)


def test_16_bit_grey_is_scaled_and_not_clipped():
    grey = np.uint16([[0, 128, 129, 1000, 65535]])
    for data in (encoded(grey), encoded(grey, "TIFF")):
        assert decode_image(data)[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [4] * 3, [255] * 3]
    big_endian = b"".join(
        [b"MM\0*\0\0\0\x12" + struct.pack(">5H", *grey[0].tolist()), b"\0\7"]
        + [
            struct.pack(">HHII", tag, kind, 1, value << 16 if kind == 3 else value)
            for tag, kind, value in [
                (256, 3, 5),
                (257, 3, 1),
                (258, 3, 16),
                (262, 3, 1),
                (273, 4, 8),
                (278, 3, 1),
                (279, 4, 10),
            ]
        ]
        + [bytes(4)]
    )
    assert decode_image(big_endian)[0, :, 0].tolist() == [0, 0, 1, 4, 255]


def test_16_bit_rgb_keeps_its_high_bytes():
    row = b"\0" + struct.pack(">6H", 0, 65535, 32768, 255, 256, 40000)
    found = decode_image(png(2, 1, depth=16, data=row))
    assert found.tolist() == [[[0, 255, 128], [0, 1, 156]]]


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg_has_its_colours(adobe):
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:] = (0, 200, 255, 51)  # red, four fifths as bright
    data = encoded(Image.frombytes("CMYK", (16, 16), cmyk.tobytes()), "JPEG", quality=100)
    assert data[2:4] == b"\xff\xee"  # Adobe's marker, which announces that values are inverted
    if not adobe:  # they are without it, too, say Pillow and browsers
        data = data[:2] + data[2 + 2 + 14 :]
    expected = (204, 55 * 204 // 255, 0)  # (255 - c) (255 - k) / 255
    assert np.abs(decode_image(data).astype(int) - np.array(expected)).max() <= 4


def test_transparent_pixels_show_the_background_and_not_what_hides_under_them():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, :, 0] = 200  # red hides everywhere
    rgba[:, 1, 3], rgba[:, 2, 3] = 51, 255  # a fifth, all
    for data in (encoded(rgba), rgba, encoded(rgba, "WEBP", lossless=True, exact=True)):
        pixels = decode_image(data, background=(10, 250, 100))
        assert pixels[0].tolist() == [[10, 250, 100], [48, 200, 80], [200, 0, 0]]
    assert decode_image(encoded(rgba))[0, 0].tolist() == [255, 255, 255]


def test_transparency_of_palette_grey_and_rgb_png_is_composited():
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    found = decode_image(encoded(palette, transparency=0), background=(1, 2, 3))
    assert found.tolist() == [[[1, 2, 3], [50, 60, 70]]]
    grey_alpha = np.uint8([[[100, 0], [100, 255]]])
    found = decode_image(encoded(grey_alpha), background=(1, 2, 3))
    assert found.tolist() == [[[1, 2, 3], [100, 100, 100]]]
    rgb = Image.fromarray(np.uint8([[[7, 8, 9], [50, 60, 70]]]))
    found = decode_image(encoded(rgb, transparency=(7, 8, 9)), background=(1, 2, 3))
    assert found.tolist() == [[[1, 2, 3], [50, 60, 70]]]


def test_one_bit_and_grey_images_become_rgb():
    grey = np.uint8([[0, 77, 255]])
    assert decode_image(encoded(grey))[0].tolist() == [[0] * 3, [77] * 3, [255] * 3]
    one_bit = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    assert decode_image(encoded(one_bit))[0, :, 1].tolist() == [0, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # what a camera stores so that the orientation makes it upright again
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(decode_image(data)[:, :, 0], upright)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame_and_is_noted(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels, reason = read_image(frames(kind, **options))
    assert reason == "animated"
    if kind != "GIF":  # a GIF has 256 colours
        np.testing.assert_array_equal(pixels, PIXELS)


def test_pages_of_a_tiff_and_pictures_of_an_mpo_are_no_animation():
    for kind in ("TIFF", "MPO"):
        assert read_image(frames(kind))[1] == "ok"


def test_arrays_and_pillow_images_are_taken_as_they_are():
    np.testing.assert_array_equal(decode_image(PIXELS), PIXELS)
    np.testing.assert_array_equal(decode_image(Image.fromarray(PIXELS)), PIXELS)
    grey = PIXELS[:, :, 0]
    for array in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(decode_image(array), np.stack([grey] * 3, 2))


@pytest.mark.parametrize(
    "array", [PIXELS / 255, PIXELS.astype(np.uint16), PIXELS[None], PIXELS[:, :, :2]]
)
def test_array_of_another_kind_is_a_mistake_and_not_a_broken_image(array):
    with pytest.raises(ValueError, match="an image array must be") as error:
        decode_image(array)
    assert not isinstance(error.value, BrokenImage)


def test_damaged_bytes_never_raise_anything_but_broken_image():
    good = [PNG, JPEG, encoded(PIXELS, "GIF"), encoded(PIXELS, "BMP"), encoded(PIXELS, "WEBP")]
    good.append(frames("GIF"))
    rng, outcomes = np.random.default_rng(1), set()
    for trial in range(600):
        data = bytearray(good[trial % len(good)])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(min(len(data), 150))] = rng.integers(256)
        try:
            outcomes.add(read_image(io.BytesIO(data).getvalue())[1])
        except BrokenImage as error:
            outcomes.add(error.reason)
    assert {"ok", "damaged", "not_an_image"} <= outcomes <= set(REASONS)
