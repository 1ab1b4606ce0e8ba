# SPDX-License-Identifier: Apache-2.0
"""The published files of benchmarks as sources of instructions: what evaluators of answers read.

    vqav2      v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json
    gqa        testdev_balanced_questions.json
    textvqa    TextVQA_0.5.1_val.json
    pope       coco_pope_random.json: one JSON object per line
    scienceqa  problems.json and pid_splits.json
    mmmu       the table of MMMU as one JSON object per line, images as file names
    coco_captions   captions_val2014.json

Every example is {"images": [path], "conversation": [...], "meta": {...}}: the question with the
prompt that LLaVA-1.5 puts behind it (arXiv:2310.03744, appendix A), then the right answer.
meta["answers"] holds all right answers, meta["kind"] the kind of question, meta["question_id"] the
benchmark's own number. Images are found when they are decoded; nothing is downloaded.
"""

from __future__ import annotations

import ast
import collections
import json
import pathlib
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax_vlm.data.sources import MemorySource

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
COCO_VAL = "COCO_val2014_{:012d}.jpg"
MMMU_IMAGES = 7

Example = dict[str, Any]


def _example(
    images: Sequence[pathlib.Path], question: str, answers: Sequence[str], **meta: Any
) -> Example:
    # every marker that the question does not have stands before it, as in LLaVA
    missing = len(images) - question.count("<image>")
    turns = [
        {"role": "user", "content": "<image>\n" * missing + question},
        {"role": "assistant", "content": collections.Counter(answers).most_common(1)[0][0]},
    ]
    return {"images": list(images), "conversation": turns, "meta": {"answers": answers, **meta}}


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"a benchmark's file must exist, there is none at {path}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _read_lines(path: pathlib.Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"a benchmark's file must exist, there is none at {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not JSON: {error}") from error


def _source(
    path: pathlib.Path, rows: Iterable[Any], make: Callable[[Any], Example]
) -> MemorySource:
    examples = []
    for row in rows:
        try:
            examples.append(make(row))
        except KeyError as error:
            raise ValueError(
                f"{path} does not have the published format: no field {error} in {str(row)[:120]}"
            ) from error
    return MemorySource(examples, None, str(path))


def load_vqav2(
    path: pathlib.Path, images: pathlib.Path, *, annotations: str, image_name: str = COCO_VAL
) -> MemorySource:
    """Returns VQAv2 with the answers of ten people; the kind is the type of the answer.

    Args:
        path: the questions.
        images: folder of the images.
        annotations: file of the answers, relative to the folder of `path`.
        image_name: how the file of an image's number is called.
    """
    found = _read(path.parent / annotations)["annotations"]
    by_question = {row["question_id"]: row for row in found}

    def make(row: Mapping[str, Any]) -> Example:
        told = by_question[row["question_id"]]
        answers = [answer["answer"] for answer in told["answers"]]
        files = [images / image_name.format(row["image_id"])]
        question = f"{row['question']}\n{SHORT_ANSWER}"
        meta = {"kind": told["answer_type"], "question_id": row["question_id"]}
        return _example(files, question, answers, **meta)

    return _source(path, _read(path)["questions"], make)


def load_gqa(path: pathlib.Path, images: pathlib.Path) -> MemorySource:
    """Returns GQA; the kind is the structural type of the question."""

    def make(item: tuple[str, Mapping[str, Any]]) -> Example:
        number, row = item
        question = f"{row['question']}\n{SHORT_ANSWER}"
        meta = {"kind": row["types"]["structural"], "question_id": number}
        return _example([images / f"{row['imageId']}.jpg"], question, [row["answer"]], **meta)

    return _source(path, _read(path).items(), make)


def load_textvqa(path: pathlib.Path, images: pathlib.Path) -> MemorySource:
    """Returns TextVQA with the answers of ten people, without OCR tokens in the prompt."""

    def make(row: Mapping[str, Any]) -> Example:
        question = f"{row['question'].capitalize()}\n{SHORT_ANSWER}"
        meta = {"kind": "text", "question_id": row["question_id"]}
        return _example([images / f"{row['image_id']}.jpg"], question, row["answers"], **meta)

    return _source(path, _read(path)["data"], make)


def load_pope(path: pathlib.Path, images: pathlib.Path) -> MemorySource:
    """Returns POPE; the kind is what the file is called for: random, popular, adversarial."""
    kind = path.stem.rsplit("_", 1)[-1]

    def make(row: Mapping[str, Any]) -> Example:
        question = f"{row['text']}\n{SHORT_ANSWER}"
        meta = {"kind": kind, "question_id": row["question_id"]}
        return _example([images / row["image"]], question, [row["label"]], **meta)

    return _source(path, _read_lines(path), make)


