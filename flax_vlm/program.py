# SPDX-License-Identifier: Apache-2.0
"""What is compiled: a config becomes an objective, an optimizer, a mesh and a sharded train step.

    config (+ devices) -> Program: shapes and shardings of the state, init_state(), train_step()

No data and no evaluators, so that tools/aot_compile and tools/bench compile exactly the step that
train.py runs, on devices that need not be here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from flax_vlm import trees
from flax_vlm.nn.patches import as_pair
from flax_vlm.objectives import build_objective
from flax_vlm.objectives.base import Objective
from flax_vlm.objectives.lora import frozen_patterns, split_adapters
from flax_vlm.scaling.flops import PARTS, train_flops_per_example
from flax_vlm.start.plan import Start
from flax_vlm.start.sources import open_source
from flax_vlm.training import sharding
from flax_vlm.training.optimizers import Optimizer, build_optimizer
from flax_vlm.training.state import (
    TrainState,
    abstract_state,
    make_init,
    state_shardings,
    with_params,
)
from flax_vlm.training.step import make_train_step

Config = Mapping[str, Any]


def plain(config: Config) -> dict[str, Any]:
    """Returns a config as nested dicts of JSON values: what is saved and what is compared."""
    as_dict = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(as_dict))


def example_batch(config: Config, size: int = 1) -> dict[str, np.ndarray]:
    """Returns a batch of zeros with the shapes of the config."""
    spec = config["data"]
    image, length = (*as_pair(spec["image_size"]), 3), spec["text"]["length"]
    batch = {
        "text": np.zeros((size, length), np.int32),
        "text_mask": np.zeros((size, length), bool),
        "example_mask": np.ones(size, bool),
    }
    if spec["rows"] == "packed":
        batch |= {key: np.zeros((size, length), np.int32) for key in ("segments", "positions")}
    if spec["rows"] in ("conversations", "packed"):
        batch["loss_mask"] = np.zeros((size, length), bool)
        if not spec["chat"]["blind"]:
            images = (size, spec["chat"]["num_images"], *image)
            batch["images"] = np.zeros(images, np.uint8)
        return batch
    return batch | {
        "image": np.zeros((size, *image), np.uint8),
        "text_id": np.zeros(size, np.int32),
        "label": np.zeros(size, np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled part of a config.

    Attributes:
        config: plain nested dicts.
        objective: what is trained.
        optimizer: how.
        mesh: over which devices.
        shapes: TrainState of ShapeDtypeStructs.
        shardings: TrainState of NamedShardings.
    """

    config: dict[str, Any]
    objective: Objective
    optimizer: Optimizer
    mesh: jax.sharding.Mesh
    shapes: TrainState
    shardings: TrainState

    @classmethod
    def from_config(cls, config: Config, devices: Sequence[jax.Device] | None = None) -> Self:
        """Returns the program of a config; allocates nothing and reads no data.

        Args:
            config: nested mapping (a ConfigDict or the JSON of a workdir); see configs/defaults.py.
            devices: None takes all that are here; those of a topology can only be compiled for.

        Raises:
            ValueError: for an unknown name or key, a mesh that does not fit the devices, a tensor
                that a rule cannot split, or a rule that matches no parameter.
        """
        config = plain(config)
        objective = build_objective(
            config["model"],
            config["objective"],
            config["lora"],
            micro_batches=config["micro_batches"],
        )
        mesh_sizes = {axis: config["mesh"][axis] for axis in sharding.AXES}
        mesh = sharding.make_mesh(**mesh_sizes, devices=devices)
        batch = example_batch(config)
        params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
        paths = list(trees.named_leaves(params))
        frozen = (*config["optimizer"].get("freeze", ()), *frozen_patterns(config["lora"]))
        spec = {**config["optimizer"], "freeze": frozen}
        optimizer = build_optimizer(spec, config["steps"], paths)
        init = make_init(objective, optimizer, ema=config["ema_decay"] > 0)
        shapes = jax.eval_shape(init, jax.random.key(0), batch)
        rules = tuple((pattern, tuple(axes)) for pattern, axes in config["mesh"]["rules"])
        return cls(
            config=config,
            objective=objective,
            optimizer=optimizer,
            mesh=mesh,
            shapes=shapes,
            shardings=state_shardings(shapes, mesh, rules),
        )

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Rows of a batch over the mesh."""
        return sharding.batch_sharding(self.mesh)

    @property
    def batch_size(self) -> int:
        """The global batch size.

        Raises:
            ValueError: if the devices cannot share each micro-batch evenly.
        """
        size = self.config["batch_size"]
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config["micro_batches"]
        # a micro-batch of fewer rows than devices would be gathered on all of them
        if size % parts:
            raise ValueError(
                f"batch_size must be a multiple of mesh.data x mesh.fsdp x micro_batches, "
                f"got {size} and {parts}"
            )
        return size

    def init_state(self) -> TrainState:
        """Returns a random state, born sharded: never whole on one device. What config.init_from
        names takes the place of its parameters.

        Raises:
            ValueError: if that does not fit the model; lists all that does not.
        """
        start = self._start()
        init = make_init(self.objective, self.optimizer, ema=self.config["ema_decay"] > 0)
        batch = example_batch(self.config)
        # the batch is a constant of the program: only its shapes matter
        born = jax.jit(lambda key: init(key, batch), out_shardings=self.shardings)
        state = born(jax.random.key(self.config["seed"]))
        if start is None:
            return state
        loaded = start.load(trees.named_leaves(self.shardings.params))
        params = trees.unflatten(trees.named_leaves(state.params) | loaded)
        return jax.jit(with_params, out_shardings=self.shardings)(state, params)

    def _start(self) -> Start | None:
        if not self.config["init_from"]:
            return None
        shapes = {p: tuple(x.shape) for p, x in trees.named_leaves(self.shapes.params).items()}
        source = open_source(self.config["init_from"])
        return Start.plan(source, self.objective.model, shapes, **self.config["init"])

    def train_step(self) -> Callable[..., Any]:
        """Returns the jitted step (state, batch) -> (state, metrics); the state is donated."""
        step = make_train_step(
            self.objective,
            self.optimizer,
            seed=self.config["seed"],
            micro_batches=self.config["micro_batches"] if self.objective.additive else 1,
            ema_decay=self.config["ema_decay"],
        )
        return jax.jit(
            step,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, None),
            donate_argnums=0,
        )

    def lower_train_step(self) -> jax.stages.Lowered:
        """Returns the train step lowered for the mesh, from shapes alone."""
        batch = {
            key: jax.ShapeDtypeStruct(
                (self.batch_size, *x.shape[1:]), x.dtype, sharding=self.batch_sharding
            )
            for key, x in example_batch(self.config).items()
        }
        with jax.set_mesh(self.mesh):
            return self.train_step().lower(abstract_state(self.shapes, self.shardings), batch)

    def flops_per_example(self) -> float:
        """Returns the model FLOPs of one training example (scaling/flops.py states what counts).

        A tower counts as frozen if no parameter of it is trained.
        """
        spec = self.config["data"]
        return train_flops_per_example(
            self.objective.model,
            as_pair(spec["image_size"]),
            spec["text"]["length"],
            frozen=self._frozen_parts(),
            images=spec["chat"]["num_images"],
        )

    def _frozen_parts(self) -> list[str]:
        """Returns the encoders of which nothing is trained, no adapter either."""
        trained, _ = self.optimizer.split(self.shapes.params)
        base, adapters = split_adapters(trained)
        return [p for p in PARTS if p in self.shapes.params and p not in base | adapters]
