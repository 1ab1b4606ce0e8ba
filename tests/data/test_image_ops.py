# SPDX-License-Identifier: Apache-2.0
"""Image operations against NumPy float64 references and their own promises."""

import numpy as np
import pytest

from flax_vlm.build import build
from flax_vlm.data.images import IMAGE_OPS

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
OPS = {
    "resize": {"size": (7, 5)},
    "resize_small": {"size": 8},
    "center_crop": {"size": [5, 9]},
    "pad_to_square": {"color": (1, 2, 3)},
    "random_crop": {"size": (12, 18), "pad": 3},
    "random_resized_crop": {"size": 6},
    "flip": {},
    "rotate": {"degrees": 20},
    "color_jitter": {"brightness": 0.3, "contrast": 0.3},
}
RANDOM = ("random_crop", "random_resized_crop", "flip", "rotate", "color_jitter")


def op(name, **options):
    return build(IMAGE_OPS, {"name": name, **options}, "image op")


def run(operation, image=IMAGE, seed=0):
    return operation(image, np.random.default_rng(seed))


def resize_oracle(image, size, antialias):
    """Returns a bilinear resize with half-pixel centres, separable, in float64."""
    result = image.astype(np.float64)
    for axis, new in enumerate(size):
        old = result.shape[axis]
        scale = old / new
        width = max(scale, 1.0) if antialias else 1.0
        centers = (np.arange(new) + 0.5) * scale
        distance = np.abs(centers[:, None] - (np.arange(old) + 0.5)) / width
        if not antialias:  # what lies outside is the nearest pixel
            inside = np.clip(centers, 0.5, old - 0.5)
            distance = np.abs(inside[:, None] - (np.arange(old) + 0.5))
        weights = np.maximum(0, 1 - distance)
        weights /= weights.sum(1, keepdims=True)
        result = np.moveaxis(np.tensordot(weights, result, (1, axis)), 0, axis)
    return result


def test_every_op_of_the_table_is_tested_here():
    assert set(OPS) == set(IMAGE_OPS)


@pytest.mark.parametrize("name", OPS)
def test_op_gives_uint8_leaves_its_input_alone_and_repeats_itself(name):
    before = IMAGE.copy()
    first = run(op(name, **OPS[name]))
    np.testing.assert_array_equal(IMAGE, before)
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
    np.testing.assert_array_equal(first, run(op(name, **OPS[name])))


@pytest.mark.parametrize("name", RANDOM)
def test_random_op_depends_on_the_generator(name):
    results = {run(op(name, **OPS[name]), seed=seed).tobytes() for seed in range(8)}
    assert len(results) > (1 if name == "flip" else 4)


@pytest.mark.parametrize("size", [(6, 9), (5, 25), (24, 7), (30, 40)])
@pytest.mark.parametrize("antialias", [True, False])
def test_bilinear_resize_equals_the_reference(size, antialias):
    found = run(op("resize", size=size, antialias=antialias)).astype(np.float64)
    # Pillow rounds to uint8 after each of the two axes
    assert np.abs(found - resize_oracle(IMAGE, size, antialias)).max() <= 1.01


def test_box_resize_to_half_takes_means_and_nearest_takes_pixels():
    means = IMAGE.reshape(6, 2, 9, 2, 3).mean((1, 3))
    assert np.abs(run(op("resize", size=(6, 9), kind="box")) - means).max() <= 1
    twice = run(op("resize", size=(24, 36), kind="nearest"))
    np.testing.assert_array_equal(twice, IMAGE.repeat(2, 0).repeat(2, 1))


def test_an_int_is_a_square_and_a_list_is_height_and_width():
    assert run(op("resize", size=7)).shape == (7, 7, 3)
    assert run(op("resize", size=[7, 11])).shape == (7, 11, 3)
    assert run(op("center_crop", size=[5, 9])).shape == (5, 9, 3)


def test_resize_small_sets_the_smaller_side_and_keeps_the_aspect_ratio():
    assert run(op("resize_small", size=8)).shape == (8, 12, 3)
    assert run(op("resize_small", size=8), IMAGE.transpose(1, 0, 2)).shape == (12, 8, 3)
    assert run(op("resize_small", size=36)).shape == (36, 54, 3)


def test_center_crop_takes_the_middle():
    np.testing.assert_array_equal(run(op("center_crop", size=(4, 8))), IMAGE[4:8, 5:13])


@pytest.mark.parametrize("mode", ["edge", "reflect", "constant"])
def test_random_crop_is_a_window_of_the_padded_image(mode):
    options = {"constant_values": 9} if mode == "constant" else {}
    padded = np.pad(IMAGE, ((4, 4), (4, 4), (0, 0)), mode, **options)
    crop, seen = op("random_crop", size=(10, 18), pad=4, mode=mode, fill=9), set()
    windows = {
        padded[y : y + 10, x : x + 18].tobytes(): (y, x) for y in range(11) for x in range(9)
    }
    for seed in range(200):
        seen.add(windows[run(crop, seed=seed).tobytes()])
    assert {y for y, _ in seen} == set(range(11)) and {x for _, x in seen} == set(range(9))


