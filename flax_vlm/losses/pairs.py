# SPDX-License-Identifier: Apache-2.0
"""Which image-text pairs are positives, negatives or neither, for every contrastive loss.

A pair (i, j) is judged from what its row and its column carry (index, caption id, mask, mining
thresholds), never from a [B, M] array, so that the dense loss and a tile of the sharded loss ask
the same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_vlm.shapes import check_shapes

SAME_TEXT = ("ignore", "positive", "negative")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """What is known about the rows of a contrastive batch besides their embeddings.

    Attributes:
        text_id: [M] int32, equal for texts that say the same; an image has the id of its own text.
            None: all differ.
        example_mask: [B] bool, False = padding: image i and its text are in nobody's loss. None
            keeps all.
        extra_mask: [M-B] bool, False = an extra text (no image's match) is padding. None keeps all.
        positive: [B] int32 without repetition, the text that matches image i. None: text i. The
            texts are then reordered, which costs the sharded forms one gather of the text
            embeddings.
    """

    text_id: jax.Array | None = None
    example_mask: jax.Array | None = None
    extra_mask: jax.Array | None = None
    positive: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class PairRules:
    """How pairs that may match by accident are treated (static).

    Attributes:
        same_text: pairs i != j with equal text_id are left out ("ignore"), are further positives
            ("positive"), or stay negatives ("negative").
        ceiling: pairs i != j with a cosine above it are left out, unless same_text made them
            positives. None: no limit.
    """

    same_text: str = "ignore"
    ceiling: float | None = None

    def __post_init__(self):
        if self.same_text not in SAME_TEXT:
            raise ValueError(f"same_text must be one of {SAME_TEXT}, got {self.same_text!r}")
        if self.ceiling is not None and not -1.0 < self.ceiling <= 1.0:
            raise ValueError(f"ceiling must be a cosine in (-1, 1] or None, got {self.ceiling}")


DEFAULT_RULES = PairRules()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """The images (rows) or the texts (columns) of the logits; every leaf has the same leading axis.

    Attributes:
        embedding: [R, E] unit vectors.
        index: [R] int32, place in the global batch; image i matches the text of index i.
        text_id: [R] int32 or None.
        keep: [R] bool or None.
        mined: thresholds of hard_negatives.py by name, each [R]; {} takes every negative.
        state: what a loss needs of this side in a second pass, a tree of [R, ...].
    """

    embedding: jax.Array
    index: jax.Array
    text_id: jax.Array | None = None
    keep: jax.Array | None = None
    mined: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    state: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """The roles of the pairs in one tile; the pair (i, i) is in none of them.

    Attributes:
        positive: [R, C] bool, further positives of same_text="positive"; None in the other modes.
        row_negative: [R, C] bool, text j is a negative of image i.
        column_negative: [R, C] bool, image i is a negative of text j.
    """

    positive: jax.Array | None
    row_negative: jax.Array
    column_negative: jax.Array


def arrange(image: jax.Array, text: jax.Array, pairs: Pairs | None) -> tuple[Side, Side]:
    """Returns (images [B], texts [M]) with ids and masks, text i being the match of image i.

    Raises:
        ValueError: if a shape disagrees, or there are fewer texts than images.
    """
    pairs = pairs or Pairs()
    sizes = check_shapes("B E; M E", image, text)
    b, m = sizes["B"], sizes["M"]
    if m < b:
        raise ValueError(f"every image must have a text of its own, got {b} images and {m} texts")
    wanted = {"text_id": m, "example_mask": b, "extra_mask": m - b, "positive": b}
    for name, size in wanted.items():
        array = getattr(pairs, name)
        if array is not None and array.shape != (size,):
            raise ValueError(
                f"pairs.{name} must be [{size}] for these embeddings, got {array.shape}"
            )
    text_id, index = pairs.text_id, jnp.arange(m, dtype=jnp.int32)
    if pairs.positive is not None:
        order = jnp.argsort((index + b).at[pairs.positive].set(index[:b]))
        text, text_id = (None if x is None else x[order] for x in (text, text_id))
    row_id = None if text_id is None else text_id[:b]
    return (
        Side(image, index[:b], row_id, pairs.example_mask),
        Side(text, index, text_id, _text_keep(pairs, b, m)),
    )


def _text_keep(pairs: Pairs, b: int, m: int) -> jax.Array | None:
    masks = (pairs.example_mask, pairs.extra_mask)
    if all(mask is None for mask in masks):
        return None
    full = [
        jnp.ones(size, bool) if mask is None else mask
        for mask, size in zip(masks, (b, m - b), strict=True)
    ]
    return jnp.concatenate(full)  # [M]


def pair_keep(rows: Side, columns: Side) -> jax.Array:
    """Returns [R, C] bool, True where neither the image nor the text is padding."""
    keep = jnp.ones((rows.index.shape[0], columns.index.shape[0]), bool)
    if rows.keep is not None:
        keep &= rows.keep[:, None]
    if columns.keep is not None:
        keep &= columns.keep[None, :]
    return keep


def tile_masks(rows: Side, columns: Side, cosine: jax.Array, rules: PairRules) -> Masks:
    """Returns the role of every pair of a tile of rows [R] and columns [C], cosines [R, C]."""
    keep = pair_keep(rows, columns) & (rows.index[:, None] != columns.index[None, :])
    negative, positive = keep, None
    if rows.text_id is not None and rules.same_text != "negative":
        same = rows.text_id[:, None] == columns.text_id[None, :]
        negative = keep & ~same
        positive = keep & same if rules.same_text == "positive" else None
    if rules.ceiling is not None:
        negative &= cosine <= rules.ceiling
    draw = None
    if "code" in rows.mined:
        draw = draws(rows.mined["code"], columns.mined["code"])
    return Masks(
        positive,
        negative & _chosen(rows.mined, cosine, draw, axis=1),
        negative & _chosen(columns.mined, cosine, draw, axis=0),
    )


def _chosen(
    mined: Mapping[str, jax.Array], cosine: jax.Array, draw: jax.Array | None, axis: int
) -> jax.Array:
    """Returns [R, C] bool, the pairs that mining left to this side (all of them without mining)."""
    if "cosine" not in mined:
        return jnp.ones(cosine.shape, bool)
    chosen = cosine >= jnp.expand_dims(mined["cosine"], axis)
    if draw is not None:
        chosen |= draw >= jnp.expand_dims(mined["draw"], axis)
    return chosen


def draws(row_code: jax.Array, column_code: jax.Array) -> jax.Array:
    """Returns one random number per pair, a pure function of the two codes.

    No tile size and no device count changes it.

    Args:
        row_code: [R] uint32, see `codes`.
        column_code: [C] uint32.

    Returns:
        [R, C] int32, uniform over all but the lowest and the highest int32.
    """
    bits = _mix(row_code[:, None] ^ column_code[None, :]).astype(jnp.int32)
    limits = jnp.iinfo(jnp.int32)
    return jnp.clip(bits, limits.min + 1, limits.max - 1)


def codes(seed: jax.Array, index: jax.Array) -> jax.Array:
    """Returns [R] uint32, a random number per global index [R] int32 and seed [] uint32."""
    return _mix(_mix(index.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)) ^ seed)


def _mix(x: jax.Array) -> jax.Array:
    # the finalizer of MurmurHash3: every input bit flips every output bit with probability near 1/2
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
