# SPDX-License-Identifier: Apache-2.0
"""digits: the real images, unchanged by the way through PNG, and the stated split."""

import collections

import numpy as np
import pytest
from sklearn import datasets

from flax_vlm.data import class_names, load_source
from flax_vlm.data.digits import CLASS_NAMES, TEMPLATES, to_uint8


@pytest.fixture(scope="module")
def original():
    return datasets.load_digits()


def test_split_has_the_stated_sizes_and_every_image_once(digits):
    ids = {split: [e["meta"]["id"] for e in source] for split, source in digits.items()}
    assert (len(ids["train"]), len(ids["test"])) == (1437, 360)
    assert sorted(ids["train"] + ids["test"]) == list(range(1797))


def test_split_is_stratified_to_within_one_image(digits):
    counts = {s: collections.Counter(e["label"] for e in source) for s, source in digits.items()}
    for label in range(10):
        total = counts["train"][label] + counts["test"][label]
        assert abs(counts["test"][label] - total / 5) <= 1


def test_pixels_survive_png_exactly_and_labels_and_captions_are_theirs(digits, original):
    for source in digits.values():
        for example in source:
            index, image = example["meta"]["id"], example["image"]
            shades = np.rint(image[:, :, 0] * (16 / 255.0))
            np.testing.assert_array_equal(shades, original.images[index])
            assert image.shape == (8, 8, 3) and (image == image[:, :, :1]).all()
            assert example["label"] == original.target[index]
            name = CLASS_NAMES[example["label"]]
            assert name in example["caption"].split()
            others = set(CLASS_NAMES) - {name}
            assert not others & set(example["caption"].split())


def test_shades_fill_eight_bits():
    assert to_uint8(np.arange(17)).tolist()[::4] == [0, 64, 128, 191, 255]


def test_every_template_is_used_for_every_digit(digits):
    assert len(TEMPLATES) >= 8
    used = {(e["label"], e["caption"]) for e in digits["train"]}
    assert len(used) == 10 * len(TEMPLATES)
    uses = collections.Counter(
        e["caption"].replace(CLASS_NAMES[e["label"]], "{}") for e in digits["train"]
    )
    assert set(uses) == set(TEMPLATES) and min(uses.values()) > 0.7 * 1437 / len(TEMPLATES)


def test_dataset_is_the_same_when_it_is_written_again(digits, tmp_path):
    again = load_source("digits", split="test[:40]", data_dir=tmp_path)
    assert len(again) == 40
    for new, old in zip(again, digits["test"], strict=False):
        assert new["caption"] == old["caption"] and new["meta"] == old["meta"]
        np.testing.assert_array_equal(new["image"], old["image"])


def test_class_names_are_words(data_dir, digits):
    assert class_names("digits", data_dir=data_dir) == CLASS_NAMES == digits["test"].class_names
    with pytest.raises(ValueError, match="Unknown split 'val'"):
        load_source("digits", split="val", data_dir=data_dir)
