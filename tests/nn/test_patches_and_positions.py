# SPDX-License-Identifier: Apache-2.0
"""Patches, patch dropout, the sine-cosine table and the resizing of learned positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.nn.patches import PatchEmbed, drop_patches, grid_size, num_kept
from flax_vlm.nn.positions import RESIZE_METHODS, resize_positions, sincos2d
from tests.nn import oracle


@pytest.mark.parametrize("use_bias", [True, False])
def test_patch_embedding_is_the_convolution_of_every_patch_in_row_major_order(use_bias):
    image = np.random.default_rng(0).standard_normal((2, 8, 9, 5)).astype(np.float32)
    module = PatchEmbed(width=7, patch_size=(4, 3), use_bias=use_bias)
    params = oracle.random_params(module, image)
    assert params["kernel"].shape == (4, 3, 5, 7)
    assert ("bias" in params) == use_bias
    out = oracle.apply(module, params, image)
    oracle.assert_close(out, oracle.patch_tokens(oracle.f64(params), image.astype(np.float64)))
    dimensions = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated(
        image, params["kernel"], (4, 3), "VALID", dimension_numbers=dimensions
    ).reshape(2, 6, 7)
    oracle.assert_close(out, conv + (params["bias"].reshape(1, 1, -1) if use_bias else 0))


def test_a_patch_size_that_does_not_divide_the_image_is_an_error_that_says_what_to_do():
    rule = "patch_size 16 must divide the image, got 225 x 224; resize it in the data config"
    with pytest.raises(ValueError, match=rule):
        grid_size((225, 224), 16)
    with pytest.raises(ValueError, match="patch_size 16 must divide the image, got 224 x 230"):
        PatchEmbed(8, 16).init(jax.random.key(0), np.zeros((1, 224, 230, 3), np.float32))
    with pytest.raises(ValueError, match="must hold one patch, got 8 x 32 for 16 x 16"):
        grid_size((8, 32), 16, drop_remainder=True)


def test_drop_remainder_ignores_the_lower_and_right_border_as_so400m_at_384_does():
    assert grid_size(384, 14, drop_remainder=True) == (27, 27)
    assert grid_size((224, 160), (16, 32)) == (14, 5)
    image = np.random.default_rng(0).standard_normal((1, 7, 8, 3)).astype(np.float32)
    module = PatchEmbed(5, 3, drop_remainder=True)
    params = oracle.random_params(module, image)
    out = oracle.apply(module, params, image)
    cropped = oracle.apply(PatchEmbed(5, 3), params, image[:, :6, :6])
    np.testing.assert_array_equal(out, cropped)


def test_patch_dropout_keeps_a_fixed_number_of_whole_patches_in_order():
    tokens = np.arange(3 * 10 * 2, dtype=np.float32).reshape(3, 10, 2)
    kept = np.asarray(drop_patches(tokens, jax.random.key(0), 4))
    assert kept.shape == (3, 4, 2)
    for row, chosen in zip(tokens, kept, strict=True):
        index = [np.flatnonzero((row == token).all(-1)).item() for token in chosen]
        assert index == sorted(set(index))
    assert not np.array_equal(kept[0], kept[1] - 20)  # every example has its own subset
    assert not np.array_equal(kept, drop_patches(tokens, jax.random.key(1), 4))


def test_every_patch_is_equally_likely_to_be_kept():
    tokens = np.tile(np.arange(8, dtype=np.float32)[None, :, None], (4000, 1, 1))
    kept = np.asarray(drop_patches(tokens, jax.random.key(0), 2)).astype(int)
    counts = np.bincount(kept.reshape(-1), minlength=8)
    np.testing.assert_allclose(counts, 1000, atol=5 * np.sqrt(1000 * 0.75))


def test_the_kept_count_is_the_floor_of_the_kept_share():
    rates = [(196, 0.5, 98), (196, 0.75, 49), (20, 0.9, 2), (49, 0.5, 24), (9, 0.0, 9), (3, 0.9, 1)]
    for patches, rate, expected in rates:
        assert num_kept(patches, rate) == expected
    with pytest.raises(ValueError, match=r"patch_dropout must be in \[0, 1\), got 1.0"):
        num_kept(4, 1.0)


def test_sincos2d_has_the_order_sin_x_cos_x_sin_y_cos_y_of_moco_v3():
    table = sincos2d((2, 3), 12)
    assert table.shape == (6, 12) and table.dtype == np.float32
    for y, x in np.ndindex(2, 3):
        omega = [1.0, 1e4**-0.5, 1e-4]
        parts = [f(c * w) for c in (x, y) for f in (np.sin, np.cos) for w in omega]
        oracle.assert_close(table[3 * y + x], np.array(parts))


@pytest.mark.parametrize("width", [10, 4])
def test_sincos2d_refuses_widths_that_it_cannot_fill(width):
    with pytest.raises(ValueError, match="multiple of 4 and >= 8"):
        sincos2d((2, 2), width)


def table(grid, prefix=0, width=5):
    rng = np.random.default_rng(0)
    return rng.standard_normal((prefix + grid[0] * grid[1], width)).astype(np.float32)


@pytest.mark.parametrize("method", list(RESIZE_METHODS))
def test_resizing_to_the_same_grid_changes_nothing(method):
    positions = table((3, 5), prefix=2)
    same = resize_positions(positions, (3, 5), (3, 5), method=method, num_prefix=2)
    np.testing.assert_array_equal(same, positions)


@pytest.mark.parametrize("new", [(6, 4), (2, 9), (7, 7)])
@pytest.mark.parametrize(
    ("method", "kind", "antialias"),
    [
        ("bilinear", "linear", False),
        ("bilinear_antialias", "linear", True),
        ("bicubic_antialias", "cubic", True),
    ],
)
def test_resizing_equals_jax_image_resize_on_non_square_grids(method, kind, antialias, new):
    positions = table((4, 6), prefix=1)
    out = resize_positions(positions, (4, 6), new, method=method, num_prefix=1)
    np.testing.assert_array_equal(out[0], positions[0])
    grid = positions[1:].reshape(4, 6, 5)
    expected = jax.image.resize(jnp.asarray(grid), (*new, 5), kind, antialias=antialias)
    oracle.assert_close(out[1:], np.asarray(expected).reshape(-1, 5))


# torch 2.13.0: torch.nn.functional.interpolate(mode="bicubic") of [0, 1, 4, 9, 16]
TORCH_BICUBIC = {
    8: [-0.0928345, 0.1875610, 1.1765137, 2.6193848, 5.4416504, 8.4714355, 13.3950806, 16.6498413],
    3: [0.1481490, 4.0, 14.0740709],
}


@pytest.mark.parametrize("size", list(TORCH_BICUBIC))
def test_bicubic_torch_repeats_the_edge_and_uses_the_kernel_of_torch(size):
    line = (np.arange(5, dtype=np.float32) ** 2).reshape(5, 1)
    down = resize_positions(line, (5, 1), (size, 1), method="bicubic_torch")
    across = resize_positions(line, (1, 5), (1, size), method="bicubic_torch")
    oracle.assert_close(down[:, 0], np.array(TORCH_BICUBIC[size]))
    np.testing.assert_array_equal(across, down)


def test_resizing_keeps_rank_and_dtype_and_checks_the_size():
    positions = table((2, 3), prefix=1)[None].astype(np.float16)
    out = resize_positions(positions, (2, 3), (4, 3), method="bilinear", num_prefix=1)
    assert out.shape == (1, 13, 5) and out.dtype == np.float16
    with pytest.raises(
        ValueError, match="2 x 3 grid with 0 prefix tokens needs 6 positions, got 7"
    ):
        resize_positions(positions, (2, 3), (4, 3), method="bilinear")
    with pytest.raises(ValueError, match="choose one of .*bicubic_torch"):
        resize_positions(positions, (2, 3), (4, 3), method="bicubic", num_prefix=1)
