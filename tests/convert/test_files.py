# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: whole files are read bit by bit, damaged ones are refused."""

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest

from flax_vlm.convert.safetensors_files import INDEX, list_tensors, read_header, read_tensor
from flax_vlm.convert.safetensors_writer import write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.standard_normal((3, 4)).astype(np.float32),
    "b.scalar": np.float32(2.5).reshape(()),
    "c": RNG.standard_normal((5, 2, 2)).astype(np.float32),
}


def write(folder, dtype="float32", limit=10**9, tensors=TENSORS):
    folder.mkdir(exist_ok=True)
    shapes = {name: t.shape for name, t in tensors.items()}
    return write_tensors(folder, shapes, np.dtype(dtype), tensors.__getitem__, limit)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("limit", [10**9, 60])
def test_what_is_written_is_read(dtype, limit, tmp_path):
    names = write(tmp_path, dtype, limit)
    assert (INDEX in names) == (limit == 60)
    stored = list_tensors(tmp_path)
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert np.array_equal(read_tensor(stored[name]), tensor.astype(dtype))
    assert np.array_equal(read_tensor(stored["c"], (1, 4)), TENSORS["c"][1:4].astype(dtype))


def test_a_later_save_replaces_the_shards_of_an_earlier_one(tmp_path):
    write(tmp_path, limit=60)
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]


def rewrite(path, change):
    """Changes the header of a file as `change(header)` says, and leaves the data."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def offsets(name, value):
    return lambda h: h[name].__setitem__("data_offsets", value)


DAMAGE = {
    "cut at the end": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:40]),
    "empty": lambda p: p.write_bytes(b""),
    "bytes at the end": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "header longer than the file": lambda p: p.write_bytes(
        struct.pack("<Q", 10**12) + p.read_bytes()[8:]
    ),
    "header no JSON": lambda p: p.write_bytes(p.read_bytes().replace(b'{"', b'("', 1)),
    "header a list": lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "overlap": lambda p: rewrite(p, offsets("c", [0, 80])),
    "hole": lambda p: rewrite(p, offsets("c", [60, 140])),
    "negative": lambda p: rewrite(p, offsets("a", [-48, 0])),
    "offsets missing": lambda p: rewrite(p, lambda h: h["a"].pop("data_offsets") and None),
    "shape larger": lambda p: rewrite(p, lambda h: h["a"].__setitem__("shape", [4, 4])),
    "shape of floats": lambda p: rewrite(p, lambda h: h["a"].__setitem__("shape", [3.0, 4])),
    "name twice": lambda p: p.write_bytes(
        p.read_bytes().replace(b'"c":', b'"a":')  # of the same length
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_file_is_refused(name, tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    read_header(path)
    DAMAGE[name](path)
    with pytest.raises(ValueError, match="model.safetensors is no whole safetensors file"):
        list_tensors(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
    write(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda h: h["a"].__setitem__("dtype", "F8_E4M3"))
    with pytest.raises(ValueError, match="a has dtype F8_E4M3, known are"):
        list_tensors(tmp_path)


def change_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path):
    shard = write(tmp_path, limit=60)[0]
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=f"names shards that are not there: \\['{shard}'\\]"):
        list_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x", "sub/x.safetensors", ".."])
def test_an_index_that_leaves_the_folder_is_refused(name, tmp_path):
    write(tmp_path / "in", limit=60)
    write(tmp_path)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    change_index(tmp_path / "in", lambda where: where.update(a=name))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        list_tensors(tmp_path / "in")


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    write(tmp_path, limit=60)
    change_index(tmp_path, lambda where: where.update(a=where["c"]))
    with pytest.raises(ValueError, match="must agree on where each tensor is"):
        list_tensors(tmp_path)
    change_index(tmp_path, lambda where: where.clear())
    with pytest.raises(ValueError, match="must have a weight_map"):
        list_tensors(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError) as caught:
        list_tensors(tmp_path)
    assert "can run any code" in str(caught.value)
    assert "from_pretrained(" in str(caught.value) and "save_pretrained(" in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold model.safetensors or .*found neither"):
        list_tensors(tmp_path)
