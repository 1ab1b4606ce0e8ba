# SPDX-License-Identifier: Apache-2.0
"""The sigmoid loss on a ring: 3 matrix products per pair for loss and gradients, nothing stored.

A pair's gradient depends on that pair alone (SigLIP, arXiv 2303.15343, section 3.3), so the
forward sweep can leave the finished gradients behind and the backward pass only scales them.
That fixes the weights of the rows: see `any_cotangent`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from flax_vlm.losses.logits import cosines, kept, matches
from flax_vlm.losses.pairs import Masks, PairRules, tile_masks
from flax_vlm.losses.ring import Ring, add_slope, embedding_gradients


@dataclasses.dataclass(frozen=True)
class SigmoidSpec:
    """Static settings of ring_sigmoid.

    Attributes:
        ring: how the pairs are walked.
        rules: which pairs are left out or made positive.
        precision: of the matrix products.
        any_cotangent: False: gradients are taken in the forward pass for a loss that is summed or
            averaged over all kept rows; any other cotangent gives NaN gradients. True: the backward
            pass computes the logits again (4 products instead of 3), rows may be weighted freely.
    """

    ring: Ring
    rules: PairRules
    precision: str | None
    any_cotangent: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_sigmoid(spec, image, texts, scale, bias, sides):
    """Returns [B] sigmoid losses.

    Args:
        spec: SigmoidSpec.
        image: [B, E].
        texts: (matched [B, E],) or (matched, extra [K, E]).
        scale: [].
        bias: [].
        sides: (Side of the images, Sides of the texts), without embeddings.
    """
    run = functools.partial(_local, spec, loss=True, gradients=False)
    return spec.ring.run(run, (image, texts, sides, None), (scale, bias))[0]["loss"]


def _forward(spec, image, texts, scale, bias, sides):
    rows = (image, texts, sides, None)
    if spec.any_cotangent:
        return ring_sigmoid(spec, image, texts, scale, bias, sides), (rows, scale, bias)
    run = functools.partial(_local, spec, loss=True, gradients=True)
    found, sums = spec.ring.run(run, rows, (scale, bias))
    return found.pop("loss"), (found, sums, sides[0].keep)


def _backward(spec, saved, cotangent):
    if spec.any_cotangent:
        (image, texts, sides, _), scale, bias = saved
        run = functools.partial(_local, spec, loss=False, gradients=True)
        found, sums = spec.ring.run(run, (image, texts, sides, cotangent), (scale, bias))
    else:
        found, sums, keep = saved
        common = _common_value(cotangent, keep)
        found, sums = jax.tree.map(lambda x: (x * common).astype(x.dtype), (found, sums))
    return found["image"], found["texts"], sums["scale"], sums["bias"], None


ring_sigmoid.defvjp(_forward, _backward)


def _common_value(cotangent: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Returns the value that all kept rows share; NaN if they do not share one."""
    if keep is None:
        keep = jnp.ones(cotangent.shape, bool)
    top = jnp.where(keep, cotangent, -jnp.inf).max()
    bottom = jnp.where(keep, cotangent, jnp.inf).min()
    shared = jnp.where(top - bottom <= 1e-6 * jnp.abs(top), top, jnp.nan)
    return jnp.where(keep.any(), shared, 0.0)


def _local(spec, split, whole, *, loss: bool, gradients: bool):
    image, texts, (row_side, text_sides), cotangent = split
    scale, bias = whole
    b, width, full = *image.shape, functools.partial(spec.ring.full, dtype=scale.dtype)
    rows = dataclasses.replace(row_side, embedding=image, state=cotangent)
    row_state = {"loss": full((b,))} if loss else {}
    if gradients:
        row_state |= {"bias": full((b,)), "image": full((b, width))}
    streams = tuple(
        (
            dataclasses.replace(side, embedding=text),
            {"text": full(text.shape)} if gradients else {},
        )
        for side, text in zip(text_sides, texts, strict=True)
    )

    def visit(rows, row_state, columns, column_state):
        cosine = cosines(rows.embedding, columns.embedding, spec.precision)  # [R, C]
        masks = tile_masks(rows, columns, cosine, spec.rules)
        x = scale * cosine + bias
        row_sums = dict(row_state)
        if loss:
            row_sums["loss"] += _tile_loss(x, masks)
        if gradients:
            slope = _tile_slope(x, masks, rows.state)
            row_sums["bias"] += slope.sum(1)
            image, column_state = add_slope(
                slope, rows, row_state, columns, column_state, spec.precision
            )
            row_sums |= image
        return row_sums, column_state

    row_state, column_states = spec.ring.sweep(visit, rows, row_state, streams)
    x = scale * matches(image, texts[0]) + bias  # [b]
    found, sums = {}, {}
    if loss:
        found["loss"] = kept(row_state["loss"] + jax.nn.softplus(-x), rows.keep)
    if gradients:
        weight = kept(-jax.nn.sigmoid(-x), rows.keep)
        weight = weight if cotangent is None else weight * cotangent
        sums["bias"] = (row_state["bias"] + weight).sum()
        found["image"], found["texts"], sums["scale"] = embedding_gradients(
            image, texts, scale, weight, row_state, column_states
        )
    return found, sums


def _tile_loss(x: jax.Array, masks: Masks) -> jax.Array:
    """Returns [R], the losses of the tile's rows, without the matching pairs."""
    each = jnp.where(masks.row_negative, jax.nn.softplus(x), 0.0)
    if masks.positive is not None:
        each += jnp.where(masks.positive, jax.nn.softplus(-x), 0.0)
    return each.sum(1)


def _tile_slope(x: jax.Array, masks: Masks, weight: jax.Array | None) -> jax.Array:
    """Returns d loss / d x [R, C], times the weight [R] of the rows."""
    slope = jnp.where(masks.row_negative, jax.nn.sigmoid(x), 0.0)
    if masks.positive is not None:
        slope -= jnp.where(masks.positive, jax.nn.sigmoid(-x), 0.0)
    return slope if weight is None else slope * weight[:, None]
