# SPDX-License-Identifier: Apache-2.0
"""digits: 1,797 real handwritten digits with captions; needs no network.

The images are those that scikit-learn ships (`load_digits`): the test part of the UCI set "Optical
Recognition of Handwritten Digits" (Alpaydin & Kaynak, 1998), 8 x 8 pixels in 17 shades of grey.
Here the shades 0..16 become 0..255, the images are PNG, and every image gets one of `TEMPLATES`.

Split: 360 test and 1,437 train images. Each digit's images are put in a random order (seed 0), the
ten lists are joined, and every fifth image is a test image, so every digit is split alike to within
one image. Of the 13 writers nobody knows who wrote what: train and test share writers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from flax_vlm.data.decode import decode_image
from flax_vlm.data.sources import Example, MemorySource
from flax_vlm.data.tfds_source import TfdsSource, prepare

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a photo of the number {}",
    "a handwritten {}",
    "a handwritten digit {}",
    "the number {} written by hand",
    "a scan of the digit {}",
    "a blurry picture of a {}",
    "somebody wrote a {}",
    "this is the digit {}",
    "the digit {} in white on black",
)


def to_uint8(shades: np.ndarray) -> np.ndarray:
    """Returns shades 0..16 as uint8 0..255, rounded; `round(x * 16 / 255)` takes it back."""
    return np.rint(np.asarray(shades) * (255 / 16)).astype(np.uint8)


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the images of "train" and of "test", ascending; see the head of this file.

    Args:
        labels: [n] int.
    """
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == k)) for k in range(10)])
    is_test = np.arange(len(order)) % 5 == 0
    return {"train": np.sort(order[~is_test]), "test": np.sort(order[is_test])}


def caption_of(index: int, label: int) -> str:
    """Returns the caption of an image: its template is drawn from a generator seeded by `index`."""
    template = np.random.default_rng([1, index]).integers(len(TEMPLATES))
    return TEMPLATES[template].format(CLASS_NAMES[label])


class Digits(tfds.core.GeneratorBasedBuilder):
    """Writes the digits as a tfds dataset: features image, caption, label and id."""

    VERSION = tfds.core.Version("1.0.0")
    # nothing is downloaded, and to look for checksums tfds would need importlib_resources
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
                    "id": np.int64,  # position in scikit-learn's array
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        from sklearn import datasets  # takes a second, and only writing needs it

        digits = datasets.load_digits()
        indices = split_indices(digits.target)
        return {
            split: self._generate_examples(digits.images, digits.target, chosen)
            for split, chosen in indices.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index in chosen.tolist():
            png, label = io.BytesIO(), int(labels[index])
            Image.fromarray(to_uint8(images[index])).save(png, "PNG")
            caption = caption_of(index, label)
            # bytes, not an array: tfds would need TensorFlow to encode it
            image = png.getvalue()
            yield index, {"image": image, "caption": caption, "label": label, "id": index}


def load_digits(*, split: str = "train", data_dir: str | os.PathLike | None = None) -> MemorySource:
    """Returns the digits, decoded and held in memory (0.3 MB); writes the dataset at the first use.

    Args:
        split: "train", "test" or a slice of them, such as "train[:100]".
        data_dir: where datasets are kept.
    """
    stored = TfdsSource(prepare(Digits, data_dir), split)
    # decoding 8 x 8 pixels again and again would take longer than everything done with them
    examples = [_decoded(stored[i]) for i in range(len(stored))]
    return MemorySource(examples, stored.class_names, f"digits {split}")


def _decoded(example: Example) -> Example:
    return {**example, "image": decode_image(example["image"])}