def test_random_resized_crop_keeps_to_its_scale_and_ratio():
    rows = np.repeat(np.arange(100, dtype=np.uint8)[:, None], 200, 1)
    columns = np.repeat(np.arange(200, dtype=np.uint8)[None], 100, 0)
    picture = np.stack([rows, columns, rows], 2)
    crop = op("random_resized_crop", size=50, scale=(0.1, 0.4), ratio=(0.5, 2), kind="nearest")
    shares, ratios = [], []
    for seed in range(100):
        part = run(crop, picture, seed).astype(int)
        height, width = (np.ptp(part[..., c]) * 50 / 49 for c in (0, 1))
        shares.append(height * width / 20_000)
        ratios.append(width / height)
    assert 0.08 < min(shares) < 0.15 and 0.33 < max(shares) < 0.44
    assert 0.45 < min(ratios) < 0.8 and 1.3 < max(ratios) < 2.2


def test_random_resized_crop_of_an_extreme_image_falls_back_to_the_middle():
    wide = np.zeros((4, 90, 3), np.uint8)
    wide[:, 42:48] = 200  # 4 x 5.33 in the middle
    crop = op("random_resized_crop", size=6, scale=(1.0, 1.0))
    assert run(crop, wide).min() == 200


def test_flip_mirrors_about_half_of_the_images():
    results = [run(op("flip"), seed=seed) for seed in range(60)]
    flipped = sum(np.array_equal(r, IMAGE[:, ::-1]) for r in results)
    kept = sum(np.array_equal(r, IMAGE) for r in results)
    assert flipped + kept == 60 and 18 < flipped < 42
    np.testing.assert_array_equal(run(op("flip", probability=1.0)), IMAGE[:, ::-1])


def test_rotate_turns_by_at_most_its_angle_and_fills_the_corners():
    bar = np.zeros((41, 41, 3), np.uint8)
    bar[20, :] = 255
    angles = []
    for seed in range(40):
        turned = run(op("rotate", degrees=20), bar, seed)[..., 0].astype(float)
        right = turned[:, 35] @ np.arange(41) / turned[:, 35].sum()
        angles.append(np.degrees(np.arctan2(20 - right, 15)))
    assert -21 < min(angles) < -12 and 12 < max(angles) < 21
    white = np.full((20, 20, 3), 255, np.uint8)
    corners = [run(op("rotate", degrees=20, fill=7), white, seed)[0, 0, 0] for seed in range(9)]
    assert 7 in corners


def test_color_jitter_follows_its_formula():
    jitter = op("color_jitter", brightness=0.5, contrast=0.5)
    rng = np.random.default_rng(5)
    b, c = rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
    bright = b * IMAGE.astype(np.float64)
    expected = np.clip(c * (bright - bright.mean()) + bright.mean(), 0, 255)
    assert np.abs(run(jitter, seed=5) - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resize", {"size": 0}, "positive int"),
        ("resize", {"size": (3, 4, 5)}, "positive int"),
        ("resize", {"size": 3.5}, "positive int"),
        ("resize", {"size": 3, "kind": "cubic"}, "did you mean 'bicubic'"),
        ("resize", {"size": 3, "kind": "lanczos", "antialias": False}, "without antialias"),
        ("resize", {"size": 3, "interpolation": "box"}, "unknown key"),
        ("random_crop", {"size": 3, "mode": "wrap"}, "unknown padding"),
        ("random_crop", {"size": 3, "pad": -1}, "pad >= 0"),
        ("random_resized_crop", {"size": 3, "scale": (0.5, 0.2)}, "0 < low <= high"),
        ("blur", {}, "unknown image op"),
    ],
)
def test_wrong_option_is_refused_when_the_op_is_built(name, options, message):
    with pytest.raises(ValueError, match=message):
        op(name, **options)


@pytest.mark.parametrize("name", ["center_crop", "random_crop"])
def test_crop_larger_than_the_image_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} of 13 x 5 must fit into the image, got 12 x 18"):
        run(op(name, size=(13, 5)))


def test_resize_small_rounds_the_longer_side_down_on_demand():
    image = np.zeros((11, 20, 3), np.uint8)  # 8 * 20 / 11 = 14.5...
    assert run(op("resize_small", size=8), image).shape == (8, 15, 3)
    assert run(op("resize_small", size=8, floor=True), image).shape == (8, 14, 3)
    upright = image.transpose(1, 0, 2)
    assert run(op("resize_small", size=8, floor=True), upright).shape == (14, 8, 3)


def test_center_crop_fills_what_lies_outside_on_demand():
    wide = run(op("center_crop", size=(6, 21), fill=9))
    assert wide.shape == (6, 21, 3)
    # two columns more than half of the odd margin on the left, as transformers' Pillow classes
    np.testing.assert_array_equal(wide[:, 2:20], IMAGE[3:9])
    assert (wide[:, :2] == 9).all() and (wide[:, 20:] == 9).all()
    small = run(op("center_crop", size=(5, 9), fill=9))
    np.testing.assert_array_equal(small, run(op("center_crop", size=(5, 9))))


def test_pad_to_square_puts_the_image_into_the_middle():
    square = run(op("pad_to_square", color=(1, 2, 3)))
    assert square.shape == (18, 18, 3)
    np.testing.assert_array_equal(square[3:15], IMAGE)
    assert (square[:3] == (1, 2, 3)).all() and (square[15:] == (1, 2, 3)).all()
    tall = run(op("pad_to_square"), IMAGE[:, :5])  # 12 x 5: three columns before, four after
    np.testing.assert_array_equal(tall[:, 3:8], IMAGE[:, :5])
    assert not tall[:, :3].any() and not tall[:, 8:].any()
