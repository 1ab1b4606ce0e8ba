# SPDX-License-Identifier: Apache-2.0
"""One data folder for all tests of the data layer, with a small shapes world in it."""

import io

import numpy as np
import pytest
from PIL import Image

from flax_vlm.data import load_source
from flax_vlm.data.sources import MemorySource

SHAPES = {"train_size": 60, "test_size": 24}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def shapes(data_dir):
    return {
        split: load_source("shapes", split=split, data_dir=data_dir, **SHAPES)
        for split in ("train", "test")
    }


@pytest.fixture(scope="session")
def digits(data_dir):
    return {s: load_source("digits", split=s, data_dir=data_dir) for s in ("train", "test")}


@pytest.fixture(scope="session")
def noise():
    """Returns 31 different images, 9 x 12, whose label is their position."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (31, 9, 12, 3), dtype=np.uint8)
    return MemorySource(
        [
            {"image": image, "caption": f"picture number {i}", "label": i}
            for i, image in enumerate(pixels)
        ]
    )


def encoded(pixels, kind="PNG", **options):
    """Returns the bytes of an image file."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()
