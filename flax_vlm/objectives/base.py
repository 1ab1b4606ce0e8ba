# SPDX-License-Identifier: Apache-2.0
"""The objective: what is trained. One step and one loop serve every objective through this
protocol.

An objective is a frozen dataclass of linen modules and coefficients. It knows nothing of devices,
optimizers or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from flax_vlm.meters import Mean

Params = dict[str, Any]
Extras = dict[str, Any]
Batch = Mapping[str, jax.Array]
PredictFn = Callable[[Params, Extras, Batch], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a loss reports besides its value.

    Attributes:
        metrics: name -> Mean, only printed.
        stats: a tree of sums over examples; `after_update` turns them into new extras once per
            optimizer step.
    """

    metrics: dict[str, Mean] = dataclasses.field(default_factory=dict)
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """The contract of everything that can be trained."""

    @property
    def additive(self) -> bool:
        """May a batch be cut into micro-batches whose losses are summed, without changing the
        loss?
        """

    @property
    def predictions(self) -> Mapping[str, PredictFn]:
        """Names to functions of (params, extras, batch): the only door for evaluators, the hub and
        notebooks.
        """

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns random parameters and the extras that gradients do not train (teacher, codebook
        counts, queues).
        """

    def loss(
        self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[Mean, Aux]:
        """Returns the loss as (total, weight), and what else to report. Never changes the
        extras.
        """

    def after_update(
        self, params: Params, extras: Extras, stats: dict[str, Any], step: jax.Array
    ) -> Extras:
        """Returns the new extras: the only place where they change, once per optimizer step."""
