# SPDX-License-Identifier: Apache-2.0
"""LLaVA's own format of instruction data."""

import json

import pytest

from flax_vlm.data import load_source

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
RECORDS = [
    {"id": "a", "image": "coco/1.jpg", "conversations": TURNS},
    {"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
    {"image": ["1.jpg", "2.jpg"], "conversations": [{"from": "human", "value": "<image><image>"}]},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_file_of_llavas_format_is_read(tmp_path, suffix):
    lines = "\n".join(map(json.dumps, RECORDS)) + "\n"
    path = tmp_path / f"mix.{suffix}"
    path.write_text(json.dumps(RECORDS) if suffix == "json" else lines)
    source = load_source(f"llava:{path}", images=tmp_path / "images")
    assert len(source) == 3
    assert source[0] == {
        "images": [tmp_path / "images/coco/1.jpg"],
        "conversation": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "A cat."},
        ],
        "meta": {"id": "a"},
    }
    assert source[1]["images"] == [] and source[1]["meta"]["id"] == 7
    assert len(source[2]["images"]) == 2 and source[2]["meta"]["id"] == 2
    assert load_source(f"llava:{path}")[0]["images"] == [tmp_path / "coco/1.jpg"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "x", "image": "1.jpg", "conversations": TURNS[1:]}, "record 'x' must have one <im"),
        ({"id": "x", "conversations": TURNS}, "got 1 and 0"),
        (
            {"id": "x", "conversations": [{"from": "robot", "value": ""}]},
            "record 'x' must have \"c",
        ),
        ({"id": "x"}, "record 'x' must have \"conversations\""),
        ("text", 'record 0 must have "conversations"'),
    ],
)
def test_a_record_that_is_no_conversation_is_named(tmp_path, record, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=message):
        load_source(f"llava:{path}")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json must be JSON"):
        load_source(f"llava:{tmp_path / 'bad.json'}")
    with pytest.raises(ValueError, match="must hold a list of conversations, got dict"):
        load_source(f"llava:{tmp_path / 'object.json'}")
    with pytest.raises(ValueError, match="none.json cannot be read"):
        load_source(f"llava:{tmp_path / 'none.json'}")
    with pytest.raises(ValueError, match="is one split, train, got 'test'"):
        load_source(f"llava:{tmp_path / 'object.json'}", split="test")
