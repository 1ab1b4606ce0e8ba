# SPDX-License-Identifier: Apache-2.0
"""Lists the arrays of an .npz file without reading them: where each lies, as in safetensors_files.

A file of `np.savez` is a zip whose members are stored as they are, so an array can be read from its
offset, and rows of it alone. Arrays of Python objects are pickles and are refused.
"""

from __future__ import annotations

import math
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np

from flax_vlm.convert.safetensors_files import StoredTensor

_LOCAL_HEADER = 30  # bytes before the name; the lengths of name and extra field are the last four
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def list_arrays(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns every array of an .npz file by its name.

    Raises:
        ValueError: if the file is damaged, compressed, or holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            members = archive.infolist()
            return {m.filename.removesuffix(".npy"): _array(path, archive, raw, m) for m in members}
    except (zipfile.BadZipFile, struct.error, EOFError) as error:
        raise ValueError(f"{path} is no whole .npz file: {error}; download it again") from error


def _array(
    path: pathlib.Path, archive: zipfile.ZipFile, raw, member: zipfile.ZipInfo
) -> StoredTensor:
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: {name} is compressed; write the file with np.savez")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"{path}: {name} has version {version}, known are {list(_READERS)}")
        shape, fortran, dtype = _READERS[version](file)
        header = file.tell()
    if dtype.hasobject:
        raise ValueError(
            f"{path}: {name} holds Python objects: loading them can run any code, so flax_vlm "
            "does not"
        )
    if dtype == np.dtype("V2"):  # what NumPy makes of bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    raw.seek(member.header_offset)
    lengths = struct.unpack("<HH", raw.read(_LOCAL_HEADER)[-4:])
    start = member.header_offset + _LOCAL_HEADER + sum(lengths)
    end = header + math.prod(shape) * dtype.itemsize
    if member.file_size != end or start + end > path.stat().st_size:
        raise ValueError(f"{path} is no whole .npz file: {name} should have {end} bytes")
    return StoredTensor(path, dtype, tuple(shape), start + header, fortran and len(shape) > 1)
