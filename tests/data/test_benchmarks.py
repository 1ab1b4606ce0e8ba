# SPDX-License-Identifier: Apache-2.0
"""Tiny files in the formats that the benchmarks publish."""

import json
import pickle

import pytest

from flax_vlm.data import load_source

SHORT = "Answer the question using a single word or phrase."


def write(folder, name, content, lines=False):
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    (folder / name).write_text(text)
    return folder / name


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def vqa_files(folder):
    asked = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    answers = ["down"] * 3 + ["at table"] * 5 + ["skateboard", "table"]
    told = {
        "question_type": "where is the",
        "multiple_choice_answer": "at table",
        "answers": [
            {"answer": a, "answer_confidence": "yes", "answer_id": n}
            for n, a in enumerate(answers, 1)
        ],
        "image_id": 262148,
        "answer_type": "other",
        "question_id": 262148000,
    }
    write(folder, "annotations.json", {"info": {}, "annotations": [told]})
    return write(folder, "questions.json", {"info": {}, "questions": [asked]}), answers


def test_vqav2_joins_questions_with_the_answers_of_ten_people(tmp_path):
    path, answers = vqa_files(tmp_path)
    options = {"annotations": "annotations.json", "images": str(tmp_path / "val2014")}
    source = load_source(f"vqav2:{path}", split="all", **options)
    assert source[0] == {
        "images": [tmp_path / "val2014" / "COCO_val2014_000000262148.jpg"],
        "conversation": turns(f"<image>\nWhere is he looking?\n{SHORT}", "at table"),
        "meta": {"answers": answers, "kind": "other", "question_id": 262148000},
    }
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_gqa_is_read_with_the_structural_type_as_its_kind(tmp_path):
    row = {
        "semantic": [],
        "isBalanced": True,
        "imageId": "n161313",
        "question": "Is it overcast?",
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "answer": "no",
        "fullAnswer": "No, it is clear.",
    }
    path = write(tmp_path, "testdev_balanced_questions.json", {"201307251": row})
    (example,) = load_source(f"gqa:{path}", split="all", images="/data/gqa")
    assert str(example["images"][0]) == "/data/gqa/n161313.jpg"
    assert example["conversation"] == turns(f"<image>\nIs it overcast?\n{SHORT}", "no")
    assert example["meta"] == {"answers": ["no"], "kind": "verify", "question_id": "201307251"}


