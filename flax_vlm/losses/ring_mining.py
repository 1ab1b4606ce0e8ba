# SPDX-License-Identifier: Apache-2.0
"""Hard-negative mining (hard_negatives.py) on a ring: the best k of every row are streamed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flax_vlm.losses.hard_negatives import (
    HardNegatives,
    nothing_seen,
    pair_draws,
    see,
    thresholds,
    with_thresholds,
)
from flax_vlm.losses.logits import accumulator, cosines
from flax_vlm.losses.pairs import PairRules, Side, tile_masks
from flax_vlm.losses.ring import Ring


def mine_on_ring(
    ring: Ring,
    image: jax.Array,
    texts: tuple[jax.Array, ...],
    sides: tuple[Side, tuple[Side, ...]],
    negatives: HardNegatives,
    rules: PairRules,
    precision: str | None,
    both: bool,
) -> tuple[Side, tuple[Side, ...]]:
    """Returns the sides with their thresholds, from one sweep of the ring (1 product per pair).

    Args:
        ring: how the pairs are walked.
        image: [B, E].
        texts: (matched [B, E],) or (matched, extra [K, E]).
        sides: (Side of the images, Sides of the texts), without embeddings.
        negatives: how many.
        rules: which pairs are left out.
        precision: of the matrix product.
        both: mine images for the matched texts as well.
    """

    def visit(rows, row_state, columns, column_state):
        cosine = cosines(rows.embedding, columns.embedding, precision)  # [R, C]
        negative = tile_masks(rows, columns, cosine, rules).row_negative
        draw = pair_draws(rows, columns)
        row_state = see(row_state, cosine, draw, negative)
        if column_state:
            turned = jax.tree.map(jnp.transpose, (cosine, draw, negative))
            column_state = see(column_state, *turned)
        return row_state, column_state

    def local(split, _):
        image, texts, (row_side, text_sides) = split
        rows = dataclasses.replace(row_side, embedding=image)
        start = nothing_seen(
            negatives, ring.full((len(image),), accumulator(image.dtype), -jnp.inf)
        )
        states = [start if both else {}, *[{}] * (len(texts) - 1)]
        streams = tuple(
            (dataclasses.replace(side, embedding=text), state)
            for side, text, state in zip(text_sides, texts, states, strict=True)
        )
        row_state, column_states = ring.sweep(visit, rows, start, streams)
        states = (row_state, column_states[0]) if both else (row_state,)
        return [thresholds(negatives, state) for state in states], {}

    inputs = (*jax.lax.stop_gradient((image, texts)), sides)
    found, _ = ring.run(local, inputs, ())
    matched, *extra = sides[1]
    matched = with_thresholds(matched, found[1]) if both else matched
    return with_thresholds(sides[0], found[0]), (matched, *extra)
