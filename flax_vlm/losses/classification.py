# SPDX-License-Identifier: Apache-2.0
"""Classification losses: softmax cross entropy with label smoothing, and its sigmoid form.

Label smoothing: Inception v3, arXiv 1512.00567. The sigmoid form (arXiv 2006.07159, section 3.1 of
"Are we done with ImageNet?") treats each class as a yes-no question.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from flax_vlm.shapes import check_shapes


def softmax_classification_loss(
    logits: jax.Array, label: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns the cross entropy of every example.

    loss = -sum_k q_k log softmax(logits)_k, q = (1 - label_smoothing) onehot(label) +
    label_smoothing / num_classes.

    Args:
        logits: [B, K] float, K classes.
        label: [B] int32 in 0..K-1; -1 (no label) gives loss 0.
        label_smoothing: in [0, 1).

    Returns:
        [B] float32.

    Raises:
        ValueError: if shapes disagree or label_smoothing is out of range.
    """
    return optax.losses.softmax_cross_entropy(*_targets(logits, label, label_smoothing))


def sigmoid_classification_loss(
    logits: jax.Array, label: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns the binary cross entropy of every example, summed over classes.

    loss = sum_k softplus(logits_k) - q_k logits_k, q as in softmax_classification_loss.

    Args:
        logits: [B, K] float, K classes.
        label: [B] int32 in 0..K-1; -1 (no label) gives loss 0.
        label_smoothing: in [0, 1).

    Returns:
        [B] float32.

    Raises:
        ValueError: if shapes disagree or label_smoothing is out of range.
    """
    logits, target = _targets(logits, label, label_smoothing)
    loss = optax.losses.sigmoid_binary_cross_entropy(logits, target).sum(-1)
    return jnp.where(label < 0, 0.0, loss)


def _targets(
    logits: jax.Array, label: jax.Array, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    classes = check_shapes("B K; B", logits, label)["K"]
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    onehot = jax.nn.one_hot(label, classes, dtype=logits.dtype)  # [B, K]
    labelled = jnp.expand_dims(label >= 0, -1)
    return logits, jnp.where(labelled, optax.smooth_labels(onehot, label_smoothing), 0.0)
