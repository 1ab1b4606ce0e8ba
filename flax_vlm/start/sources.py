# SPDX-License-Identifier: Apache-2.0
"""Where parameters come from: what config.init_from may name."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import linen as nn
from jax.sharding import NamedSharding

from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.convert.loading import load_pretrained, read_spec
from flax_vlm.models import MODELS
from flax_vlm.models.parameter_shapes import parameter_shapes as model_shapes
from flax_vlm.objectives.lora import ADAPTERS, merge
from flax_vlm.snapshots import find_folder
from flax_vlm.training.checkpoints import load_params, parameter_shapes
from flax_vlm.training.sharding import replicated
from flax_vlm.training.workdir import is_workdir, load_config

Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """Parameters that lie somewhere.

    Attributes:
        name: for messages.
        model: the module that they belong to.
        shapes: {path: shape}.
    """

    name: str
    model: nn.Module
    shapes: Shapes

    def load(self, places: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
        """Returns {path: parameter} of the paths that are asked for, each where it belongs."""


@dataclasses.dataclass(frozen=True)
class RunSource:
    """The last checkpoint of a workdir of train.py: the moving average where the run kept one.

    Attributes:
        folder: the workdir.
    """

    folder: pathlib.Path

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return load_config(self.folder)

    @functools.cached_property
    def _stored(self) -> Shapes:
        return parameter_shapes(self.folder / "checkpoints")

    @property
    def model(self) -> nn.Module:
        """The model of the run."""
        return build(MODELS, self._config["model"], "model")

    @property
    def shapes(self) -> Shapes:
        """Of the parameters without adapters: they are merged."""
        return {p: s for p, s in self._stored.items() if not p.startswith(f"{ADAPTERS}/")}

    def load(self, places: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
        """Returns {path: parameter}; only what is asked for is read."""
        whole = replicated(next(iter(places.values())).mesh)
        adapters = {f"{ADAPTERS}/{path}/{side}": whole for path in places for side in "ab"}
        stored = {path: s for path, s in (adapters | dict(places)).items() if path in self._stored}
        directory = self.folder / "checkpoints"
        params, _, _ = load_params(directory, trees.unflatten(stored), partial=True)
        if ADAPTERS in params:
            merged = functools.partial(merge, alpha=self._config["lora"]["alpha"])
            params = jax.jit(merged, out_shardings=trees.unflatten(places))(params)
        return trees.named_leaves(params)


@dataclasses.dataclass(frozen=True)
class PretrainedSource:
    """A checkpoint folder in the Hugging Face format.

    Attributes:
        folder: config.json and safetensors.
    """

    folder: pathlib.Path

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model that its config.json describes."""
        return build(MODELS, read_spec(self.folder)[1], "model")

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Of the parameters of the model; loading checks that the files hold them."""
        found = trees.named_leaves(model_shapes(self.model))
        return {path: tuple(leaf.shape) for path, leaf in found.items()}

    def load(self, places: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
        """Returns {path: parameter}; only what is asked for is read, leaf by leaf."""

        def onto(shapes: Any) -> Any:
            return trees.map_with_path(lambda path, _: places.get(path), shapes)

        return trees.named_leaves(load_pretrained(self.folder, shardings=onto).params)


def open_source(path: str) -> Source:
    """Returns the parameters of a workdir of train.py, or of a folder in the Hugging Face format.

    Args:
        path: a folder, or a hub id, which is downloaded.

    Raises:
        ValueError: if it is neither; if the hub does not give it.
    """
    folder = find_folder(path)
    return RunSource(folder) if is_workdir(folder) else PretrainedSource(folder)
