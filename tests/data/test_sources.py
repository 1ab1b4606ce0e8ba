# SPDX-License-Identifier: Apache-2.0
"""Sources on disk and in memory: where captions come from, and what is refused with which words."""

import json
import pickle

import numpy as np
import pytest

from flax_vlm.data import DATASETS, class_names, load_source
from flax_vlm.data.images import decode_image
from flax_vlm.data.sources import MemorySource
from tests.data.conftest import encoded

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_images(folder, *names):
    for name, pixels in zip(names, PIXELS, strict=False):
        write(folder / name, encoded(pixels))


def captions(source):
    return [example["caption"] for example in source]


def test_jsonl_list_has_paths_relative_to_its_folder_labels_and_meta(tmp_path):
    write_images(tmp_path / "img", "a.png", "b.png", "c.png")
    rows = [
        {"image": "img/b.png", "caption": " a dog \n", "label": "dog", "url": "u1"},
        {"image": "img/a.png", "caption": "Eine Katze, groß", "label": "cat", "url": "u2"},
        {"image": str(tmp_path / "img/c.png"), "caption": "dogs", "label": "dog", "url": "u3"},
    ]
    write(tmp_path / "list.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    source = load_source(f"jsonl:{tmp_path}/list.jsonl")
    assert captions(source) == ["a dog", "Eine Katze, groß", "dogs"]
    assert [example["label"] for example in source] == [1, 0, 1]
    assert source.class_names == ("cat", "dog")
    assert source[0]["meta"] == {"url": "u1"}
    for example, pixels in zip(source, PIXELS[[1, 0, 2]], strict=True):
        np.testing.assert_array_equal(decode_image(example["image"]), pixels)
    copy = pickle.loads(pickle.dumps(source))
    assert captions(copy) == captions(source) and len(copy) == 3


def test_csv_list_reads_quotes_number_labels_and_its_split_column(tmp_path):
    text = (
        '\ufefffile_name,text,label,split\na.png,"red, round",7,train\nb.png,"two\nlines",3,test\n'
    )
    write(tmp_path / "list.csv", text)
    name = f"csv:{tmp_path}/list.csv"
    assert captions(load_source(name, split="all")) == ["red, round", "two\nlines"]
    test = load_source(name, split="test")
    assert captions(test) == ["two\nlines"] and test[0]["label"] == 3 and test.class_names is None
    with pytest.raises(ValueError, match=r"no split 'val', its splits are \['test', 'train'\]"):
        load_source(name, split="val")


def test_columns_of_a_list_can_be_named(tmp_path):
    write(tmp_path / "x.csv", "where,says,kind,caption\na.png,hello,bird,no\n")
    chosen = {"image": "where", "caption": "says", "label": "kind"}
    source = load_source(f"csv:{tmp_path}/x.csv", **chosen)
    assert captions(source) == ["hello"] and source.class_names == ("bird",)
    assert source[0]["meta"] == {"caption": "no"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.jsonl", "", "got the empty list"),
        ("l.csv", "image,caption\n", "got the empty list"),
        ("l.jsonl", '{"image": "a.png"}', r"column for the caption.*it has \['image'\]"),
        ("l.csv", "photo,caption\na,b\n", "column for the image"),
        ("l.jsonl", '{"image": "a", "caption": "b"}\n{"image": "a"', "line 2: not JSON"),
        ("l.jsonl", '["a", "b"]', "line 1: must be a JSON object"),
        ("l.jsonl", '{"image": "a", "caption": "b"}\n{"image": "c"}', "line 2: column 'caption'"),
        ("l.jsonl", '{"image": "a", "caption": " "}', "line 1: column 'caption' must hold text"),
        ("l.csv", "image,caption\na,b\nc,d,e\n", "line 3: a row must have the columns"),
        ("l.csv", "image,caption\na,b\nc\n", "line 3: a row must have the columns"),
        ("l.csv", "image,caption,label\na,b,\n", "column 'label' must hold a label"),
    ],
)
def test_bad_list_is_refused_with_its_line(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_source(f"{name[2:]}:{tmp_path}/{name}")
    assert name in str(error.value)


def test_missing_list_or_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is none at"):
        load_source(f"csv:{tmp_path}/none.csv")
    with pytest.raises(ValueError, match="there is none at"):
        load_source(f"folder:{tmp_path}/none")


def test_list_without_splits_is_one_split(tmp_path):
    write(tmp_path / "l.jsonl", '{"image": "a", "caption": "b"}')
    assert len(load_source(f"jsonl:{tmp_path}/l.jsonl", split="train")) == 1
    with pytest.raises(ValueError, match="no column 'split', so it has no split 'test'"):
        load_source(f"jsonl:{tmp_path}/l.jsonl", split="test")


def test_folder_takes_captions_from_text_files(tmp_path):
    write_images(tmp_path, "b.png", "deep/a.JPG", ".hidden.png")
    write(tmp_path / "b.txt", "a bee\n")
    write(tmp_path / "deep/a.txt", "an ant")
    write(tmp_path / "notes.md", "no image")
    source = load_source(f"folder:{tmp_path}")
    assert captions(source) == ["a bee", "an ant"] and source.class_names is None
    np.testing.assert_array_equal(decode_image(source[0]["image"]), PIXELS[0])
    write(tmp_path / "deep/a.txt", "")
    with pytest.raises(ValueError, match=r"1 of 2 .*have none, such as .*a\.JPG"):
        load_source(f"folder:{tmp_path}")


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "metadata.jsonl"])
def test_folder_takes_captions_from_a_list_in_it(tmp_path, name):
    write_images(tmp_path, "a.png", "b.png")
    row = "image,caption\nb.png,bee\n" if "csv" in name else '{"file_name": "b.png", "text": "bee"}'
    write(tmp_path / name, row)
    source = load_source(f"folder:{tmp_path}")
    assert captions(source) == ["bee"]
    np.testing.assert_array_equal(decode_image(source[0]["image"]), PIXELS[1])


