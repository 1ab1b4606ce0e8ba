# SPDX-License-Identifier: Apache-2.0
"""Images with captions: where they come from, how they are decoded, cut into tokens and batched.

Everything here is numpy on the host; arrays meet jax in `training`. Nothing imports TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from flax_vlm.build import build
from flax_vlm.data import (
    benchmarks,
    digits,
    instructions,
    llava_json,
    packing,
    shapes_world,
    sources,
    tfds_source,
)
from flax_vlm.data.sources import Source


def _digits(argument: str, *, split: str, data_dir: str | None) -> Source:
    _check_no_argument("digits", argument)
    return digits.load_digits(split=split, data_dir=data_dir)


def _shapes(
    argument: str,
    *,
    split: str,
    data_dir: str | None,
    image_size: int = 64,
    train_size: int = 8000,
    test_size: int = 1000,
) -> Source:
    _check_no_argument("shapes", argument)
    sizes = {"image_size": image_size, "train_size": train_size, "test_size": test_size}
    return shapes_world.load_shapes(split=split, data_dir=data_dir, **sizes)


def _instructions(argument: str, *, split: str, data_dir: str | None, **options: Any) -> Source:
    _check_no_argument("instructions", argument)
    return instructions.load_instructions(split=split, data_dir=data_dir, **options)


def _llava(argument: str, *, split: str, data_dir: str | None, images: str | None = None) -> Source:
    _check_argument("llava", argument, "the path of a JSON file")
    if split != "train":
        raise ValueError(f"a file of LLaVA's format is one split, train, got {split!r}")
    return llava_json.load_llava(argument, images)


def _packed(argument: str, *, split: str, data_dir: str | None, **options: Any) -> Source:
    _check_argument("packed", argument, "the index.json that flax_vlm.tools.pack wrote")
    if split != "train":
        raise ValueError(f"an index of packed rows is one split, train, got {split!r}")
    index = packing.read_index(argument)
    examples = load_source(**index["source"] | options, data_dir=data_dir)
    return packing.packed_source(examples, index)


def _tfds(
    argument: str,
    *,
    split: str,
    data_dir: str | None,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> Source:
    _check_argument("tfds", argument, "the dataset")
    features = {"image": image, "caption": caption, "label": label}
    return tfds_source.load_tfds(argument, split=split, data_dir=data_dir, **features)


def _folder(argument: str, *, split: str, data_dir: str | None) -> Source:
    _check_argument("folder", argument, "its path")
    return sources.load_folder(argument, split)


def _list(
    argument: str,
    *,
    split: str,
    data_dir: str | None,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> Source:
    _check_argument("a list", argument, "its path")
    return sources.load_list(argument, split, image=image, caption=caption, label=label)


def _check_no_argument(name: str, argument: str) -> None:
    if argument:
        raise ValueError(f"the dataset {name!r} takes nothing after a colon, got {argument!r}")


def _check_argument(name: str, argument: str, what: str) -> None:
    if not argument:
        raise ValueError(f"the dataset {name!r} needs {what} after a colon, got nothing")


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "shapes": _shapes,
    "instructions": _instructions,
    "llava": _llava,
    "packed": _packed,
    "tfds": _tfds,
    "folder": _folder,
    "jsonl": _list,
    "csv": _list,
    **benchmarks.BENCHMARKS,
}


def load_source(
    name: str, *, split: str = "train", data_dir: str | os.PathLike | None = None, **options: Any
) -> Source:
    """Returns a source of examples by its name in a config.

    Args:
        name: a key of DATASETS, with what it needs after a colon: "digits", "shapes",
            "tfds:coco_captions", "folder:/data/birds", "jsonl:/data/list.jsonl",
            "csv:/data/list.csv".
        split: "train", "test" ...; what there is depends on the dataset.
        data_dir: where prepared datasets are kept; None takes $FLAX_VLM_DATA_DIR or
            ~/.cache/flax_vlm/datasets.
        **options: of the dataset.

    Raises:
        ValueError: if the name, an option or the split is unknown, or there is no example.
    """
    key, _, argument = name.partition(":")
    folder = None if data_dir is None else os.fspath(data_dir)
    given = {"argument": argument, "split": split, "data_dir": folder}
    return build(DATASETS, {**options, "name": key}, "dataset", **given)


def class_names(
    name: str, *, data_dir: str | os.PathLike | None = None, **options: Any
) -> tuple[str, ...]:
    """Returns the class names of a dataset, for zero-shot prompts.

    Args:
        name: see `load_source`.
        data_dir: see `load_source`.
        **options: see `load_source`; "split" among them.

    Raises:
        ValueError: if the dataset has none.
    """
    found = load_source(name, data_dir=data_dir, **options).class_names
    if found is None:
        raise ValueError(f"the dataset {name!r} has no class names; state them in the config")
    return found
