# SPDX-License-Identifier: Apache-2.0
"""Attention masks: boolean, True = may be seen, [B|1, N|1, S|1, T] to broadcast over logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_mask(length: int) -> jax.Array:
    """Returns [1, 1, S, S] bool: a position sees itself and what comes before it."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def padding_mask(keep: jax.Array) -> jax.Array:
    """Returns [B, 1, 1, T] bool: every query sees the real tokens alone.

    Args:
        keep: [B, T] bool, True = real token.
    """
    return keep[:, None, None, :]


def combine_masks(*masks: jax.Array | None) -> jax.Array | None:
    """Returns the conjunction of the masks that are not None; None if there is none."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    result = given[0]
    for mask in given[1:]:
        result = result & mask
    return result
