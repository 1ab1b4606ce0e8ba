# SPDX-License-Identifier: Apache-2.0
"""The training step: one for every objective.

rng   = fold_in(key(seed), step)
total, weight = objective.loss(params, extras, batch, rng)      summed over micro-batches where
additive grads = d total / d trained / weight
params, opt_state = optimizer(grads)
extras = objective.after_update(params, extras, stats, step)
where loss or gradients are not finite, all but the step counter stays as it was
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_vlm import trees
from flax_vlm.batch import split_micro_batches
from flax_vlm.meters import Mean
from flax_vlm.objectives.base import Aux, Batch, Objective
from flax_vlm.training.optimizers import Optimizer
from flax_vlm.training.state import TrainState

Metrics = dict[str, Any]


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    seed: int,
    micro_batches: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step(state, batch) -> (state, metrics)`, a pure function to be jitted.

    The metrics hold `loss` and the objective's own as Means, `grad_norm`, `update_norm`,
    `param_norm`, `learning_rate` as scalars, and `nonfinite`: {parameter group: [] bool} with the
    group "loss" beside.

    Args:
        objective: what is trained.
        optimizer: how.
        seed: of dropout and the like; the key of a step is fold_in(key(seed), step).
        micro_batches: gradient accumulation; micro-batch k holds the examples k, k + A, k + 2A ...
        ema_decay: of the moving average of parameters; 0 = off.

    Raises:
        ValueError: if micro_batches > 1 and the objective is not additive.
    """
    if micro_batches > 1 and not objective.additive:
        raise ValueError(
            f"micro_batches={micro_batches} sums the losses of micro-batches, which needs an "
            f"additive objective, got {type(objective).__name__}; use its gradient cache instead"
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        trained, frozen = optimizer.split(state.params)

        def loss(trained: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, tuple[Mean, Aux]]:
            params = optimizer.join(trained, frozen)
            mean, aux = objective.loss(params, state.extras, batch, rng, train=True)
            return mean.total, (mean, aux)

        grads, (mean, aux) = _sum_over_micro_batches(
            jax.grad(loss, has_aux=True), trained, batch, rng, micro_batches
        )
        grads = jax.tree.map(lambda g: g / jnp.maximum(mean.weight, 1.0), grads)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, trained)
        new_trained = optax.apply_updates(trained, updates)
        params = optimizer.join(new_trained, frozen)
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            extras=objective.after_update(params, state.extras, aux.stats, state.step),
            ema=_moving_average(state.ema, new_trained, state.step, ema_decay),
        )
        nonfinite = _nonfinite_groups(grads) | {"loss": ~jnp.isfinite(mean.total)}
        metrics = {
            "loss": mean,
            **aux.metrics,
            "learning_rate": jnp.float32(optimizer.schedule(state.step)),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(new_trained),
            "nonfinite": nonfinite,
        }
        return _keep_if(~jnp.any(jnp.stack(list(nonfinite.values()))), new, state), metrics

    return train_step


def _sum_over_micro_batches(
    gradient: Callable, trained: Any, batch: Batch, rng: jax.Array, micro_batches: int
) -> Any:
    """Returns the sums of gradients, Means and stats over micro-batches."""
    if micro_batches == 1:
        return gradient(trained, batch, rng)
    micro = split_micro_batches(batch, micro_batches)

    def one(index: jax.Array) -> Any:
        rows = jax.tree.map(lambda x: x[index], micro)
        return gradient(trained, rows, jax.random.fold_in(rng, index))

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(index)), None

    return jax.lax.scan(body, one(jnp.int32(0)), jnp.arange(1, micro_batches))[0]


def _moving_average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    if not ema:
        return ema
    # early steps average over what there is, so that the random initialisation is forgotten
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)


def _nonfinite_groups(grads: Any) -> dict[str, jax.Array]:
    """Returns {group: [] bool, does any gradient of it hold a NaN or infinity}; a group is
    "image/encoder" or so.
    """
    groups: dict[str, list[jax.Array]] = {}
    for path, grad in trees.named_leaves(grads).items():
        group = "/".join(path.split("/")[:2])
        groups.setdefault(group, []).append(~jnp.all(jnp.isfinite(grad)))
    return {group: jnp.any(jnp.stack(flags)) for group, flags in groups.items()}


def _keep_if(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return TrainState(new.step, kept.params, kept.opt_state, kept.extras, kept.ema)
