# SPDX-License-Identifier: Apache-2.0
"""shapes: pictures of coloured shapes with compositional captions, drawn at the first use.

A scene (`data.scenes`) is a function of split and index alone. Every example keeps its scene graph
in `meta["scene"]` (a list of objects with shape, color, size, center, radius, angle, box) and, if
it has more than one object, a false caption of the same words in `meta["swapped"]`.

After CLEVR (Johnson et al., 2017, arXiv:1612.06890) in two dimensions, and ShapeWorld (Kuhnle &
Copestake, 2017, arXiv:1704.04517).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from flax_vlm.data.scenes import (
    COLORS,
    Scene,
    Statement,
    describe,
    holds,
    sample_scene,
    scene_from_json,
    swap_attributes,
)
from flax_vlm.data.sources import Example
from flax_vlm.data.tfds_source import TfdsSource, prepare

__all__ = [
    "Shapes",
    "ShapesSource",
    "describe",
    "example",
    "holds",
    "load_shapes",
    "render",
    "sample_scene",
    "scene_from_json",
    "swap_attributes",
]

BACKGROUND = (246, 243, 236)
SPLITS = {"train": 0, "test": 1}  # part of the seed, so that no scene is in both
_SEED = 7
_SUPERSAMPLING = 4
_EDGE = 0.016  # width of the darker edge, in units of the image's side
_EDGE_SHADE = 0.72


def render(scene: Scene, size: int) -> np.ndarray:
    """Returns the picture of a scene, [size, size, 3] uint8, anti-aliased by supersampling."""
    big = size * _SUPERSAMPLING
    picture = Image.new("RGB", (big, big), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for thing in scene:
        color = COLORS[thing.color]
        edge = tuple(round(c * _EDGE_SHADE) for c in color)
        corners = [tuple(corner) for corner in (thing.outline() * big).tolist()]
        draw.polygon(corners, fill=color)
        # first corner twice, so that it has a joint, too
        closed = [*corners, corners[0], corners[1]]
        draw.line(closed, fill=edge, width=max(1, round(_EDGE * big)), joint="curve")
    return np.asarray(picture.reduce(_SUPERSAMPLING))


def example(split: str, index: int) -> tuple[Scene, Statement, Statement | None]:
    """Returns the scene, its caption and its false caption (None if there is one object only).

    Args:
        split: "train" or "test".
        index: 0, 1, 2 ... without end; not every dataset size has it.
    """
    rng = np.random.default_rng([_SEED, SPLITS[split], index])
    scene = sample_scene(rng)
    statement = describe(scene, rng)
    return scene, statement, swap_attributes(statement, scene, rng)


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """How large the dataset is.

    Attributes:
        image_size: height and width of the pictures.
        train_size: number of training examples.
        test_size: number of test examples.
        name: made of the three.
    """

    name: str = ""
    image_size: int = 64
    train_size: int = 8000
    test_size: int = 1000

    def __post_init__(self):
        self.name = f"{self.image_size}px_{self.train_size}_{self.test_size}"


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Draws the dataset of a ShapesConfig: image, caption, scene (JSON), swapped ("" for none)."""

    VERSION = tfds.core.Version("1.0.0")
    # nothing is downloaded, and to look for checksums tfds would need importlib_resources
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "scene": tfds.features.Text(),
                    "swapped": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        sizes = {"train": self.builder_config.train_size, "test": self.builder_config.test_size}
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict]]:
        for index in range(size):
            scene, statement, swapped = example(split, index)
            png = io.BytesIO()
            Image.fromarray(render(scene, self.builder_config.image_size)).save(png, "PNG")
            record = {
                # bytes, not an array: tfds would need TensorFlow to encode it
                "image": png.getvalue(),
                "caption": statement.caption(),
                "scene": json.dumps([thing.to_json() for thing in scene]),
                "swapped": swapped.caption() if swapped else "",
            }
            yield index, record


class ShapesSource(TfdsSource):
    """The written dataset with its scene graphs parsed and without empty false captions."""

    def __getitem__(self, index: int) -> Example:
        item = super().__getitem__(index)
        meta = {"scene": json.loads(item["meta"]["scene"])}
        if item["meta"]["swapped"]:
            meta["swapped"] = item["meta"]["swapped"]
        return {**item, "meta": meta}


def load_shapes(
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    image_size: int = 64,
    train_size: int = 8000,
    test_size: int = 1000,
) -> ShapesSource:
    """Returns the shapes; draws the dataset at the first use, about 1 ms per example at 64 pixels.

    Args:
        split: "train", "test" or a slice of them, such as "train[:100]".
        data_dir: where datasets are kept.
        image_size: height and width of the pictures.
        train_size: number of training examples.
        test_size: number of test examples.

    Raises:
        ValueError: if a number is not positive.
    """
    if min(image_size, train_size, test_size) < 1:
        raise ValueError(
            f"shapes needs positive sizes, got image_size {image_size}, "
            f"train_size {train_size}, test_size {test_size}"
        )
    config = ShapesConfig(image_size=image_size, train_size=train_size, test_size=test_size)
    return ShapesSource(prepare(Shapes, data_dir, config=config), split, caption="caption")
