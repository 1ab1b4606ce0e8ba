# SPDX-License-Identifier: Apache-2.0
"""The losses of contrastive.py with memory linear in the rows per device, for any global batch.

Same values, same gradients; texts travel round a ring of devices (ring.py) and the backward pass is
written by hand. Inf-CL (arXiv 2410.17243) is the nearest published form. Differs from it: one sweep
serves both directions of the softmax (4 matrix products per pair instead of 10; sigmoid: 3), any
width and tile, gradients of scale and bias exact, pairs can be masked, nothing overflows.

Call under jit on global arrays whose leading axis is split over the batch axes of the mesh.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flax_vlm.losses.contrastive import ALL_NEGATIVES, PLAIN, HnNce, Teacher
from flax_vlm.losses.hard_negatives import HardNegatives, number_pairs
from flax_vlm.losses.logits import scalars
from flax_vlm.losses.pairs import DEFAULT_RULES, PairRules, Pairs, Side, arrange
from flax_vlm.losses.ring import Ring
from flax_vlm.losses.ring_distillation import DistillationSpec, ring_distillation
from flax_vlm.losses.ring_mining import mine_on_ring
from flax_vlm.losses.ring_sigmoid import SigmoidSpec, ring_sigmoid
from flax_vlm.losses.ring_softmax import SoftmaxSpec, ring_softmax

DEFAULT_RING = Ring()


def sigmoid_contrastive_loss_sharded(
    image_embedding: jax.Array,
    text_embedding: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array | None,
    *,
    pairs: Pairs | None = None,
    rules: PairRules = DEFAULT_RULES,
    negatives: HardNegatives = ALL_NEGATIVES,
    rng: jax.Array | None = None,
    precision: str | None = None,
    ring: Ring = DEFAULT_RING,
    any_cotangent: bool = False,
) -> jax.Array:
    """Returns sigmoid_contrastive_loss: 3 matrix products per pair with gradients (mining: 4).

    Args:
        image_embedding: [B, E] unit vectors; B a multiple of the ring's size.
        text_embedding: [M, E] unit vectors, M >= B; text i matches image i.
        logit_scale: [] positive (already exponentiated).
        logit_bias: [], or None for 0.
        pairs: ids, masks and the positive index.
        rules: which pairs are left out or made positive.
        negatives: how many negatives an image keeps.
        rng: key for random negatives.
        precision: of the matrix products, a name of jax.lax.Precision; None for the global default.
        ring: mesh axes and tile.
        any_cotangent: False: the gradients are taken in the forward pass, for a loss that is summed
            or averaged over all kept rows; any other cotangent gives NaN gradients. True: rows may
            be weighted freely afterwards, for one more product.

    Returns:
        [B] float32 (float64 for float64 embeddings), 0 for rows that example_mask drops.

    Raises:
        ValueError: if shapes disagree, M < B, or B does not divide over the ring.
    """
    rows, columns = arrange(image_embedding, text_embedding, pairs)
    scale, bias = scalars(rows, logit_scale, logit_bias)
    spec = SigmoidSpec(ring, rules, precision, any_cotangent)
    mining = (negatives, rng, rules, precision, False)
    image, texts, sides = _mined(ring, rows, columns, *mining)
    return ring_sigmoid(spec, image, texts, scale, bias, sides)


def softmax_contrastive_loss_sharded(
    image_embedding: jax.Array,
    text_embedding: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array | None = None,
    *,
    pairs: Pairs | None = None,
    rules: PairRules = DEFAULT_RULES,
    weighting: HnNce = PLAIN,
    negatives: HardNegatives = ALL_NEGATIVES,
    rng: jax.Array | None = None,
    symmetric: bool = True,
    precision: str | None = None,
    ring: Ring = DEFAULT_RING,
) -> jax.Array:
    """Returns softmax_contrastive_loss: 4 matrix products per pair with gradients (mining: 5).

    Args:
        image_embedding: [B, E] unit vectors; B a multiple of the ring's size.
        text_embedding: [M, E] unit vectors, M >= B; text i matches image i. Texts from B on are
            negatives of images only.
        logit_scale: [] positive (already exponentiated).
        logit_bias: taken so that all losses have one signature; a softmax does not see it.
        pairs: ids, masks and the positive index.
        rules: which pairs are left out or made positive.
        weighting: HN-NCE weights of the negatives.
        negatives: how many negatives an image keeps among the texts, and a text among the images.
        rng: key for random negatives.
        symmetric: False leaves the columns' part out and does not halve the rows' (InfoNCE).
        precision: of the matrix products, a name of jax.lax.Precision; None for the global default.
        ring: mesh axes and tile.

    Returns:
        [B] float32 (float64 for float64 embeddings), 0 for rows that example_mask drops.

    Raises:
        ValueError: if shapes disagree, M < B, or B does not divide over the ring.
    """
    rows, columns = arrange(image_embedding, text_embedding, pairs)
    scale, _ = scalars(rows, logit_scale, logit_bias)
    mining = (negatives, rng, rules, precision, True)
    image, texts, sides = _mined(ring, rows, columns, *mining)
    spec = SoftmaxSpec(ring, rules, weighting, precision, symmetric)
    return ring_softmax(spec, image, texts, scale, sides)


def distillation_contrastive_loss_sharded(
    image_embedding: jax.Array,
    text_embedding: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array | None = None,
    *,
    teacher: Teacher,
    pairs: Pairs | None = None,
    precision: str | None = None,
    ring: Ring = DEFAULT_RING,
) -> jax.Array:
    """Returns distillation_contrastive_loss: 6 matrix products per pair with gradients.

    Args:
        image_embedding: [B, E] unit vectors of the student; B a multiple of the ring's size.
        text_embedding: [M, E] unit vectors of the student, M >= B.
        logit_scale: [] of the student.
        logit_bias: not seen, as in softmax_contrastive_loss.
        teacher: embeddings and scale of the teacher; no gradient flows to them.
        pairs: masks and the positive index (text_id is not used).
        precision: of the matrix products, a name of jax.lax.Precision; None for the global default.
        ring: mesh axes and tile.

    Returns:
        [B] float32 (float64 for float64 embeddings), 0 for rows that example_mask drops.

    Raises:
        ValueError: if shapes disagree, M < B, or B does not divide over the ring.
    """
    teacher = jax.lax.stop_gradient(teacher)
    rows, columns = arrange(image_embedding, text_embedding, pairs)
    taught = arrange(teacher.image_embedding, teacher.text_embedding, pairs)
    rows, columns = (
        dataclasses.replace(side, state=other.embedding)
        for side, other in zip((rows, columns), taught, strict=True)
    )
    scale, _ = scalars(rows, logit_scale, logit_bias)
    teacher_scale, _ = scalars(taught[0], teacher.logit_scale, None)
    image, texts, sides = split(ring, rows, columns)
    spec = DistillationSpec(ring, precision)
    return ring_distillation(spec, image, texts, scale, teacher_scale, sides)


def _mined(ring, rows, columns, negatives, rng, rules, precision, both):
    limited = negatives.limits(columns.index.shape[0])
    if limited:
        rows, columns = number_pairs(rows, columns, negatives, rng)
    image, texts, sides = split(ring, rows, columns)
    if limited:
        sides = mine_on_ring(ring, image, texts, sides, negatives, rules, precision, both)
    return image, texts, sides


def split(ring: Ring, rows: Side, columns: Side) -> tuple[jax.Array, tuple, tuple]:
    """Returns (images, (matched texts, extra texts), (Sides of both without embeddings)).

    The extra texts are padded to a multiple of the ring's size.
    """
    b, m = rows.index.shape[0], columns.index.shape[0]
    if b % ring.size:
        raise ValueError(
            f"the batch must divide over the {ring.size} devices of {ring.batch_axes}, got {b} rows"
        )
    matched = columns if m == b else jax.tree.map(lambda x: x[:b], columns)
    parts = [matched]
    if m > b:
        parts.append(_pad(jax.tree.map(lambda x: x[b:], columns), -(m - b) % ring.size))
    bare = [dataclasses.replace(side, embedding=None) for side in (rows, *parts)]
    return rows.embedding, tuple(p.embedding for p in parts), (bare[0], tuple(bare[1:]))


def _pad(side: Side, rows: int) -> Side:
    if not rows:
        return side
    keep = jnp.ones(side.index.shape, bool) if side.keep is None else side.keep
    side = dataclasses.replace(side, keep=keep)
    return jax.tree.map(lambda x: jnp.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1)), side)
