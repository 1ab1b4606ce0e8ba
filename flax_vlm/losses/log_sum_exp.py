# SPDX-License-Identifier: Apache-2.0
"""Streaming log-sum-exp with an online maximum (arXiv 1805.02867), as (maximum, sum) pairs.

Kept as two numbers: their logarithm would round the sum to the precision of the maximum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def raise_top(
    top: jax.Array, x: jax.Array, mask: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (x with -inf outside the mask, the new maximum, old maximum - new one).

    Args:
        top: the maximum so far, -inf for nothing; the shape of x without `axis`.
        x: [R, C] logits.
        mask: [R, C] bool.
        axis: 1 for maxima of rows, 0 for those of columns.
    """
    masked = jnp.where(mask, x, -jnp.inf)
    new = jnp.maximum(top, masked.max(axis))
    return masked, new, top - finite(new)


def power(masked: jax.Array, top: jax.Array, exponent: float, axis: int) -> jax.Array:
    """Returns exp(exponent (x - top)) [R, C], 0 where x is -inf."""
    return jnp.exp(exponent * (masked - jnp.expand_dims(finite(top), axis)))


def finite(top: jax.Array) -> jax.Array:
    """Returns the maximum with 0 for -inf (nothing seen), so that no inf - inf arises."""
    return jnp.where(top == -jnp.inf, 0.0, top)