def test_textvqa_is_read_with_its_ten_answers(tmp_path):
    row = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "answers": ["nous les gosses", "dakota", *["dakota digital"] * 8],
    }
    path = write(tmp_path, "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    (example,) = load_source(f"textvqa:{path}", split="all")
    assert example["images"] == [tmp_path / "003a8ae2ef43b901.jpg"]
    asked = f"<image>\nWhat is the brand of this camera?\n{SHORT}"
    assert example["conversation"] == turns(asked, "dakota digital")
    assert example["meta"]["answers"] == row["answers"]


def test_pope_takes_its_kind_from_the_name_of_the_file(tmp_path):
    rows = [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a snowboard?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a dog?", "label": "no"},
    ]
    path = write(tmp_path, "coco_pope_adversarial.json", rows, lines=True)
    source = load_source(f"pope:{path}", split="all")
    assert [e["meta"]["answers"] for e in source] == [["yes"], ["no"]]
    assert source[1]["meta"]["kind"] == "adversarial"
    assert source[1]["conversation"][0]["content"] == f"<image>\nIs there a dog?\n{SHORT}"


def test_scienceqa_lists_the_options_by_letters_and_may_have_no_image(tmp_path):
    problem = {
        "question": "Which is farthest north?",
        "choices": ["Ohio", "Maine"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "subject": "social science",
        "split": "test",
    }
    bare = {**problem, "image": None, "hint": "Look it up.", "answer": 0}
    path = write(tmp_path, "problems.json", {"7": problem, "8": bare, "9": bare})
    write(tmp_path, "pid_splits.json", {"train": ["9"], "test": ["7", "8"]})
    first, second = load_source(f"scienceqa:{path}", split="test")
    assert first["images"] == [tmp_path / "test" / "7" / "image.png"]
    letter = "Answer with the option's letter from the given choices directly."
    asked = f"Which is farthest north?\nA. Ohio\nB. Maine\n{letter}"
    assert first["conversation"] == turns(f"<image>\n{asked}", "B")
    assert first["meta"]["options"] == ["Ohio", "Maine"]
    assert second["images"] == []
    assert second["conversation"] == turns(f"Look it up.\n{asked}", "A")
    with pytest.raises(ValueError, match=r"no split 'dev', it has \['test', 'train'\]"):
        load_source(f"scienceqa:{path}", split="dev")


def mmmu_rows():
    images = {f"image_{n}": None for n in range(1, 8)}
    base = {"subfield": "Optics", **images, "image_1": "1.png", "image_2": "2.png"}
    return [
        {
            **base,
            "id": "validation_Physics_1",
            "question": "Compare <image 2> to <image 1>.",
            "options": "['<image 1>', 'both']",
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {
            **base,
            "id": "validation_Physics_2",
            "question": "How many?",
            "options": "[]",
            "answer": "['two', '2']",
            "question_type": "open",
        },
    ]


def test_mmmu_puts_each_image_where_the_question_names_it(tmp_path):
    path = write(tmp_path, "mmmu.jsonl", mmmu_rows(), lines=True)
    first, second = load_source(f"mmmu:{path}", split="all", images="/m")
    assert [str(p) for p in first["images"]] == ["/m/2.png", "/m/1.png", "/m/1.png"]
    asked = first["conversation"][0]["content"]
    assert asked.startswith("Compare <image> to <image>.\nA. <image>\nB. both\nAnswer with")
    assert first["meta"]["options"] == ["<image 1>", "both"]
    assert second["conversation"][0]["content"] == f"<image>\n<image>\nHow many?\n{SHORT}"
    assert second["meta"]["answers"] == ["two", "2"] and "options" not in second["meta"]


def test_coco_captions_are_grouped_by_image(tmp_path):
    content = {
        "images": [{"id": 9, "file_name": "nine.jpg"}, {"id": 3, "file_name": "three.jpg"}],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "A cat. "},
            {"image_id": 9, "id": 2, "caption": "A dog"},
            {"image_id": 3, "id": 4, "caption": "A mat"},
        ],
    }
    path = write(tmp_path, "captions_val2014.json", content)
    first, second = load_source(f"coco_captions:{path}", split="all")
    assert first["images"] == [tmp_path / "nine.jpg"]
    assert second["meta"]["answers"] == ["A cat.", "A mat"]
    assert second["conversation"][0]["content"].startswith("<image>\nProvide a one-sentence")


def test_files_that_cannot_be_read_are_errors_that_name_them(tmp_path):
    with pytest.raises(ValueError, match="there is none at .*no.json"):
        load_source(f"gqa:{tmp_path / 'no.json'}", split="all")
    path = write(tmp_path, "gqa.json", {"1": {"question": "?", "imageId": "x", "answer": "no"}})
    with pytest.raises(ValueError, match="gqa.json does not have the published.*no field 'types'"):
        load_source(f"gqa:{path}", split="all")
    with pytest.raises(ValueError, match="one split of its benchmark, ask for 'all', got 'test'"):
        load_source(f"gqa:{path}", split="test")
    good = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}
    (tmp_path / "pope.json").write_text(json.dumps(good) + "\n{")
    with pytest.raises(ValueError, match="pope.json line 2: not JSON"):
        load_source(f"pope:{tmp_path / 'pope.json'}", split="all")
    with pytest.raises(ValueError, match="unknown key .*'folder'.*'images'"):
        load_source(f"gqa:{path}", split="all", folder="x")
    with pytest.raises(ValueError, match="needs the path of its file after a colon"):
        load_source("pope:", split="all")
