# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from sklearn.decomposition import PCA

from flax_vlm.evaluation.patch_components import draw_components, patch_components

RNG = np.random.default_rng(0)
SCALES = np.array([9.0, 5.0, 3.0, 0.5, 0.2])
PATCHES = [RNG.standard_normal((*grid, 5)) ** 3 * SCALES + 7 for grid in [(8, 6), (5, 9)]]


def test_colours_are_the_first_three_principal_components_of_all_images_together():
    colors = patch_components(PATCHES)
    assert [c.shape for c in colors] == [(8, 6, 3), (5, 9, 3)]
    rows = np.concatenate([p.reshape(-1, 5) for p in PATCHES])
    wanted = PCA(3).fit_transform(rows)
    wanted *= np.where(np.median(wanted, axis=0) <= 0, 1, -1)
    low, high = np.quantile(wanted, [0.01, 0.99], axis=0)
    wanted = np.clip((wanted - low) / (high - low), 0, 1)
    found = np.concatenate([c.reshape(-1, 3) for c in colors])
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    assert found.min() == 0 and found.max() == 1


def test_too_few_patches_are_refused():
    with pytest.raises(ValueError, match=r"three patches of width 3, got \(2, 5\)"):
        patch_components([np.zeros((1, 2, 5))])


def test_the_picture_has_a_column_per_image():
    images = [RNG.integers(0, 256, (32, 24, 3), dtype=np.uint8)] * 2
    figure = draw_components(images, patch_components(PATCHES))
    assert len(figure.axes) == 4
    lower = figure.axes[2].get_images()[0].get_array()
    assert lower.shape == (32, 24, 3)
    first = patch_components(PATCHES)[0][0, 0]
    np.testing.assert_array_equal(lower[0, 0], (255 * first).astype(int))
