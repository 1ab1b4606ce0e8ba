# SPDX-License-Identifier: Apache-2.0
"""The softmax loss on a ring: 4 matrix products per pair for loss and gradients.

The forward sweep takes the log-sum-exp of rows and of columns from the same logits, with an online
maximum; the columns' part travels with the texts. Saved for the backward pass: the embeddings and a
few numbers per row. The backward sweep computes each tile of logits once more. HN-NCE needs one
more sum per row, since sum_j w_ij e^x_ij = N sum_j e^((1 + beta) x_ij) / sum_j e^(beta x_ij).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from flax_vlm.losses.contrastive import HnNce
from flax_vlm.losses.log_sum_exp import finite, power, raise_top
from flax_vlm.losses.logits import cosines, kept, matches
from flax_vlm.losses.pairs import PairRules, tile_masks
from flax_vlm.losses.ring import Ring, add_slope, embedding_gradients


@dataclasses.dataclass(frozen=True)
class SoftmaxSpec:
    """Static settings of ring_softmax.

    Attributes:
        ring: how the pairs are walked.
        rules: which pairs are left out or made positive.
        weighting: of the negatives.
        precision: of the matrix products.
        symmetric: False leaves the loss of the texts over the images out.
    """

    ring: Ring
    rules: PairRules
    weighting: HnNce
    precision: str | None
    symmetric: bool = True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_softmax(spec, image, texts, scale, sides):
    """Returns [B] softmax losses.

    Args:
        spec: SoftmaxSpec.
        image: [B, E].
        texts: (matched [B, E],) or (matched, extra [K, E]).
        scale: [].
        sides: (Side of the images, Sides of the texts), without embeddings.
    """
    return _forward(spec, image, texts, scale, sides)[0]


def _forward(spec, image, texts, scale, sides):
    inputs = (image, texts, sides)
    (loss, states), _ = spec.ring.run(functools.partial(_local_loss, spec), inputs, scale)
    return loss, (inputs, states, scale)


def _backward(spec, saved, cotangent):
    inputs, states, scale = saved
    run = functools.partial(_local_gradients, spec)
    (d_image, d_texts), d_scale = spec.ring.run(run, (*inputs, states, cotangent), scale)
    return d_image, d_texts, d_scale, None


ring_softmax.defvjp(_forward, _backward)


def _local_loss(spec, split, scale):
    image, texts, (row_side, text_sides) = split
    match = scale * matches(image, texts[0])  # [b]
    rows = dataclasses.replace(row_side, embedding=image)
    start = _start(spec, match)
    # only the matched texts, the first, have a loss of their own
    states = [start if spec.symmetric else {}, *[{}] * (len(texts) - 1)]
    streams = tuple(
        (dataclasses.replace(side, embedding=text), state)
        for side, text, state in zip(text_sides, texts, states, strict=True)
    )

    def visit(rows, row_state, columns, column_state):
        cosine = cosines(rows.embedding, columns.embedding, spec.precision)  # [R, C]
        masks = tile_masks(rows, columns, cosine, spec.rules)
        x = scale * cosine
        row_state = _add(spec, row_state, x, masks.row_negative, masks.positive, 1)
        if column_state:
            column_state = _add(spec, column_state, x, masks.column_negative, masks.positive, 0)
        return row_state, column_state

    row_state, column_states = spec.ring.sweep(visit, rows, start, streams)
    states = (row_state, column_states[0]) if spec.symmetric else (row_state,)
    loss = sum(jax.nn.softplus(_excess(spec, state, match)) for state in states) / len(states)
    return (kept(loss + math.log(spec.weighting.alpha), rows.keep), states), {}


def _local_gradients(spec, split, scale):
    image, texts, (row_side, text_sides), states, cotangent = split
    match = scale * matches(image, texts[0])  # [b]
    cotangent = kept(cotangent, row_side.keep) / len(states)
    factors, weights = zip(
        *(_factors(spec, state, match, cotangent) for state in states), strict=True
    )
    rows = dataclasses.replace(row_side, embedding=image, state=factors[0])
    factors = [*factors[1:], *[None] * (len(texts) - len(factors) + 1)]
    streams = tuple(
        (
            dataclasses.replace(side, embedding=text, state=factor),
            {"text": spec.ring.full(text.shape, scale.dtype)},
        )
        for side, text, factor in zip(text_sides, texts, factors, strict=True)
    )

    def visit(rows, row_state, columns, column_state):
        cosine = cosines(rows.embedding, columns.embedding, spec.precision)  # [R, C]
        masks = tile_masks(rows, columns, cosine, spec.rules)
        x = scale * cosine
        slope = _slope(spec, rows.state, x, masks.row_negative, masks.positive, 1)
        if columns.state is not None:
            slope += _slope(spec, columns.state, x, masks.column_negative, masks.positive, 0)
        return add_slope(slope, rows, row_state, columns, column_state, spec.precision)

    row_state, column_states = spec.ring.sweep(
        visit, rows, {"image": spec.ring.full(image.shape, scale.dtype)}, streams
    )
    d_image, d_texts, d_scale = embedding_gradients(
        image, texts, scale, sum(weights), row_state, column_states
    )
    return (d_image, d_texts), d_scale


def _start(spec: SoftmaxSpec, match: jax.Array) -> dict[str, jax.Array]:
    """Returns the running sums [b] of one side before the sweep: no negative, one positive."""
    zero = jnp.zeros_like(match)
    state = {"top": zero - jnp.inf, "sum": zero}
    if spec.weighting.beta:
        state |= {"weight": zero, "count": zero}
    if spec.rules.same_text == "positive":
        state |= {"positive_top": match, "positive_sum": zero + 1}
    return state


def _add(spec, state, x, negative, positive, axis):
    """Returns the running sums after the pairs of a tile [R, C], summed over `axis`."""
    beta, state = spec.weighting.beta, dict(state)
    masked, top, fall = raise_top(state["top"], x, negative, axis)
    state["sum"] = state["sum"] * jnp.exp((1 + beta) * fall) + power(
        masked, top, 1 + beta, axis
    ).sum(axis)
    if beta:
        state["weight"] = state["weight"] * jnp.exp(beta * fall) + power(
            masked, top, beta, axis
        ).sum(axis)
        state["count"] += negative.sum(axis, dtype=x.dtype)
    state["top"] = top
    if positive is not None:
        masked, top, fall = raise_top(state["positive_top"], x, positive, axis)
        state["positive_sum"] *= jnp.exp(fall)
        state["positive_sum"] += power(masked, top, 1.0, axis).sum(axis)
        state["positive_top"] = top
    return state


def _excess(spec, state, match):
    """Returns A - P - log alpha [b]: log-sum-exp of weighted negatives less that of positives."""
    some = state["sum"] > 0
    level = jnp.log(jnp.where(some, state["sum"], 1.0))
    if spec.weighting.beta:
        level += jnp.log(jnp.where(some, state["count"] / state["weight"], 1.0))
    top = match
    if "positive_top" in state:
        top = state["positive_top"]
        level -= jnp.log(state["positive_sum"])
    # the maxima first: their difference is exact where it is small
    excess = (finite(state["top"]) - top) + level - math.log(spec.weighting.alpha)
    return jnp.where(some, excess, -jnp.inf)


def _factors(spec, state, match, cotangent):
    """Returns (what _slope needs of a side, d loss / d x_ii) from its sums and cotangent [b]."""
    beta, through = spec.weighting.beta, spec.weighting.differentiate_weights
    some = state["sum"] > 0
    slope = cotangent * jax.nn.sigmoid(_excess(spec, state, match))
    factors = {"top": finite(state["top"])}
    gain = 1 + beta if through else 1.0
    factors["sum"] = gain * slope / jnp.where(some, state["sum"], 1.0)
    if beta and through:
        factors["weight"] = beta * slope / jnp.where(some, state["weight"], 1.0)
    share = 1.0
    if "positive_top" in state:
        factors["positive_top"] = state["positive_top"]
        factors["positive_sum"] = slope / state["positive_sum"]
        share = jnp.exp(match - state["positive_top"]) / state["positive_sum"]
    return factors, -slope * share


def _slope(spec, factors, x, negative, positive, axis):
    """Returns d loss / d x [R, C] of one direction."""
    factors = {name: jnp.expand_dims(factor, axis) for name, factor in factors.items()}
    beta, below = spec.weighting.beta, x - factors["top"]
    slope = factors["sum"] * jnp.exp((1 + beta) * below)
    if "weight" in factors:
        slope -= factors["weight"] * jnp.exp(beta * below)
    slope = jnp.where(negative, slope, 0.0)
    if positive is not None:
        pull = factors["positive_sum"] * jnp.exp(x - factors["positive_top"])
        slope -= jnp.where(positive, pull, 0.0)
    return slope
