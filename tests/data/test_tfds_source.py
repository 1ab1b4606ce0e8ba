# SPDX-License-Identifier: Apache-2.0
"""Datasets of tfds, read without TensorFlow: features found or named, and what is refused."""

import contextlib
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_vlm.data import class_names, load_source
from flax_vlm.data.images import decode_image
from flax_vlm.data.tfds_source import default_data_dir, prepare
from tests.data.conftest import encoded

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
IMAGE = tfds.features.Image(shape=(None, None, 3))
TEXT = tfds.features.Text()


class _Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes five images with the features that a test asks for."""

    VERSION = tfds.core.Version("1.2.0")
    url_infos = None
    FEATURES: dict = {}

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(3)),
            "validation": self._generate_examples(range(3, 5)),
        }

    def _generate_examples(self, indices):
        values = {
            "image": lambda i: encoded(PIXELS[i]),
            "mask": lambda i: encoded(PIXELS[i]),
            "caption": lambda i: f"caption ü {i}",
            "comment": lambda i: f"comment {i}",
            "captions": lambda i: [{"text": f"{i} {k}"} for k in "abc"[: i + 1]],
            "label": lambda i: i % 2,
            "number": lambda i: 10 * i,
        }
        for i in indices:
            yield i, {key: values[key](i) for key in self.FEATURES}


LABEL = tfds.features.ClassLabel(names=["red_fox", "bear"])
CAPTIONS = tfds.features.Sequence({"text": tfds.features.Text()})
TOYS = {
    "toy_full": {
        "image": IMAGE,
        "caption": TEXT,
        "comment": TEXT,
        "label": LABEL,
        "number": np.int64,
    },
    "toy_labels": {"image": IMAGE, "label": LABEL},
    "toy_many": {"image": IMAGE, "captions": CAPTIONS},
    "toy_bare": {"image": IMAGE, "number": np.int64},
    "toy_two": {"image": IMAGE, "mask": IMAGE, "comment": TEXT},
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    for name, features in TOYS.items():
        prepare(type(name, (_Toy,), {"name": name, "FEATURES": features}), folder)
    return folder


def captions(source):
    return [example["caption"] for example in source]


def test_features_are_found_by_their_kind(toys):
    source = load_source("tfds:toy_full", data_dir=toys)
    assert captions(source) == ["caption ü 0", "caption ü 1", "caption ü 2"]
    assert [example["label"] for example in source] == [0, 1, 0]
    assert source.class_names == class_names("tfds:toy_full", data_dir=toys) == ("red fox", "bear")
    assert source[2]["meta"] == {"comment": "comment 2", "number": 20}
    assert source[1]["image"].startswith(b"\x89PNG")  # encoded bytes come through
    np.testing.assert_array_equal(decode_image(source[1]["image"]), PIXELS[1])


def test_splits_and_slices_are_those_of_tfds(toys):
    for split, expected in [("validation", [3, 4]), ("train[1:]", [1, 2]), ("all", range(5))]:
        source = load_source("tfds:toy_full", split=split, data_dir=toys)
        assert captions(source) == [f"caption ü {i}" for i in expected]
    with pytest.raises(ValueError, match=r"Unknown split 'test'.*'train', 'validation'"):
        load_source("tfds:toy_full", split="test", data_dir=toys)
    with pytest.raises(ValueError, match="must have examples, got none"):
        load_source("tfds:toy_full", split="train[:0]", data_dir=toys)


def test_features_can_be_named(toys):
    source = load_source("tfds:toy_full", caption="comment", label="number", data_dir=toys)
    assert captions(source)[1] == "comment 1" and source[2]["label"] == 20
    assert source.class_names is None
    two = load_source("tfds:toy_two", image="mask", data_dir=toys)
    assert captions(two)[0] == "comment 0"


def test_class_names_are_captions_where_there_are_no_others(toys):
    assert captions(load_source("tfds:toy_labels", data_dir=toys)) == ["red fox", "bear", "red fox"]


def test_of_several_captions_they_take_turns(toys):
    source = load_source("tfds:toy_many", split="all", caption="captions/text", data_dir=toys)
    assert captions(source)[:3] == ["0 a", "1 b", "2 c"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("toy_bare", {}, r"must have captions or class names, its features are \['image', 'nu"),
        ("toy_many", {}, "must have captions or class names"),
        ("toy_full", {"caption": "title"}, "one feature for the caption, there is no 'title'"),
        ("toy_full", {"image": "photo"}, "one feature for the image, there is no 'photo'"),
        ("toy_two", {}, r"one feature for the image, found \['image', 'mask'\]"),
        ("no_such_set", {}, r"is not in .*; prepare it with: python -c"),
    ],
)
def test_what_is_missing_is_said_with_the_choices(toys, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_source(f"tfds:{name}", data_dir=toys, **options)


def test_newest_version_is_taken_and_a_config_must_be_chosen(data_dir, shapes):
    with pytest.raises(ValueError, match=r"several configs, add one of \['.*64px_60_24'"):
        load_source("shapes", data_dir=data_dir, train_size=4, test_size=4)
        load_source("tfds:shapes", data_dir=data_dir)
    source = load_source("tfds:shapes/64px_60_24", caption="caption", data_dir=data_dir)
    assert captions(source) == captions(shapes["train"])
    assert json.loads(source[0]["meta"]["scene"]) == shapes["train"][0]["meta"]["scene"]


def test_source_ends_where_its_examples_do(toys):
    source = load_source("tfds:toy_full", data_dir=toys)
    assert len(list(source)) == len(source) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match="has no example"):
            source[index]


def test_data_dir_is_the_argument_the_variable_or_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLAX_VLM_DATA_DIR", str(tmp_path))
    assert default_data_dir("/x/y") == default_data_dir(os.fspath("/x/y"))
    assert default_data_dir() == tmp_path
    monkeypatch.delenv("FLAX_VLM_DATA_DIR")
    assert default_data_dir().parts[-3:] == (".cache", "flax_vlm", "datasets")


PROGRAM = """
import sys
from flax_vlm.data import load_source
from flax_vlm.data.images import Resize
from flax_vlm.data.pipeline import Dataset, Preprocess
from flax_vlm.data.text import byte_level
for name, options in (("digits", {}), ("shapes", {"train_size": 40, "test_size": 4})):
    source = load_source(name, **options)
    preprocess = Preprocess((Resize(8),), (8, 8), byte_level(), 16)
    with Dataset(source, preprocess).batches(0, batch_size=4) as batches:
        next(batches)
    print(len(source), source[1]["caption"])
print([m for m in ("tensorflow", "torch", "flax") if m in sys.modules])
"""


def test_two_processes_prepare_the_same_data_quietly_and_without_tensorflow(tmp_path):
    environment = {**os.environ, "FLAX_VLM_DATA_DIR": str(tmp_path / "new")}
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    (first, errors), (second, other_errors) = outputs
    assert first == second and errors == other_errors == ""
    lines = first.splitlines()
    assert lines[0].startswith("1437 ") and lines[1].startswith("40 ") and lines[2:] == ["[]"]
    left = [p.name for p in (tmp_path / "new").rglob("*incomplete*")]
    assert left == []


def test_threads_that_prepare_at_once_leave_the_output_of_the_process_alone(tmp_path):
    inside = threading.Barrier(2)

    class Slow(_Toy, skip_registration=True):
        FEATURES = {"image": IMAGE}

        def __init__(self, **options):
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(0.5)  # for the other thread, which must not come
            super().__init__(**options)

    before = sys.stdout, sys.stderr
    threads = [threading.Thread(target=prepare, args=(Slow, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sys.stdout, sys.stderr) == before
    assert inside.broken
