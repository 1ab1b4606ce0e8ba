# SPDX-License-Identifier: Apache-2.0
"""TrainState: all that changes during training, born sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_vlm import trees
from flax_vlm.objectives.base import Batch, Extras, Objective, Params
from flax_vlm.training import sharding
from flax_vlm.training.optimizers import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training. Random keys and the data position are derived from `step`.

    Attributes:
        step: [] int32, number of finished optimizer steps.
        params: nested dict, float32: trained and frozen parameters together.
        opt_state: optax state of the trained parameters alone; frozen ones have no slots.
        extras: what gradients do not train (teacher, codebook counts, queues); changed by
            `Objective.after_update`.
        ema: exponential moving average of the trained parameters; {} where it is off.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    extras: Extras
    ema: Params


def make_init(
    objective: Objective, optimizer: Optimizer, *, ema: bool
) -> Callable[[jax.Array, Batch], TrainState]:
    """Returns `init(rng, batch) -> TrainState`, a pure function to be jitted with output
    shardings.
    """

    def init(rng: jax.Array, batch: Batch) -> TrainState:
        params, extras = objective.init(rng, batch)
        trained, _ = optimizer.split(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.transform.init(trained),
            extras=extras,
            # a copy: the state is donated, and two leaves must not share a buffer
            ema=jax.tree.map(jnp.copy, trained) if ema else {},
        )

    return init


def with_params(state: TrainState, params: Params) -> TrainState:
    """Returns a fresh state that starts from other parameters.

    What starts as a copy of the parameters starts as a copy of these: the moving average, and what
    extras hold under the path of a parameter (key encoders, a teacher). To be jitted.
    """
    leaves = trees.named_leaves(params)

    def start(path: str, leaf: jax.Array) -> jax.Array:
        owner = trees.owner(path, leaf, leaves)
        return leaf if owner is None else jnp.copy(leaves[owner])

    extras, ema = (trees.map_with_path(start, tree) for tree in (state.extras, state.ema))
    return dataclasses.replace(state, params=params, extras=extras, ema=ema)


def state_shardings(
    shapes: TrainState, mesh: Mesh, rules: Sequence[sharding.Rule] = ()
) -> TrainState:
    """Returns the tree of NamedShardings of a TrainState, given its shapes (`jax.eval_shape`)."""

    def follow(tree: Any) -> Any:
        return sharding.follow_parameters(tree, shapes.params, mesh, rules)

    return TrainState(
        step=sharding.replicated(mesh),
        params=sharding.parameter_shardings(shapes.params, mesh, rules),
        opt_state=follow(shapes.opt_state),
        extras=follow(shapes.extras),
        ema=follow(shapes.ema),
    )


def abstract_state(shapes: TrainState, shardings: TrainState) -> TrainState:
    """Returns ShapeDtypeStructs with shardings: the target that a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def evaluation_params(state: TrainState, optimizer: Optimizer) -> Params:
    """Returns the parameters that evaluators see: the moving average where there is one."""
    if not state.ema:
        return state.params
    _, frozen = optimizer.split(state.params)
    return optimizer.join(state.ema, frozen)
