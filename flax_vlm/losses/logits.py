# SPDX-License-Identifier: Apache-2.0
"""Products of embeddings, accumulated in float32 or better, shared by all contrastive losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_vlm.losses.pairs import Side
from flax_vlm.shapes import check_shapes


def kept(loss: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Returns the losses [B] with 0 where `keep` is False."""
    return loss if keep is None else jnp.where(keep, loss, 0.0)


def cosines(rows: jax.Array, columns: jax.Array, precision: str | None) -> jax.Array:
    """Returns [R, C] products of unit vectors, accumulated and kept in float32 or better."""
    return jnp.matmul(
        rows, columns.T, precision=precision, preferred_element_type=accumulator(rows.dtype)
    )


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of sums over `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def scalars(
    rows: Side, logit_scale: jax.Array, logit_bias: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns (logit_scale, logit_bias or 0) as [] in the accumulation dtype."""
    dtype = accumulator(rows.embedding.dtype)
    scale = jnp.asarray(logit_scale, dtype)
    bias = jnp.asarray(0.0 if logit_bias is None else logit_bias, dtype)
    check_shapes(" ; ", scale, bias)
    return scale, bias


def times(weights: jax.Array, embedding: jax.Array, precision: str | None) -> jax.Array:
    """Returns weights [R, C] @ embedding [C, E], accumulated in the dtype of the weights."""
    return jnp.matmul(
        weights.astype(embedding.dtype),
        embedding,
        precision=precision,
        preferred_element_type=weights.dtype,
    )


def matches(image: jax.Array, text: jax.Array) -> jax.Array:
    """Returns [B] cosines of the matching pairs, in float32 or better."""
    dtype = accumulator(image.dtype)
    return (image.astype(dtype) * text.astype(dtype)).sum(-1)
