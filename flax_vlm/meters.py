# SPDX-License-Identifier: Apache-2.0
"""Means that travel as (total, weight) and are divided only when they are printed.

Sums can be added across micro-batches, devices, hosts and evaluation batches without changing the
result; means cannot. Everything that is averaged in flax_vlm is therefore kept as a `Mean` until it
leaves the program.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean that has not been divided yet.

    Attributes:
        total: [] float32, the weighted sum of the values.
        weight: [] float32, the sum of the weights (examples, tokens).
    """

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> Mean:
        """Returns the mean of `values` over the entries that `mask` keeps.

        Args:
            values: any shape, float or bool.
            mask: same shape, True = keep; None keeps all.
        """
        values = jnp.asarray(values, jnp.float32)
        if mask is None:
            return cls(values.sum(), jnp.float32(values.size))
        # where, not a product: a NaN in a masked row must not reach the sum
        return cls(jnp.where(mask, values, 0.0).sum(), mask.sum(dtype=jnp.float32))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> jax.Array:
        """Returns total / weight; 0 where the weight is 0."""
        return jnp.where(self.weight > 0, self.total / jnp.maximum(self.weight, 1e-30), 0.0)
