# SPDX-License-Identifier: Apache-2.0
"""The distillation loss on a ring: cross entropy of student under teacher without either's logits.

CE_i = LSE_j x_ij - sum_j q_ij x_ij with q the teacher's softmax: two log-sum-exps and one weighted
sum per row, all streamed (MobileCLIP, arXiv 2311.17049, has the loss, not this form). 6 matrix
products per pair: each of the two sweeps needs the student's logits and the teacher's.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from flax_vlm.losses.log_sum_exp import finite, power, raise_top
from flax_vlm.losses.logits import cosines, kept
from flax_vlm.losses.pairs import pair_keep
from flax_vlm.losses.ring import Ring, add_slope, embedding_gradients


@dataclasses.dataclass(frozen=True)
class DistillationSpec:
    """Static settings of ring_distillation.

    Attributes:
        ring: how the pairs are walked.
        precision: of the matrix products.
    """

    ring: Ring
    precision: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_distillation(spec, image, texts, scale, teacher_scale, sides):
    """Returns [B] distillation losses.

    Args:
        spec: DistillationSpec.
        image: [B, E] of the student.
        texts: (matched [B, E],) or (matched, extra [K, E]) of the student.
        scale: [] of the student.
        teacher_scale: [].
        sides: (Side of the images, Sides of the texts), without embeddings; `state` holds the
            teacher's embeddings.
    """
    return _forward(spec, image, texts, scale, teacher_scale, sides)[0]


def _forward(spec, image, texts, scale, teacher_scale, sides):
    inputs, scales = (image, texts, sides), (scale, teacher_scale)
    (loss, states), _ = spec.ring.run(functools.partial(_local_loss, spec), inputs, scales)
    return loss, (inputs, states, scales)


def _backward(spec, saved, cotangent):
    inputs, states, scales = saved
    run = functools.partial(_local_gradients, spec)
    (d_image, d_texts), d_scale = spec.ring.run(run, (*inputs, states, cotangent), scales)
    return d_image, d_texts, d_scale, None, None


ring_distillation.defvjp(_forward, _backward)


def _logits(spec, scales, rows, columns):
    """Returns the logits [R, C] of the student and of the teacher."""
    taught = cosines(rows.state["teacher"], columns.state["teacher"], spec.precision)
    return scales[0] * cosines(rows.embedding, columns.embedding, spec.precision), scales[
        1
    ] * taught


def _side(side, embedding, factors=None):
    state = {"teacher": side.state, "factors": factors}
    return dataclasses.replace(side, embedding=embedding, state=state)


def _local_loss(spec, split, scales):
    image, texts, (row_side, text_sides) = split
    zero = spec.ring.full(image.shape[:1], scales[0].dtype)
    start = {"top": zero - jnp.inf, "sum": zero}
    start |= {"teacher_top": zero - jnp.inf, "teacher_sum": zero, "mean": zero}
    states = [start, *[{}] * (len(texts) - 1)]
    streams = tuple(
        (_side(side, text), state)
        for side, text, state in zip(text_sides, texts, states, strict=True)
    )

    def visit(rows, row_state, columns, column_state):
        x, y = _logits(spec, scales, rows, columns)
        keep = pair_keep(rows, columns)
        row_state = _add(row_state, x, y, keep, 1)
        return row_state, _add(column_state, x, y, keep, 0) if column_state else column_state

    row_state, column_states = spec.ring.sweep(visit, _side(row_side, image), start, streams)
    states = (row_state, column_states[0])
    loss = sum(_cross_entropy(state) for state in states) / 2
    return (kept(loss, row_side.keep), states), {}


def _local_gradients(spec, split, scales):
    image, texts, (row_side, text_sides), (row_state, column_state), cotangent = split
    cotangent = kept(cotangent, row_side.keep)
    rows = _side(row_side, image, _factors(row_state, cotangent))
    factors = [_factors(column_state, cotangent), *[None] * (len(texts) - 1)]
    streams = tuple(
        (_side(side, text, factor), {"text": spec.ring.full(text.shape, scales[0].dtype)})
        for side, text, factor in zip(text_sides, texts, factors, strict=True)
    )

    def visit(rows, row_state, columns, column_state):
        x, y = _logits(spec, scales, rows, columns)
        slope = _slope(rows.state["factors"], x, y, 1)
        if columns.state["factors"] is not None:
            slope += _slope(columns.state["factors"], x, y, 0)
        slope = jnp.where(pair_keep(rows, columns), slope, 0.0)
        return add_slope(slope, rows, row_state, columns, column_state, spec.precision)

    start = {"image": spec.ring.full(image.shape, scales[0].dtype)}
    row_state, column_states = spec.ring.sweep(visit, rows, start, streams)
    # the sweep has seen the matching pairs too
    d_image, d_texts, d_scale = embedding_gradients(
        image, texts, scales[0], jnp.zeros_like(cotangent), row_state, column_states
    )
    return (d_image, d_texts), d_scale


def _add(state, x, y, keep, axis):
    """Returns the running sums after the pairs of a tile [R, C], summed over `axis`."""
    masked, top, fall = raise_top(state["top"], x, keep, axis)
    taught, teacher_top, teacher_fall = raise_top(state["teacher_top"], y, keep, axis)
    taught, shrink = power(taught, teacher_top, 1.0, axis), jnp.exp(teacher_fall)
    return {
        "top": top,
        "sum": state["sum"] * jnp.exp(fall) + power(masked, top, 1.0, axis).sum(axis),
        "teacher_top": teacher_top,
        "teacher_sum": state["teacher_sum"] * shrink + taught.sum(axis),
        "mean": state["mean"] * shrink + (taught * x).sum(axis),
    }


def _cross_entropy(state):
    some = state["sum"] > 0
    level = finite(state["top"]) + jnp.log(jnp.where(some, state["sum"], 1.0))
    return level - state["mean"] / jnp.where(some, state["teacher_sum"], 1.0)


def _factors(state, cotangent):
    some = state["sum"] > 0
    return {
        "top": finite(state["top"]),
        "student": cotangent / 2 / jnp.where(some, state["sum"], 1.0),
        "teacher_top": finite(state["teacher_top"]),
        "teacher": cotangent / 2 / jnp.where(some, state["teacher_sum"], 1.0),
    }


def _slope(factors, x, y, axis):
    """Returns d loss / d x [R, C] of one direction: half the student's softmax - the teacher's."""
    factors = {name: jnp.expand_dims(factor, axis) for name, factor in factors.items()}
    student = factors["student"] * jnp.exp(x - factors["top"])
    return student - factors["teacher"] * jnp.exp(y - factors["teacher_top"])