def test_folder_takes_labels_from_the_names_of_its_folders(tmp_path):
    write_images(tmp_path, "red_fox/1.png", "red_fox/more/2.png", "bear/3.png")
    source = load_source(f"folder:{tmp_path}")
    assert captions(source) == ["bear", "red fox", "red fox"]
    assert [example["label"] for example in source] == [0, 1, 1]
    assert source.class_names == class_names(f"folder:{tmp_path}") == ("bear", "red fox")


def test_folder_of_a_split_is_used_if_there_is_one(tmp_path):
    write_images(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/dog/3.png", "test/cat/4.png")
    assert len(load_source(f"folder:{tmp_path}", split="train")) == 2
    test = load_source(f"folder:{tmp_path}", split="test")
    np.testing.assert_array_equal(decode_image(test[1]["image"]), PIXELS[2])
    assert test.class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="no sub-folder 'val'"):
        load_source(f"folder:{tmp_path}", split="val")


def test_list_beside_the_folders_of_splits_is_used(tmp_path):
    write_images(tmp_path, "train/1.png", "test/2.png")
    rows = [("train/1.png", "one", "train"), ("test/2.png", "two", "test")]
    text = "\n".join(
        json.dumps(dict(zip(("image", "caption", "split"), row, strict=True))) for row in rows
    )
    write(tmp_path / "captions.jsonl", text)
    source = load_source(f"folder:{tmp_path}", split="test")
    assert captions(source) == ["two"]
    np.testing.assert_array_equal(decode_image(source[0]["image"]), PIXELS[1])


def test_folder_without_images_or_captions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must have examples, got no \.jpg"):
        load_source(f"folder:{tmp_path}")
    write_images(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"images need captions.*1 images such as .*a\.png"):
        load_source(f"folder:{tmp_path}")


def test_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="must have examples, got none from memory"):
        MemorySource([])


def test_wrong_name_or_option_lists_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"unknown dataset 'digit'.*did you mean 'digits'"):
        load_source("digit")
    with pytest.raises(ValueError, match=r"unknown key \['colour'\] for dataset 'shapes'"):
        load_source("shapes", colour="red")
    with pytest.raises(ValueError, match="nothing after a colon"):
        load_source("digits:8x8")
    with pytest.raises(ValueError, match=r"missing key \['annotations'\] for dataset 'vqav2'"):
        load_source("vqav2:questions.json")
    for name in set(DATASETS) - {"digits", "shapes", "instructions", "vqav2"}:
        with pytest.raises(ValueError, match="after a colon, got nothing"):
            load_source(name)
