# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses over all pairs of a batch: the readable form and the reference.

Sigmoid: SigLIP (arXiv 2303.15343) section 3.2. Softmax: CLIP (arXiv 2103.00020), also CoCa's
    contrastive term
(arXiv 2205.01917). Distillation: the contrastive term of MobileCLIP (arXiv 2311.17049).

Differs from the papers: each loss is per image and not yet averaged; texts beyond one per image
are negatives of the images alone; pairs that may match by accident can be left out (pairs.py);
softmax is written as softplus(LSE of negatives - positive), which stays accurate when the loss is
tiny, where LSE - positive cancels. The same values with flat memory: contrastive_sharded.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flax_vlm.losses.hard_negatives import HardNegatives, mine, number_pairs
from flax_vlm.losses.logits import cosines, kept, scalars
from flax_vlm.losses.pairs import DEFAULT_RULES, PairRules, Pairs, Side, arrange, tile_masks


@dataclasses.dataclass(frozen=True)
class HnNce:
    """Weights of the negatives of a softmax loss: HN-NCE of DiHT, arXiv 2301.02280 (static).

    -x_ii + log(alpha e^x_ii + sum_j w_ij e^x_ij) over the N negatives j, with w_ij = N e^(beta
    x_ij) / sum_k e^(beta x_ik). alpha = 1, beta = 0 is the plain loss.

    Attributes:
        alpha: weight of the positive, > 0.
        beta: concentration on hard negatives, >= 0.
        differentiate_weights: True lets gradients flow through w_ij as well.
    """

    alpha: float = 1.0
    beta: float = 0.5
    differentiate_weights: bool = True

    def __post_init__(self):
        if self.alpha <= 0 or self.beta < 0:
            raise ValueError(f"HN-NCE needs alpha > 0 and beta >= 0, got {self}")


PLAIN = HnNce(alpha=1.0, beta=0.0)
ALL_NEGATIVES = HardNegatives()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """Embeddings of another model for the same images and texts, not trained.

    Attributes:
        image_embedding: [B, E'] unit vectors; E' need not be the student's width.
        text_embedding: [M, E'] unit vectors.
        logit_scale: [] the teacher's own scale.
    """

    image_embedding: jax.Array
    text_embedding: jax.Array
    logit_scale: jax.Array


def sigmoid_contrastive_loss(
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
) -> jax.Array:
    """Returns the sigmoid loss of every image: summed over its texts, not averaged over images.

    loss_i = sum_j softplus(-z_ij x_ij), x_ij = logit_scale <I_i, T_j> + logit_bias, z = 1 for
    positives, -1 for negatives.

    Args:
        image_embedding: [B, E] unit vectors.
        text_embedding: [M, E] unit vectors, M >= B; text i matches image i.
        logit_scale: [] positive (already exponentiated).
        logit_bias: [], or None for 0.
        pairs: ids, masks and the positive index.
        rules: which pairs are left out or made positive.
        negatives: how many negatives an image keeps.
        rng: key for random negatives.
        precision: of the matrix product, a name of jax.lax.Precision; None for the global default.

    Returns:
        [B] float32 (float64 for float64 embeddings), 0 for rows that example_mask drops.

    Raises:
        ValueError: if shapes disagree or M < B.

    Source: SigLIP, arXiv 2303.15343, section 3.2, without its 1/B.
    """
    rows, columns = arrange(image_embedding, text_embedding, pairs)
    scale, bias = scalars(rows, logit_scale, logit_bias)
    cosine = cosines(rows.embedding, columns.embedding, precision)  # [B, M]
    rows, columns = _mined(rows, columns, cosine, negatives, rng, rules)
    return _sigmoid(rows, columns, cosine, scale, bias, rules)


def softmax_contrastive_loss(
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
) -> jax.Array:
    """Returns the symmetric softmax loss of every image-text pair: CLIP, CoCa's contrastive term.

    loss_i = (row_i + column_i) / 2, row_i = softplus(LSE_j x_ij - LSE_p x_ip) over negatives j and
    positives p of image i (with several positives this is MIL-NCE, arXiv 1912.06430); column_i the
    same for text i over images.

    Args:
        image_embedding: [B, E] unit vectors.
        text_embedding: [M, E] unit vectors, M >= B; text i matches image i. Texts from B on are
            negatives of images only.
        logit_scale: [] positive (already exponentiated).
        logit_bias: taken so that all losses have one signature; a softmax does not see it.
        pairs: ids, masks and the positive index.
        rules: which pairs are left out or made positive.
        weighting: HN-NCE weights of the negatives.
        negatives: how many negatives an image keeps among the texts, and a text among the images.
        rng: key for random negatives.
        symmetric: False leaves column_i out and does not halve row_i (InfoNCE of queries and keys).
        precision: of the matrix product, a name of jax.lax.Precision; None for the global default.

    Returns:
        [B] float32 (float64 for float64 embeddings), 0 for rows that example_mask drops.

    Raises:
        ValueError: if shapes disagree or M < B.

    Source: CLIP, arXiv 2103.00020, figure 3.
    """
    rows, columns = arrange(image_embedding, text_embedding, pairs)
    scale, _ = scalars(rows, logit_scale, logit_bias)
    cosine = cosines(rows.embedding, columns.embedding, precision)  # [B, M]
    rows, columns = _mined(rows, columns, cosine, negatives, rng, rules)
    return _softmax(rows, columns, cosine, scale, rules, weighting, symmetric)