def _with_options(question: str, options: Sequence[str]) -> str:
    letters = string.ascii_uppercase
    listed = [f"{letters[n]}. {option}" for n, option in enumerate(options)]
    return "\n".join([question, *listed, LETTER])


def load_scienceqa(
    path: pathlib.Path, images: pathlib.Path, *, split: str, splits: str = "pid_splits.json"
) -> MemorySource:
    """Returns ScienceQA; the kind is the subject. Questions without an image are there too.

    Args:
        path: problems.json.
        images: folder of the images: <split>/<question>/image.png.
        split: "train", "val", "test", "minival" or "minitest".
        splits: file of the splits, relative to the folder of `path`.
    """
    problems, parts = _read(path), _read(path.parent / splits)
    if split not in parts:
        raise ValueError(f"{path.parent / splits} has no split {split!r}, it has {sorted(parts)}")

    def make(number: str) -> Example:
        row = problems[number]
        files = [images / row["split"] / number / row["image"]] if row["image"] else []
        text = f"{row['hint']}\n{row['question']}" if row["hint"] else row["question"]
        meta = {"kind": row["subject"], "question_id": number, "options": row["choices"]}
        answer = string.ascii_uppercase[row["answer"]]
        return _example(files, _with_options(text, row["choices"]), [answer], **meta)

    return _source(path, parts[split], make)


def load_mmmu(path: pathlib.Path, images: pathlib.Path) -> MemorySource:
    """Returns MMMU; the kind is the subfield, and open questions have no options.

    Args:
        path: the table's columns id, question, options, answer, question_type, subfield, and
            image_1 .. image_7 with file names; the places are "<image 1>" in the question.
        images: folder of the images.
    """

    def make(row: Mapping[str, Any]) -> Example:
        options = row["options"]
        options = ast.literal_eval(options) if isinstance(options, str) else options
        is_open = row["question_type"] == "open"
        text = row["question"] if is_open else _with_options(row["question"], options)
        text = f"{text}\n{SHORT_ANSWER}" if is_open else text
        places = re.findall(r"<image (\d)>", text)
        if not places:
            places = [n for n in range(1, MMMU_IMAGES + 1) if row.get(f"image_{n}")]
        files = [images / row[f"image_{n}"] for n in places]
        answers = row["answer"]
        answers = ast.literal_eval(answers) if answers.startswith("[") else [answers]
        meta = {"kind": row["subfield"], "question_id": row["id"]}
        meta |= {} if is_open else {"options": options}
        return _example(files, re.sub(r"<image \d>", "<image>", text), answers, **meta)

    return _source(path, _read_lines(path), make)


def load_coco_captions(path: pathlib.Path, images: pathlib.Path) -> MemorySource:
    """Returns the images of COCO, asking for a caption; all captions of an image are answers."""
    read = _read(path)
    captions: dict[int, list[str]] = {}
    for row in read["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"].strip())

    def make(row: Mapping[str, Any]) -> Example:
        meta = {"kind": "caption", "question_id": row["id"]}
        return _example([images / row["file_name"]], CAPTION, captions[row["id"]], **meta)

    return _source(path, [row for row in read["images"] if row["id"] in captions], make)


def _dataset(load: Callable[..., MemorySource]) -> Callable[..., MemorySource]:
    """Returns a row of data.DATASETS for a file that is one split."""

    def build(argument: str, *, split: str, data_dir: str | None, images: str = "") -> MemorySource:
        paths = _paths(argument, images)
        _check_whole(argument, split)
        return load(*paths)

    return build


def _paths(argument: str, images: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the file, and the folder of the images: that of the file where none is given."""
    if not argument:
        raise ValueError("a benchmark needs the path of its file after a colon, got nothing")
    path = pathlib.Path(argument)
    return path, pathlib.Path(images) if images else path.parent


def _check_whole(argument: str, split: str) -> None:
    if split != "all":
        raise ValueError(f"{argument} is one split of its benchmark, ask for 'all', got {split!r}")


def _vqav2(
    argument: str,
    *,
    split: str,
    data_dir: str | None,
    annotations: str,
    images: str = "",
    image_name: str = COCO_VAL,
) -> MemorySource:
    _check_whole(argument, split)
    paths = _paths(argument, images)
    return load_vqav2(*paths, annotations=annotations, image_name=image_name)


def _scienceqa(
    argument: str, *, split: str, data_dir: str | None, images: str = ""
) -> MemorySource:
    return load_scienceqa(*_paths(argument, images), split=split)


BENCHMARKS: dict[str, Callable[..., MemorySource]] = {
    "vqav2": _vqav2,
    "gqa": _dataset(load_gqa),
    "textvqa": _dataset(load_textvqa),
    "pope": _dataset(load_pope),
    "scienceqa": _scienceqa,
    "mmmu": _dataset(load_mmmu),
    "coco_captions": _dataset(load_coco_captions),
}
