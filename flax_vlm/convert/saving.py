# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint folder that transformers loads, from any model that a family's format holds.

That it does is proved before anything is written: config.json, read back by the same family, must
give the model again, field by field.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from flax_vlm.build import build, lookup
from flax_vlm.convert import FAMILIES
from flax_vlm.convert.family import Family
from flax_vlm.convert.loading import Params
from flax_vlm.convert.rules import Entry, Part, Shape, expand
from flax_vlm.convert.safetensors_writer import write_json, write_tensors
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes
from flax_vlm.nn.patches import as_pair
from flax_vlm.trees import named_leaves

# Fields of a model that no checkpoint holds: they change no output of a trained model.
_FREE_FIELDS = {"parent", "name", "dtype", "remat", "unroll", "dropout", "patch_dropout"}
_FREE_FIELDS |= {"attention_implementation", "init_scheme", "init_scale", "init_bias"}
_FREE_FIELDS |= {"drop_remainder"}  # the sizes of image and patch say whether there is one
_SIZES = {"image_size", "patch_size"}


def model_differences(first: nn.Module, second: nn.Module, prefix: str = "") -> list[str]:
    """Returns one line per field in which two models differ and that a checkpoint must hold."""
    if type(first) is not type(second):
        return [f"{prefix or 'model'}: {type(first).__name__}, {type(second).__name__}"]
    lines = []
    for field in dataclasses.fields(first):
        if field.name in _FREE_FIELDS:
            continue
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, nn.Module) and isinstance(b, nn.Module):
            lines += model_differences(a, b, f"{prefix}{field.name}.")
            continue
        if field.name in _SIZES:
            a, b = as_pair(a), as_pair(b)
        lines += [f"{prefix}{field.name}: {a!r}, {b!r}"] if a != b else []
    return lines


def find_family(model: nn.Module, shapes: Any) -> tuple[str, dict[str, Any]]:
    """Returns (model_type, config.json) of the family whose format holds a model.

    A config that, read back, gives the same model is the proof.

    Args:
        model: one of MODELS.
        shapes: its parameters.

    Raises:
        ValueError: if there is none; says for each family what it lacks.
    """
    leaves = {path: tuple(leaf.shape) for path, leaf in named_leaves(shapes).items()}
    failures = []
    families = {key: f for key, f in FAMILIES.items() if type(model) in f.models}
    for model_type, family in families.items():
        try:
            config = write_config(model_type, family, model, leaves)
        except ValueError as error:
            failures.append(f"{model_type}: {error}")
            continue
        return model_type, config
    raise ValueError(
        f"no supported format holds this {type(model).__name__}:\n  " + "\n  ".join(failures)
    )


def find_format(model: nn.Module, model_type: str | None) -> tuple[str, dict[str, Any]]:
    """Returns (model_type, config.json) in which a model is saved.

    Args:
        model: one of MODELS.
        model_type: a key of FAMILIES; None finds it.

    Raises:
        ValueError: if that format, or any, does not hold the model.
    """
    shapes = parameter_shapes(model)
    if model_type is None:
        return find_family(model, shapes)
    leaves = {path: tuple(leaf.shape) for path, leaf in named_leaves(shapes).items()}
    family = lookup(FAMILIES, model_type, "model_type")
    return model_type, write_config(model_type, family, model, leaves)


def write_config(
    model_type: str, family: Family, model: nn.Module, leaves: Mapping[str, Shape]
) -> dict[str, Any]:
    """Returns config.json of a model in a family's format.

    Raises:
        ValueError: if read back it would give another model; names the fields.
    """
    if type(model) not in family.models:
        raise ValueError(f"it is for {[kind.__name__ for kind in family.models]}")
    config = {**family.write(model), "model_type": model_type}
    entries = expand(family.rules(model), leaves)
    again = build(MODELS, family.read(config, {e.tensor: e.shape for e in entries}), "model")
    lines = model_differences(model, again)
    if lines:
        raise ValueError("it differs from what its config.json would say: " + "; ".join(lines))
    return config


def save_pretrained(
    folder: str | os.PathLike,
    spec: Mapping[str, Any],
    params: Params,
    *,
    model_type: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    extra_config: Mapping[str, Any] | None = None,
) -> str:
    """Writes config.json and safetensors that transformers loads, and returns the model_type.

    Args:
        folder: is made if it is not there; weights of an earlier save in it are replaced.
        spec: config of a model of MODELS, as in a run's `config.model`.
        params: its parameters, on any mesh of this process.
        model_type: a key of FAMILIES; None finds it.
        dtype: of the stored values.
        max_shard_bytes: larger checkpoints are cut into shards with an index.
        extra_config: keys of config.json besides, such as id2label.

    Raises:
        ValueError: if no supported format holds the model, or the parameters are not the model's.
    """
    model = build(MODELS, spec, "model")
    shapes = parameter_shapes(model)
    _check_params(params, shapes)
    leaves = {path: tuple(leaf.shape) for path, leaf in named_leaves(shapes).items()}
    model_type, config = find_format(model, model_type)
    family = FAMILIES[model_type]
    entries = expand(family.rules(model), leaves)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = _Tensors(entries, named_leaves(params), np.dtype(dtype))
    write_tensors(
        folder,
        {entry.tensor: entry.shape for entry in entries},
        np.dtype(dtype),
        source.value,
        max_shard_bytes,
        family.weights_file,
    )
    write_json(folder / family.config_file, {**config, "dtype": dtype, **(extra_config or {})})
    return model_type


def _check_params(params: Params, shapes: Any) -> None:
    expected = {p: tuple(x.shape) for p, x in named_leaves(shapes).items()}
    found = {p: tuple(x.shape) for p, x in named_leaves(params).items()}
    wrong = sorted(p for p in expected.keys() | found.keys() if expected.get(p) != found.get(p))
    if wrong:
        lines = [f"{p}: {found.get(p)}, the model has {expected.get(p)}" for p in wrong]
        raise ValueError("the parameters must be those of the model:\n  " + "\n  ".join(lines))


class _Tensors:
    """Makes tensors from leaves; a leaf is on the host from its first layer to its last."""

    def __init__(self, entries: Sequence[Entry], leaves: Mapping[str, Any], dtype: np.dtype):
        self.entries = {entry.tensor: entry for entry in entries}
        self.leaves = leaves
        self.dtype = dtype
        self.on_host: dict[str, np.ndarray] = {}
        self.left: dict[str, int] = {}
        for entry in entries:
            for part in entry.parts:
                self.left[part.leaf] = self.left.get(part.leaf, 0) + 1

    def value(self, name: str) -> np.ndarray:
        """Returns a tensor; to be asked once for each, in the order of the entries."""
        entry = self.entries[name]
        pieces = [entry.layout.to_tensor(self._part(part)) for part in entry.parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _part(self, part: Part) -> np.ndarray:
        if part.leaf not in self.on_host:
            self.on_host[part.leaf] = np.asarray(self.leaves[part.leaf])
        self.left[part.leaf] -= 1
        leaf = self.on_host[part.leaf] if self.left[part.leaf] else self.on_host.pop(part.leaf)
        return (leaf if part.layer is None else leaf[part.layer]).astype(self.dtype)
