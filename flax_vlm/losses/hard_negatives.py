# SPDX-License-Identifier: Apache-2.0
"""Hard-negative mining in the global batch: the top k by cosine, mixed with random ones.

Mining runs before the loss and leaves thresholds behind, not indices: a pair is a negative if its
cosine reaches the k-th hardest of its image (for the column direction of the softmax: of its text),
or its random number is among those drawn. The losses can then ask tile by tile, and the mined set
does not depend on tile size or device count. Pairs that the rules leave out are never mined.

In-batch mining: VSE++ (arXiv 1707.05612) with k = 1; the random share is ours. A tie with the k-th
hardest (cosines that differ by rounding alone) is kept too.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flax_vlm.losses.pairs import PairRules, Side, codes, draws, tile_masks


@dataclasses.dataclass(frozen=True)
class HardNegatives:
    """How many negatives a positive keeps (static).

    Attributes:
        k: negatives per image and per text; 0 keeps all.
        random_share: part of k drawn at random from those that are not among the hardest, 0..1.
    """

    k: int = 0
    random_share: float = 0.0

    def __post_init__(self):
        if self.k < 0 or not 0.0 <= self.random_share <= 1.0:
            raise ValueError(f"hard negatives need k >= 0 and random_share in 0..1, got {self}")

    @property
    def random(self) -> int:
        """The number of random negatives."""
        return round(self.k * self.random_share)

    @property
    def hard(self) -> int:
        """The number of hardest negatives."""
        return self.k - self.random

    def limits(self, texts: int) -> bool:
        """Returns whether anything is left out in a batch of that many texts."""
        return 0 < self.k < texts - 1


def number_pairs(
    rows: Side, columns: Side, negatives: HardNegatives, rng: jax.Array | None
) -> tuple[Side, Side]:
    """Returns the sides with what the random numbers of their pairs are made of.

    Raises:
        ValueError: if negatives are drawn at random and there is no rng.
    """
    if not negatives.random:
        return rows, columns
    if rng is None:
        raise ValueError(f"random negatives need an rng, got None with {negatives}")
    seeds = jax.random.bits(rng, (2,), jnp.uint32)
    return tuple(
        dataclasses.replace(side, mined={"code": codes(seed, side.index)})
        for side, seed in zip((rows, columns), seeds, strict=True)
    )


def mine(
    rows: Side, columns: Side, cosine: jax.Array, negatives: HardNegatives, rules: PairRules
) -> tuple[Side, Side]:
    """Returns the sides with their thresholds, from all cosines [B, M]: the readable form."""
    cosine, b = jax.lax.stop_gradient(cosine), cosine.shape[0]
    negative = tile_masks(rows, columns, cosine, rules).row_negative
    draw = pair_draws(rows, columns)
    start = nothing_seen(negatives, jnp.full((b,), -jnp.inf, cosine.dtype))
    of_rows = thresholds(negatives, see(start, cosine, draw, negative))
    own = jax.tree.map(lambda x: x[:, :b].T, (cosine, draw, negative))
    of_columns = thresholds(negatives, see(start, *own))
    # a text beyond the images has no positive: its own threshold is never asked for
    of_columns = jax.tree.map(lambda x: jnp.pad(x, (0, columns.index.shape[0] - b)), of_columns)
    return with_thresholds(rows, of_rows), with_thresholds(columns, of_columns)


def with_thresholds(side: Side, thresholds: dict[str, jax.Array]) -> Side:
    """Returns the side with what `thresholds` found."""
    return dataclasses.replace(side, mined={**side.mined, **thresholds})


def pair_draws(rows: Side, columns: Side) -> jax.Array | None:
    """Returns the random numbers [R, C] of a tile, None where nothing is drawn."""
    return draws(rows.mined["code"], columns.mined["code"]) if rows.mined else None


def nothing_seen(negatives: HardNegatives, nothing: jax.Array) -> dict[str, jax.Array]:
    """Returns the best seen so far of one side: nothing. Enough is kept to tell apart two groups.

    The hardest and the next one, so that the threshold falls between them; and random numbers for
    the case that the highest of them all belong to hard negatives.
    """
    hard, random = negatives.hard, negatives.random
    nothing = nothing[:, None]
    state = {"cosine": jnp.repeat(nothing, hard + 1, 1)} if hard else {}
    if random:
        draw_cosine = jnp.repeat(nothing, hard + random, 1)
        draw = jnp.where(draw_cosine == -jnp.inf, jnp.iinfo(jnp.int32).min, 0)
        state |= {"draw": draw.astype(jnp.int32), "draw_cosine": draw_cosine}
    return state


def see(state, cosine, draw, negative):
    """Returns the best seen so far of the rows of a tile [R, C]."""
    masked, state = jnp.where(negative, cosine, -jnp.inf), dict(state)
    if "cosine" in state:
        both = jnp.concatenate([state["cosine"], masked], 1)
        state["cosine"] = jax.lax.top_k(both, state["cosine"].shape[1])[0]
    if "draw" in state:
        draw = jnp.where(negative, draw, jnp.iinfo(jnp.int32).min)
        both = jnp.concatenate([state["draw"], draw], 1)
        state["draw"], place = jax.lax.top_k(both, state["draw"].shape[1])
        both = jnp.concatenate([state["draw_cosine"], masked], 1)
        state["draw_cosine"] = jnp.take_along_axis(both, place, 1)
    return state


def thresholds(negatives: HardNegatives, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns {"cosine": [R], "draw": [R]}: a negative is kept if it reaches either of them."""
    hard, random = negatives.hard, negatives.random
    if hard:
        last, following = state["cosine"][:, hard - 1], state["cosine"][:, hard]
        # between the two, so that a cosine that is rounded otherwise next time stays on its side
        margin = 8 * jnp.finfo(last.dtype).eps
        cosine = jnp.minimum((last + following) / 2, last - margin)
    else:
        cosine = jnp.full(state["draw_cosine"].shape[:1], jnp.inf, state["draw_cosine"].dtype)
    if not random:
        return {"cosine": cosine}
    easy = state["draw_cosine"] < cosine[:, None]
    enough = (jnp.cumsum(easy, 1) >= random).at[:, -1].set(True)
    place = jnp.argmax(enough, 1, keepdims=True)
    return {"cosine": cosine, "draw": jnp.take_along_axis(state["draw"], place, 1)[:, 0]}