def distillation_contrastive_loss(
    image_embedding: jax.Array,
    text_embedding: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array | None = None,
    *,
    teacher: Teacher,
    pairs: Pairs | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Returns the cross entropy of the student's similarities under the teacher's, per pair.

    loss_i = (CE(softmax_j teacher_ij, softmax_j x_ij) + CE(softmax_j teacher_ji, softmax_j x_ji))
    / 2; the rows run over all M texts, the columns over B images. The caller adds
    softmax_contrastive_loss.

    Args:
        image_embedding: [B, E] unit vectors of the student.
        text_embedding: [M, E] unit vectors of the student, M >= B.
        logit_scale: [] of the student.
        logit_bias: not seen, as in softmax_contrastive_loss.
        teacher: embeddings and scale of the teacher; no gradient flows to them.
        pairs: masks and the positive index (the teacher already knows equal texts: text_id is not
            used).
        precision: of the matrix products, a name of jax.lax.Precision; None for the global default.

    Returns:
        [B] float32 (float64 for float64 embeddings), 0 for rows that example_mask drops.

    Raises:
        ValueError: if shapes disagree or M < B.

    Source: MobileCLIP, arXiv 2311.17049.
    """
    teacher = jax.lax.stop_gradient(teacher)
    rows, columns = arrange(image_embedding, text_embedding, pairs)
    taught_rows, taught_columns = arrange(teacher.image_embedding, teacher.text_embedding, pairs)
    scale, _ = scalars(rows, logit_scale, logit_bias)
    taught_scale, _ = scalars(taught_rows, teacher.logit_scale, None)
    x = scale * cosines(rows.embedding, columns.embedding, precision)  # [B, M]
    y = taught_scale * cosines(taught_rows.embedding, taught_columns.embedding, precision)
    keep = jnp.ones(x.shape, bool)
    if columns.keep is not None:
        keep &= columns.keep[None, :]
    if rows.keep is not None:
        keep &= rows.keep[:, None]
    b = x.shape[0]
    row = _cross_entropy(x, y, keep, axis=1)
    column = _cross_entropy(x[:, :b], y[:, :b], keep[:, :b], axis=0)
    return kept((row + column) / 2, rows.keep)


def _mined(rows, columns, cosine, negatives, rng, rules) -> tuple[Side, Side]:
    if not negatives.limits(columns.index.shape[0]):
        return rows, columns
    return mine(*number_pairs(rows, columns, negatives, rng), cosine, negatives, rules)


def _sigmoid(
    rows: Side,
    columns: Side,
    cosine: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rules: PairRules,
) -> jax.Array:
    """Returns [B] sigmoid losses from cosines [B, M]."""
    x = scale * cosine + bias
    masks = tile_masks(rows, columns, cosine, rules)
    each = jnp.where(masks.row_negative, jax.nn.softplus(x), 0.0)
    if masks.positive is not None:
        each += jnp.where(masks.positive, jax.nn.softplus(-x), 0.0)
    return kept(each.sum(1) + jax.nn.softplus(-jnp.diagonal(x)), rows.keep)


def _softmax(
    rows: Side,
    columns: Side,
    cosine: jax.Array,
    scale: jax.Array,
    rules: PairRules,
    weighting: HnNce,
    symmetric: bool,
) -> jax.Array:
    """Returns [B] softmax losses from cosines [B, M]."""
    x, b = scale * cosine, cosine.shape[0]
    masks = tile_masks(rows, columns, cosine, rules)
    positive = jnp.eye(b, x.shape[1], dtype=bool)
    if masks.positive is not None:
        positive |= masks.positive
    row = _direction(x, positive, masks.row_negative, weighting, axis=1)
    if not symmetric:
        return kept(row, rows.keep)
    column = _direction(x[:, :b], positive[:, :b], masks.column_negative[:, :b], weighting, axis=0)
    return kept((row + column) / 2, rows.keep)


def _direction(
    x: jax.Array, positive: jax.Array, negative: jax.Array, weighting: HnNce, axis: int
) -> jax.Array:
    """Returns log alpha + softplus(A - P - log alpha): A, P the LSE of negatives, positives."""
    log_alpha = jnp.log(jnp.asarray(weighting.alpha, x.dtype))
    level = _lse(x, negative, axis)
    if weighting.beta:
        beta, count = weighting.beta, negative.sum(axis, dtype=x.dtype)
        log_weight = beta * x - jnp.expand_dims(_lse(beta * x, negative, axis), axis)
        if not weighting.differentiate_weights:
            log_weight = jax.lax.stop_gradient(log_weight)
        level = jnp.log(count) + _lse(log_weight + x, negative, axis)
    # without negatives the level is -inf, and the loss log alpha
    excess = level - _lse(x, positive, axis) - log_alpha
    return log_alpha + jax.nn.softplus(excess)


def _cross_entropy(x: jax.Array, y: jax.Array, keep: jax.Array, axis: int) -> jax.Array:
    keep |= jnp.expand_dims(~keep.any(axis), axis)
    teacher = jnp.where(keep, jnp.exp(y - jnp.expand_dims(_lse(y, keep, axis), axis)), 0.0)
    return _lse(x, keep, axis) - (teacher * x).sum(axis)


def _lse(x: jax.Array, mask: jax.Array, axis: int) -> jax.Array:
    return jax.nn.logsumexp(jnp.where(mask, x, -jnp.inf), axis=axis)
