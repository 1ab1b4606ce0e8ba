# SPDX-License-Identifier: Apache-2.0
"""Random access to images with captions: in memory, a CSV or JSONL list, or a folder.

A source is a sequence of examples that can be pickled (worker processes get a copy). Nothing is
decoded here, and a file that is missing is found out only when it is decoded (`data.decode`).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "file", "path")
CAPTION_COLUMNS = ("caption", "text", "title")
LABEL_COLUMNS = ("label", "class")
LISTS = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")


class Example(TypedDict):
    """One image with its caption.

    Attributes:
        image: encoded bytes, the path of a file, or [H, W, C] uint8.
        caption: any text.
        label: position in the source's class_names.
        meta: what else is known; stays on the host.
    """

    image: bytes | pathlib.Path | np.ndarray
    caption: str
    label: NotRequired[int]
    meta: NotRequired[Mapping[str, Any]]


class Source(Protocol):
    """What a dataset reads from; must be picklable, and the same example at every reading."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels; None if examples have none."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Returns an example."""


@dataclasses.dataclass(frozen=True, repr=False)
class MemorySource:
    """Examples held in memory, or held as paths.

    Attributes:
        examples: at least one.
        class_names: names of the labels.
        name: where they come from, for messages.
    """

    examples: Sequence[Example]
    class_names: tuple[str, ...] | None = None
    name: str = "memory"

    def __post_init__(self):
        if len(self.examples) == 0:
            raise ValueError(f"a dataset must have examples, got none from {self.name}")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __repr__(self) -> str:
        return f"MemorySource({self.name}, {len(self)} examples)"


def load_list(
    path: str | os.PathLike,
    split: str = "all",
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> MemorySource:
    """Returns the examples of a CSV file with a header, or of a JSONL file of objects.

    Args:
        path: the list; image paths in it are relative to its folder.
        split: keeps the rows whose column "split" holds this; a list without such a column is all
            one split and must be asked for "all" or "train".
        image: column of the image's path; None takes the first of IMAGE_COLUMNS that exists.
        caption: column of the caption; None takes the first of CAPTION_COLUMNS that exists.
        label: column of the label; None takes the first of LABEL_COLUMNS that exists, if any.
            Numbers are labels, anything else is the name of a class. Further columns become `meta`.

    Raises:
        ValueError: if a column is missing, a line cannot be read, or no example is left; the
            message names the file and the line.
    """
    path = pathlib.Path(path)
    rows = list(_read_list(path))
    if not rows:
        raise ValueError(f"a dataset must have examples, got the empty list {path}")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    image = _column(path, columns, image, IMAGE_COLUMNS, "image")
    caption = _column(path, columns, caption, CAPTION_COLUMNS, "caption")
    if label is not None or any(name in columns for name in LABEL_COLUMNS):
        label = _column(path, columns, label, LABEL_COLUMNS, "label")
    rows = _of_split(path, rows, columns, split)
    examples = [_list_example(path, line, row, image, caption, label) for line, row in rows]
    class_names = _number_labels(examples) if label else None
    return MemorySource(examples, class_names, str(path))


def _read_list(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, row)."""
    if not path.is_file():
        raise ValueError(f"a list of images must be a file, there is none at {path}")
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path} line {reader.line_num}: a row must have the columns of the "
                        f"header, {reader.fieldnames}, got {row}; quote captions with commas"
                    )
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(path, number, line)


def _json_object(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} line {number}: must be a JSON object, got {line[:80]!r}")
    return row


def _column(
    path: pathlib.Path,
    columns: Sequence[str],
    wanted: str | None,
    usual: Sequence[str],
    what: str,
) -> str:
    names = usual if wanted is None else (wanted,)
    for name in names:
        if name in columns:
            return name
    raise ValueError(
        f"{path} must have a column for the {what}, looked for {list(names)}, "
        f"it has {list(columns)}; name it by {what}="
    )


def _of_split(path: pathlib.Path, rows: list, columns: Sequence[str], split: str) -> list:
    if split == "all":
        return rows
    if "split" not in columns:
        if split == "train":
            return rows
        raise ValueError(
            f"{path} has no column 'split', so it has no split {split!r}; "
            f"ask for split 'all', or add the column"
        )
    kept = [(line, row) for line, row in rows if row.get("split") == split]
    if not kept:
        found = sorted({str(row.get("split")) for _, row in rows})
        raise ValueError(f"{path} has no split {split!r}, its splits are {found}")
    return kept


