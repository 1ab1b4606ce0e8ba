# SPDX-License-Identifier: Apache-2.0
"""Writes tensors in the safetensors format, one at a time: one file, or shards and an index.

Nothing is written outside the folder: file names are fixed here. Every file is written under a
temporary name and renamed when it is whole; weights of an earlier save in the folder are removed
last, so that what is on the disk is always one whole checkpoint or the one before it.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flax_vlm.convert.rules import Shape
from flax_vlm.convert.safetensors_files import DTYPES, INDEX, WEIGHTS

SHARD = "model-{:05d}-of-{:05d}.safetensors"
_OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_tensors(
    folder: pathlib.Path,
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
    values: Callable[[str], np.ndarray],
    max_shard_bytes: int,
    single: str = WEIGHTS[0],
) -> list[str]:
    """Writes tensors and returns the names of the files.

    Args:
        folder: exists.
        shapes: of every tensor, in the order in which they are asked for.
        dtype: of every tensor; one of DTYPES.
        values: returns a tensor by its name; called once for each.
        max_shard_bytes: more than that is cut into shards; a single larger tensor has its own.
        single: name of the file where there is one.

    Raises:
        ValueError: if safetensors has no such dtype.
    """
    shards = _cut(shapes, dtype, max_shard_bytes)
    names = [single]
    if len(shards) > 1:
        names = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        _write_file(folder / name, {t: shapes[t] for t in tensors}, dtype, values)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        where = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        names = [*names, INDEX]
    for path in folder.iterdir():
        if _OWN_FILES.fullmatch(path.name) and path.name not in names:
            path.unlink()
    return names


def _cut(shapes: Mapping[str, Shape], dtype: np.dtype, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def _write_file(
    path: pathlib.Path,
    shapes: Mapping[str, Shape],
    dtype: np.dtype,
    values: Callable[[str], np.ndarray],
) -> None:
    code = next((code for code, known in DTYPES.items() if known == dtype), None)
    if code is None:
        raise ValueError(f"safetensors has no dtype {dtype}, choose one of {list(DTYPES)}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    with open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = np.ascontiguousarray(values(name), dtype).reshape(shape)
            file.write(memoryview(tensor.reshape(-1).view(np.uint8)))
    os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file, whole or not at all; a link of that name is replaced, not followed."""
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
