# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a folder in the safetensors format, one at a time, without torch.

A file is 8 bytes (the header's length), a JSON header {name: {dtype, shape, data_offsets}} and the
data. It is read here rather than by the `safetensors` package, whose NumPy interface has no
bfloat16 and no reading into a given buffer. The rules of the format that keep a file from lying
about itself are all checked: the data has no holes, no overlaps and no rest.

Source: the format's specification, github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flax_vlm.convert.rules import Shape

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 100_000_000  # bytes; the limit of the format
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        path: the file.
        dtype: of the stored values.
        shape: of the tensor.
        offset: of its first byte in the file.
        by_column: the first axis varies fastest, as Fortran has it; only in .npz files.
    """

    path: pathlib.Path
    dtype: np.dtype
    shape: Shape
    offset: int
    by_column: bool = False


def read_tensor(
    tensor: StoredTensor, rows: tuple[int, int] | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Returns the values of a tensor, in the stored dtype.

    Args:
        tensor: one of `list_tensors`.
        rows: (start, stop) on the first axis; None reads all.
        out: where to read to, C-contiguous and of the stored dtype and shape; None makes an array.

    Raises:
        ValueError: if the file has been shortened since it was listed.
    """
    if tensor.by_column:
        turned = dataclasses.replace(tensor, shape=tensor.shape[::-1], by_column=False)
        value = read_tensor(turned).transpose()[slice(*(rows or (None,)))]
        if out is None:
            return value
        out[...] = value
        return out
    start, stop = rows if rows is not None else (0, tensor.shape[0] if tensor.shape else 1)
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    out = np.empty(shape, tensor.dtype) if out is None else out
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.offset + start * row_bytes)
        view = memoryview(out.reshape(-1).view(np.uint8))
        while view:
            count = file.readinto(view)
            if not count:
                raise ValueError(f"{tensor.path} ends inside a tensor: it was cut while being read")
            view = view[count:]
    return out


def list_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a folder: of its one file, or of the shards that its index names.

    Only headers are read.

    Raises:
        ValueError: if there are no safetensors weights (pickles are refused, with the command that
            converts them), a file is damaged, or the index and the shards disagree.
    """
    single = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if single is not None:
        return read_header(single)
    if (folder / INDEX).is_file():
        return _list_sharded(folder)
    raise ValueError(_no_weights(folder))


def _no_weights(folder: pathlib.Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        return f"{folder} must hold {WEIGHTS[0]} or {INDEX}, found neither"
    return (
        f"{folder} holds its weights only as pickles, {pickles}: loading one can run any code, so "
        "flax_vlm does not. If you trust their author, convert them where torch is installed:\n"
        '  python -c "from transformers import AutoModel as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
    )


def _list_sharded(folder: pathlib.Path) -> dict[str, StoredTensor]:
    index = read_json(folder / INDEX)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} must have a weight_map, got keys {sorted(index)}")
    shards = sorted({str(shard) for shard in names.values()})
    # the files of a hub cache are links out of the folder: it is the name that must be plain
    strange = [s for s in shards if pathlib.PurePath(s).name != s or "\\" in s or s in (".", "..")]
    if strange:
        raise ValueError(
            f"an index must name files of its own folder, {folder / INDEX} names {strange}"
        )
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise ValueError(
            f"{folder / INDEX} names shards that are not there: {absent}; download them again"
        )
    found = {shard: read_header(folder / shard) for shard in shards}
    held = {(name, shard) for shard, tensors in found.items() for name in tensors}
    wrong = sorted(held ^ set(names.items()))
    if wrong:
        raise ValueError(
            f"{folder / INDEX} and its shards must agree on where each tensor is, "
            f"they differ in {wrong}"
        )
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: if the file is absent, is not JSON, or holds no object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} must hold {path.name}, found none")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one safetensors file.

    Raises:
        ValueError: if the file breaks a rule of the format: it is truncated or was tampered with.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
        if length > min(MAX_HEADER, size - 8):
            raise _damaged(path, f"its header of {length} bytes does not fit into {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        start, stop = _offsets(path, name, entry)
        tensor = _stored(path, name, entry, 8 + length + start)
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        if start != end or stop - start != nbytes:
            raise _damaged(
                path,
                f"{name} of {nbytes} bytes is said to lie at {start} to {stop}, expected at {end}",
            )
        tensors[name], end = tensor, stop
    if 8 + length + end != size:
        raise _damaged(path, f"it should have {8 + length + end} bytes and has {size}")
    return tensors


def _damaged(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(f"{path} is no whole safetensors file: {what}; download it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _offsets(path: pathlib.Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name} has the offsets {offsets}")
    return offsets[0], offsets[1]


def _stored(path: pathlib.Path, name: str, entry: Mapping[str, Any], offset: int) -> StoredTensor:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {dtype}, known are {sorted(DTYPES)}")
    if not _are_sizes(shape):
        raise _damaged(path, f"{name} has the shape {shape}")
    return StoredTensor(path, DTYPES[dtype], tuple(shape), offset)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