def _list_example(
    path: pathlib.Path,
    line: int,
    row: dict[str, Any],
    image: str,
    caption: str,
    label: str | None,
) -> Example:
    for column in (image, caption):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise ValueError(
                f"{path} line {line}: column {column!r} must hold text, got {row.get(column)!r}"
            )
    if label and row.get(label) in (None, ""):
        raise ValueError(f"{path} line {line}: column {label!r} must hold a label, got nothing")
    example = Example(image=path.parent / row[image], caption=row[caption].strip())
    if label:
        example["label"] = row[label]
    meta = {key: value for key, value in row.items() if key not in (image, caption, label, "split")}
    if meta:
        example["meta"] = meta
    return example


def _number_labels(examples: list[Example]) -> tuple[str, ...] | None:
    """Replaces labels by ints and returns the names of the classes, None if they were numbers."""
    texts = [str(example["label"]) for example in examples]
    if all(text.isdecimal() for text in texts):
        for example, text in zip(examples, texts, strict=True):
            example["label"] = int(text)
        return None
    names = sorted(set(texts))
    number = {name: i for i, name in enumerate(names)}
    for example, text in zip(examples, texts, strict=True):
        example["label"] = number[text]
    return tuple(names)


def load_folder(path: str | os.PathLike, split: str = "train") -> MemorySource:
    """Returns the images of a folder with their captions.

    Captions come from the first of these that is there: a list (`LISTS`) in the folder, read by
    `load_list`; a text file beside every image with the same name and the ending .txt; the name of
    the sub-folder of the first level that an image is in, which is its label, too.

    Args:
        path: the folder. If it has a sub-folder named like the split, that is used; otherwise all
            of it is one split, and only "train" and "all" may be asked for.
        split: see `path`.

    Raises:
        ValueError: if there is no image or an image has no caption.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ValueError(f"a folder of images must exist, there is none at {folder}")
    inner = folder / split
    if inner.is_dir() and (_lists_in(inner) or not _lists_in(folder)):
        folder, split = inner, "all"
    if _lists_in(folder):
        return load_list(_lists_in(folder)[0], split)
    if split not in ("train", "all"):
        raise ValueError(f"{folder} has no sub-folder {split!r}; make one, or ask for split 'all'")
    images = _images_in(folder)
    if not images:
        raise ValueError(f"a dataset must have examples, got no {'/'.join(SUFFIXES)} in {folder}")
    if any(image.with_suffix(".txt").is_file() for image in images):
        return _with_sidecars(folder, images)
    return _with_folder_names(folder, images)


def _lists_in(folder: pathlib.Path) -> list[pathlib.Path]:
    return [folder / name for name in LISTS if (folder / name).is_file()]


def _images_in(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".")]
        found += [pathlib.Path(parent, n) for n in names if n.lower().endswith(SUFFIXES)]
    return sorted(found)


def _with_sidecars(folder: pathlib.Path, images: list[pathlib.Path]) -> MemorySource:
    examples, missing = [], []
    for image in images:
        text = image.with_suffix(".txt")
        # bytes that are not UTF-8 are replaced: one odd letter should not stop a run
        caption = text.read_text("utf-8", "replace").strip() if text.is_file() else ""
        if caption:
            examples.append(Example(image=image, caption=caption))
        else:
            missing.append(image)
    if missing:
        raise ValueError(
            f"every image needs a caption in a .txt file of its name, "
            f"{len(missing)} of {len(images)} in {folder} have none, such as {missing[0]}"
        )
    return MemorySource(examples, None, str(folder))


def _with_folder_names(folder: pathlib.Path, images: list[pathlib.Path]) -> MemorySource:
    parts = [image.relative_to(folder).parts for image in images]
    loose = [image for image, part in zip(images, parts, strict=True) if len(part) == 1]
    if loose:
        raise ValueError(
            f"images need captions: a list ({', '.join(LISTS)}), a .txt file beside each, or "
            f"sub-folders named after classes; got none for {len(loose)} images such as {loose[0]}"
        )
    names = sorted({part[0] for part in parts})
    class_names = tuple(name.replace("_", " ") for name in names)
    number = {name: i for i, name in enumerate(names)}
    examples = [
        Example(image=image, caption=class_names[number[part[0]]], label=number[part[0]])
        for image, part in zip(images, parts, strict=True)
    ]
    return MemorySource(examples, class_names, str(folder))
