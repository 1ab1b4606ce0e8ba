# SPDX-License-Identifier: Apache-2.0
"""NumPy float64 oracles of the contrastive losses with hand-derived gradients, and the batches
they are tried on."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One contrastive batch in float64; images [B, E], texts [M, E], the rest as in
    losses.pairs.Pairs."""

    image: np.ndarray
    text: np.ndarray
    scale: float
    bias: float
    text_id: np.ndarray | None = None
    example_mask: np.ndarray | None = None
    extra_mask: np.ndarray | None = None

    @property
    def pairs(self):
        return {k: getattr(self, k) for k in ("text_id", "example_mask", "extra_mask")}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batch(b=24, m=40, e=6, *, scale=9.0, bias=-3.0, seed=0, masks=True, signal=1.0):
    """Random pairs; masks: every third text has one id, an image and an extra text are padding."""
    rng = np.random.default_rng(seed)
    image = unit(rng.normal(size=(b, e)))
    text = unit(np.concatenate([signal * image, np.zeros((m - b, e))]) + rng.normal(size=(m, e)))
    if not masks:
        return Case(image, text, scale, bias)
    text_id = np.arange(m, dtype=np.int32)
    text_id[::3] = text_id[0]
    example_mask, extra_mask = np.ones(b, bool), np.ones(m - b, bool)
    example_mask[b // 2] = False
    extra_mask[-1:] = False
    return Case(image, text, scale, bias, text_id, example_mask, extra_mask)


@functools.cache
def easy_batch(b=256, e=768, *, scale=100.0, loss=1e-3, shared=0.2, seed=0):
    """Every row has about the given loss; other cosines are near `shared`; float32 numbers."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(e, 2 * b + 1)))[0].T
    own, other, common = basis[:b], basis[b:-1], np.sqrt(shared) * basis[-1:]
    match = (np.log(b - 1) - np.log(np.expm1(loss))) / scale / (1 - shared)
    image = common + np.sqrt(1 - shared) * own
    text = common + np.sqrt(1 - shared) * (match * own + np.sqrt(1 - match**2) * other)
    text = unit(text + 0.05 / np.sqrt(e) * rng.normal(size=text.shape))
    return Case(*(x.astype(np.float32).astype(np.float64) for x in (image, text)), scale, 0.0)


def roles(case, same_text="ignore", ceiling=None):
    """(positive, negative) [B, M] bool."""
    b, m = len(case.image), len(case.text)
    positive = np.eye(b, m, dtype=bool)
    keep = np.ones((b, m), bool)
    if case.example_mask is not None:
        keep &= case.example_mask[:, None]
        keep &= np.concatenate([case.example_mask, case.extra_mask])
    negative = ~positive
    if case.text_id is not None and same_text != "negative":
        same = case.text_id[:b, None] == case.text_id[None, :]
        if same_text == "positive":
            positive |= same
        negative &= ~same
    if ceiling is not None:
        negative &= case.image @ case.text.T <= ceiling
    return positive & keep, negative & keep


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return np.exp(-softplus(-x))


def finish(case, loss, weights_of_logits, cotangent):
    """Loss [B] and the gradients of sum(cotangent * loss) from G = d/dx [B, M]."""
    g = weights_of_logits
    return loss, {
        "image": case.scale * g @ case.text,
        "text": case.scale * g.T @ case.image,
        "scale": (g * (case.image @ case.text.T)).sum(),
        "bias": g.sum(),
    }


def sigmoid_oracle(case, cotangent, positive, negative):
    x = case.scale * case.image @ case.text.T + case.bias
    loss = (positive * softplus(-x) + negative * softplus(x)).sum(1)
    g = (negative * sigmoid(x) - positive * sigmoid(-x)) * cotangent[:, None]
    return finish(case, loss, g, cotangent)


def lse(x, mask, axis):
    x = np.where(mask, x, -np.inf)
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis, keepdims=True)) + top


def softmax_direction(x, positive, negative, axis, alpha, beta, through_weights):
    """(loss, d loss / d x) of one direction of HN-NCE, by its definition with explicit weights."""
    count = negative.sum(axis, keepdims=True)
    top = lse(x, positive, axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = count * np.exp(beta * x - lse(beta * x, negative, axis)) * negative
        level = lse(x + np.log(weight), negative & (weight > 0), axis)
        share = np.where(negative, np.exp(x + np.log(weight) - level), 0.0)
        q = np.where(negative, np.exp(beta * x - lse(beta * x, negative, axis)), 0.0)
    odds = np.where(count > 0, level - top - np.log(alpha), -np.inf)
    loss = np.log(alpha) + softplus(odds)
    slope = sigmoid(odds)
    d_level = share * (1 + beta) - beta * q if through_weights else share
    d_top = np.where(positive, np.exp(x - top), 0.0)
    return loss.squeeze(axis), slope * (d_level - d_top)


def softmax_oracle(
    case,
    cotangent,
    positive,
    negative,
    *,
    column_negative=None,
    alpha=1.0,
    beta=0.0,
    through=True,
    symmetric=True,
):
    b = len(case.image)
    keep = np.diagonal(positive).copy()  # a dropped row has no positive
    fill = np.eye(*positive.shape, dtype=bool)
    positive = positive | fill
    column_negative = negative if column_negative is None else column_negative
    x = case.scale * case.image @ case.text.T
    row, d_row = softmax_direction(x, positive, negative, 1, alpha, beta, through)
    column, d_column = softmax_direction(
        x[:, :b], positive[:, :b], column_negative[:, :b], 0, alpha, beta, through
    )
    cotangent = cotangent * keep
    if not symmetric:
        return finish(case, row * keep, cotangent[:, None] * d_row, cotangent)
    g = 0.5 * cotangent[:, None] * d_row
    g[:, :b] += 0.5 * cotangent[None, :] * d_column
    return finish(case, 0.5 * (row + column) * keep, g, cotangent)


def distillation_oracle(case, teacher, cotangent):
    b = len(case.image)
    positive, negative = roles(dataclasses.replace(case, text_id=None))
    keep = positive | negative
    kept = np.diagonal(keep).copy()
    full = keep | np.eye(*keep.shape, dtype=bool)
    x = case.scale * case.image @ case.text.T
    y = teacher.scale * teacher.image @ teacher.text.T

    def direction(x, y, mask, axis):
        q = np.where(mask, np.exp(y - lse(y, mask, axis)), 0.0)
        p = np.where(mask, np.exp(x - lse(x, mask, axis)), 0.0)
        log_p = np.where(mask, x - lse(x, mask, axis), 0.0)
        return -(q * log_p).sum(axis), p - q

    row, d_row = direction(x, y, full, 1)
    column, d_column = direction(x[:, :b], y[:, :b], full[:, :b], 0)
    cotangent = cotangent * kept
    g = 0.5 * cotangent[:, None] * d_row
    g[:, :b] += 0.5 * cotangent[None, :] * d_column
    return finish(case, 0.5 * (row + column) * kept, g, cotangent)
