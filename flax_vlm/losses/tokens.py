# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: the cross entropy of every token given those before it, unreduced.

    text        [ a   b   c   d ]        loss_mask  [ .  .  1  1 ]
    predicted by    ^a  ^b  ^c           counted            c  d

Which tokens count is the data's business: `loss_mask` marks the tokens that are to be predicted,
not the positions that predict them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from flax_vlm.shapes import check_shapes


def token_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Returns [...] float32, -log softmax(logits)[target].

    Args:
        logits: [..., V] float.
        target: [...] int32 in 0..V - 1.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, target)


def next_token_targets(
    text: jax.Array, loss_mask: jax.Array, segments: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (target [B, L] int32, counted [B, L] bool): what position l has to predict, the token
    l + 1, and whether that counts. The last position predicts nothing.

    Args:
        text: [B, L] int32.
        loss_mask: [B, L] bool, True = this token is to be predicted.
        segments: [B, L] int32, number of the text that a token belongs to where several are packed
            in a row: no text predicts the first token of the next.
    """
    check_shapes("B L; B L; B L", text, loss_mask, segments)
    target = jnp.roll(text, -1, axis=1)
    counted = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    if segments is not None:
        counted = counted & (jnp.roll(segments, -1, axis=1) == segments)
    return target, counted
