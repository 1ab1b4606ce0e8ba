# SPDX-License-Identifier: Apache-2.0
r"""LLaVA's own format of instruction data: one JSON file, images in a folder beside it.

    [{"id": "000", "image": "coco/a.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                        {"from": "gpt", "value": "A cat."}]}, ...]

"image" may be a list, or absent for text alone.
Source: haotian-liu/LLaVA, docs/Finetune_Custom_Data.md.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax_vlm.data.chat_templates import IMAGE_MARKER
from flax_vlm.data.sources import MemorySource

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system"}


def load_llava(path: str | os.PathLike, images: str | os.PathLike | None = None) -> MemorySource:
    """Returns the conversations of a file; an image that is missing is found when it is read.

    Args:
        path: the JSON file, or JSONL with one conversation a line.
        images: folder that the images' paths start from; None takes the file's.

    Raises:
        ValueError: if the file is not JSON, is empty, or a record is not a conversation; names it.
    """
    path = pathlib.Path(path)
    folder = path.parent if images is None else pathlib.Path(images)
    records = _records(path)
    examples = [_example(record, n, path, folder) for n, record in enumerate(records)]
    return MemorySource(examples, name=str(path))


def _records(path: pathlib.Path) -> list[Any]:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        records = json.loads(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of conversations, got {type(records).__name__}")
    return records


def _example(record: Any, number: int, path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    name = record.get("id", number) if isinstance(record, Mapping) else number
    try:
        conversation = [
            {"role": ROLES[turn["from"]], "content": str(turn["value"])} for turn in turns
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'{path}: record {name!r} must have "conversations" with "from" (one of '
            f'{sorted(ROLES)}) and "value", got {str(record)[:200]}'
        ) from error
    given = record.get("image") or []
    files = [given] if isinstance(given, str) else list(given)
    markers = sum(turn["content"].count(IMAGE_MARKER) for turn in conversation)
    if markers != len(files):
        raise ValueError(
            f"{path}: record {name!r} must have one {IMAGE_MARKER} per image, got {markers} and "
            f"{len(files)}"
        )
    return {
        "images": [folder / file for file in files],
        "conversation": conversation,
        "meta": {"id": name},
    }
