# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint folder into (config of a model, parameters), without torch.

Loading goes leaf by leaf: the host holds one leaf at a time (for scanned blocks all
layers of one kernel), filled layer by layer from the file and handed to the devices that own its
parts. Nothing from a checkpoint is executed.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_vlm.build import build
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.big_vision import find_npz
from flax_vlm.convert.rules import (
    Entry,
    Ignored,
    Part,
    Shape,
    canonical_names,
    check_tensors,
    expand,
)
from flax_vlm.convert.safetensors_files import StoredTensor, read_json, read_tensor
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.trees import named_leaves, unflatten

Params = dict[str, Any]
CONFIG = "config.json"
READERS = 4  # threads that read layers of one leaf
BLOCK = 64  # rows of a tensor that are transposed at once: they stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint in our terms.

    Attributes:
        model_type: key of FAMILIES.
        spec: config of a model of MODELS, as in a run's `config.model`.
        params: plain nested dict.
    """

    model_type: str
    spec: dict[str, Any]
    params: Params


def read_spec(folder: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    """Returns (model_type, config of a model of MODELS) of a folder; reads no weights.

    Raises:
        ValueError: if the folder is not a checkpoint of a supported family.
    """
    model_type, spec, _ = _inspect(pathlib.Path(folder))
    return model_type, spec


def _inspect(folder: pathlib.Path) -> tuple[str, dict[str, Any], dict[str, StoredTensor]]:
    if not folder.is_dir() and find_npz(folder) is None:
        raise ValueError(f"a checkpoint is a folder or an .npz file, {folder} is neither")
    model_type, config = read_config(folder)
    if model_type not in FAMILIES:
        raise ValueError(
            f"{folder} is a checkpoint of the family {model_type!r}, "
            f"supported are {sorted(FAMILIES)}"
        )
    stored = FAMILIES[model_type].tensors(folder)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return model_type, FAMILIES[model_type].read(config, shapes), stored


def read_config(folder: pathlib.Path) -> tuple[str | None, dict[str, Any]]:
    """Returns (key of FAMILIES, or what stands in its place, the config) of a folder or file.

    Raises:
        ValueError: if there is no config.
    """
    foreign = FAMILIES["open_clip"].config_file
    if not (folder / CONFIG).is_file() and (folder / foreign).is_file():
        return "open_clip", read_json(folder / foreign)
    if not (folder / CONFIG).is_file() and find_npz(folder) is not None:
        return "big_vision", {}
    config = read_json(folder / CONFIG)
    return config.get("model_type", "timm" if "architecture" in config else None), config


def load_pretrained(
    folder: str | os.PathLike,
    *,
    shardings: Callable[[Any], Any] | None = None,
    dtype: str = "float32",
) -> Pretrained:
    """Returns the model and the parameters of a checkpoint folder.

    Args:
        folder: config.json and safetensors, or an .npz file of big_vision.
        shardings: from the tree of parameter shapes to the tree of their shardings, such as
            `lambda shapes: parameter_shardings(shapes, mesh)`; leaves whose sharding is None are
            not read. None puts all on the first device.
        dtype: of the parameters, whatever the file stores; scalars (logit scale and bias) are
            float32.

    Raises:
        ValueError: if the family is unknown, weights are pickles or damaged, or tensors and config
            do not fit together (one message lists all that does not).
    """
    folder = pathlib.Path(folder)
    model_type, spec, stored = _inspect(folder)
    family = FAMILIES[model_type]
    model = build(MODELS, spec, "model")
    shapes = parameter_shapes(model)
    flat = {path: tuple(leaf.shape) for path, leaf in named_leaves(shapes).items()}
    entries = expand(family.rules(model), flat)
    names = canonical_names(stored, entries, family.renames)
    tensors = {name: stored[original] for name, original in names.items()}
    where = f"{folder} ({model_type})"
    check_tensors(entries, {n: t.shape for n, t in tensors.items()}, family.ignored, where)
    spare = tensors.keys() - {entry.tensor for entry in entries}
    check_tied(tensors, [rule for rule in family.ignored if rule.pattern in spare])
    check_floats({entry.tensor: tensors[entry.tensor].dtype for entry in entries}, where)
    parts: dict[str, list[tuple[Entry, Part]]] = {path: [] for path in flat}
    for entry in entries:
        for part in entry.parts:
            parts[part.leaf].append((entry, part))
    target = {} if shardings is None else named_leaves(shardings(shapes))
    with ThreadPoolExecutor(READERS) as pool:

        def load(path: str, leaf: Any) -> jax.Array:
            # the logarithm of the scale loses 3 % of the scale in bfloat16
            value = empty(leaf.shape, dtype if leaf.ndim else "float32")
            list(pool.map(lambda job: _read_part(tensors, value, *job), parts[path]))
            if shardings is None:
                return jax.device_put(value)
            return jax.make_array_from_callback(value.shape, target[path], value.__getitem__)

        leaves = named_leaves(shapes)
        wanted = leaves if shardings is None else target
        params = unflatten({path: load(path, leaves[path]) for path in wanted})
        return Pretrained(model_type, spec, params)


def _read_part(
    tensors: Mapping[str, StoredTensor], value: np.ndarray, entry: Entry, part: Part
) -> None:
    stored = tensors[entry.tensor]
    target = value if part.layer is None else value[part.layer]
    if entry.layout.axes is None and stored.dtype == value.dtype:
        read_tensor(stored, part.rows, out=target)
        return
    first = part.rows[0] if part.rows else 0
    for index, rows in entry.layout.row_blocks(part.shape, BLOCK):
        block = target[index]
        whole = None if rows is None else (first + rows[0], first + rows[1])
        # converted first: NumPy converts bfloat16 three times slower where it transposes too
        tensor = read_tensor(stored, whole or part.rows).astype(value.dtype, copy=False)
        block[...] = entry.layout.to_leaf(tensor, block.shape)


def empty(shape: Shape, dtype: Any) -> np.ndarray:
    """Returns an array of fresh pages, which JAX's CPU backend takes as it is, without a copy.

    `np.empty` would ask Linux for huge pages: where memory is fragmented by files, as it is after
    reading large ones, the system compacts it first, which took longer than the loading.
    """
    count = math.prod(shape)
    pages = mmap.mmap(-1, count * np.dtype(dtype).itemsize, access=mmap.ACCESS_COPY)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def check_tied(tensors: Mapping[str, StoredTensor], ignored: Sequence[Ignored]) -> None:
    """Raises ValueError if a tensor that is tied to another differs from it."""
    for rule in ignored:
        if rule.same_as is None or rule.pattern not in tensors or rule.same_as not in tensors:
            continue
        a, b = (read_tensor(tensors[name]) for name in (rule.pattern, rule.same_as))
        if a.tobytes() != b.tobytes():
            raise ValueError(
                f"{rule.pattern} must equal {rule.same_as} ({rule.reason}), but they differ"
            )


def check_floats(dtypes: Mapping[str, np.dtype], where: str) -> None:
    """Raises ValueError if parameters are stored as integers: they are quantised, or no weights."""
    bad = {
        name: str(dtype) for name, dtype in dtypes.items() if not jnp.issubdtype(dtype, np.floating)
    }
    if bad:
        raise ValueError(
            f"the weights of {where} must be floats, got {bad}; quantised checkpoints are not read"
        )
