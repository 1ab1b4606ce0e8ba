# SPDX-License-Identifier: Apache-2.0
"""Several conversations in one row: which go together is settled once, before training.

    examples   [a a a]  [b b b b b]  [c c]         rows of 8 tokens, first fit
    text       [ a a a c c . . . ]   segments  [ 1 1 1 2 2 2 2 2 ]   positions  [ 0 1 2 0 1 . . . ]
               [ b b b b b . . . ]             [ 1 1 1 1 1 1 1 1 ]              [ 0 1 2 3 4 . . . ]

A text sees itself alone and counts its positions from 0, so the loss is that of the same texts in
rows of their own. Packers that fill rows while they read have to be read from the start; here an
index file lists the examples of every row (tools/pack.py), so that row i can be read at any time
and the position in the data stays a function of the step. A batch holds batch_size rows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_vlm.data.conversations import ConversationPreprocess, Row, fit
from flax_vlm.data.sources import Source

KEYS = ("source", "examples", "rows", "length", "num_images")


def first_fit(sizes: Sequence[tuple[int, int]], length: int, num_images: int) -> list[list[int]]:
    """Returns the examples of every row: each goes into the first row that has room for it.

    Args:
        sizes: (tokens, images) of every example, at most (length, num_images); (0, 0) is left out.
        length: L, tokens in a row.
        num_images: I, images in a row.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = []
    first_open = 0  # rows before this one are full to the last token
    for example, (tokens, images) in enumerate(sizes):
        if tokens == 0:
            continue
        fits = (n for n in range(first_open, len(rows)) if room[n][0] >= tokens)
        row = next((n for n in fits if room[n][1] >= images), len(rows))
        if row == len(rows):
            rows.append([])
            room.append([length, num_images])
        rows[row].append(example)
        room[row][0] -= tokens
        room[row][1] -= images
        while first_open < len(rows) and room[first_open][0] == 0:
            first_open += 1
    return rows


def size_of(example: Mapping[str, Any], preprocess: ConversationPreprocess) -> tuple[int, int]:
    """Returns (tokens, images) that an example takes in a row; (0, 0) if no answer of it fits."""
    ids, supervised = fit(*preprocess.tokens(example), preprocess.text_length)
    if not any(supervised):
        return 0, 0
    return len(ids), 0 if preprocess.blind else len(example["images"])


def filled(sizes: Sequence[tuple[int, int]], rows: Sequence[Sequence[int]], length: int) -> float:
    """Returns the share of the tokens of all rows that is text."""
    return sum(tokens for tokens, _ in sizes) / (max(len(rows), 1) * length)


@dataclasses.dataclass(frozen=True)
class PackedSource:
    """Rows of examples of another source: {"packed": [example, ...]}.

    Attributes:
        source: the examples.
        rows: numbers of the examples of every row.
    """

    source: Source
    rows: Sequence[Sequence[int]]

    @property
    def class_names(self) -> None:
        """None: conversations have no labels."""
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"packed": [self.source[number] for number in self.rows[index]]}


def read_index(path: str | os.PathLike) -> dict[str, Any]:
    """Returns an index that tools/pack.py wrote: KEYS.

    Raises:
        ValueError: if there is none at `path`.
    """
    path = pathlib.Path(path)
    try:
        index = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be an index of flax_vlm.tools.pack: {error}") from error
    missing = [key for key in KEYS if key not in index]
    if missing:
        raise ValueError(f"{path} must be an index of flax_vlm.tools.pack, it lacks {missing}")
    return index


def write_index(path: pathlib.Path, index: Mapping[str, Any]) -> None:
    """Writes an index, whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({key: index[key] for key in KEYS}), "utf-8")
    os.replace(unfinished, path)


def packed_source(source: Source, index: Mapping[str, Any]) -> PackedSource:
    """Returns the rows of an index over its source.

    Raises:
        ValueError: if the source has another number of examples than the one that was packed.
    """
    if len(source) != index["examples"]:
        raise ValueError(
            f"an index is of one source, it was made of {index['examples']} examples and there are "
            f"{len(source)}; pack again"
        )
    return PackedSource(source, index["rows"])


@dataclasses.dataclass(frozen=True)
class PackedPreprocess:
    """Makes rows of {"packed": [example, ...]}.

    Attributes:
        inner: how an example becomes tokens; its text_length and num_images are the row's.
    """

    inner: ConversationPreprocess

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the conversations."""
        return self.inner.tokenizer

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> Row:
        """Returns the row of a ConversationPreprocess with "segments" [L] int32, the number of
        every token's text from 1, and "positions" [L] int32, of the token in its text.

        A conversation with a broken image is left out of its row and makes the row "broken", one
        that was cut makes it "text_truncated"; "example_mask" is False if nothing is left.

        Args:
            example: "packed".
            rng: all randomness of the image operations.

        Raises:
            ValueError: as the preprocess of conversations; if the examples do not fit into a row.
        """
        rows = [self.inner(one, rng) for one in example["packed"]]
        kept = [n for n, row in enumerate(rows) if row["example_mask"]]
        if not kept:
            return self._with_one_text(rows[0])
        row = self._joined([rows[n] for n in kept])
        if not self.inner.blind:
            row["images"] = self._images([(rows[n], example["packed"][n]) for n in kept])
        broken = max(int(one["broken"]) for one in rows)
        return row | {"broken": np.int8(broken)}

    def padding(self) -> Row:
        """Returns a row that is no example."""
        return self._with_one_text(self.inner.padding())

    def _with_one_text(self, row: Row) -> Row:
        length = self.inner.text_length
        return row | {
            "segments": np.ones(length, np.int32),
            "positions": np.arange(length, dtype=np.int32),
        }

    def _joined(self, rows: Sequence[Row]) -> Row:
        length, sizes = self.inner.text_length, [int(row["text_mask"].sum()) for row in rows]
        if sum(sizes) > length:
            raise ValueError(
                f"the texts of a row must fit into {length} tokens, got {sum(sizes)}; they were "
                f"packed with another tokenizer, chat template or image size: pack again"
            )
        # padding belongs to the last text: attention over nothing would be NaN
        sizes_to_end = [*sizes[:-1], length - sum(sizes[:-1])]
        joined = {
            "segments": np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), sizes_to_end),
            "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in sizes_to_end]),
            "example_mask": np.bool_(True),
            "text_truncated": np.any([row["text_truncated"] for row in rows]),
        }
        empty = self.inner.padding()
        for key, fill in (("text", self.tokenizer.pad_id), ("text_mask", 0), ("loss_mask", 0)):
            joined[key] = np.full_like(empty[key], fill)
            parts = [row[key][:n] for row, n in zip(rows, sizes, strict=True)]
            joined[key][: sum(sizes)] = np.concatenate(parts)
        return joined

    def _images(self, read: Sequence[tuple[Row, Mapping[str, Any]]]) -> np.ndarray:
        parts = [row["images"][: len(example["images"])] for row, example in read]
        images, given = np.zeros_like(read[0][0]["images"]), np.concatenate(parts)
        if len(given) > len(images):
            raise ValueError(
                f"a row must have at most {len(images)} images, got {len(given)}; set "
                f"data.chat.num_images to what was packed with"
            )
        images[: len(given)] = given
        return images
