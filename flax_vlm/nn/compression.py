# SPDX-License-Identifier: Apache-2.0
"""Fewer visual tokens: from P tokens of an image to a number Q that is known before anything runs.

All have one signature, (visual tokens [B, P, D], mask [B, P]) -> (tokens [B, Q, D'], mask [B, Q]),
and no parameters. They stand between the image encoder and the connector.

    average_pool    the mean of r x r neighbouring patches
    pixel_shuffle   r x r neighbouring patches side by side in one token, D' = r^2 D (InternVL,
                    arXiv:2404.16821, section 3.1, in front of an MLP)
    token_merging   ToMe, Bolya et al., arXiv:2210.09461: the most similar tokens become one

What prunes tokens inside the language model is models/fastv.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from flax_vlm.build import build
from flax_vlm.nn.connectors import Tokens, pixel_shuffle
from flax_vlm.shapes import check_shapes


class Compression(Protocol):
    """What all of them are."""

    def num_tokens(self, patches: int) -> int:
        """Returns Q for P patches."""

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, Q, D'], [B, Q] or None)."""


@dataclasses.dataclass(frozen=True)
class AveragePool:
    """The mean of r x r patches of a square grid; of the real ones among them with a mask.

    Attributes:
        scale: r; must divide the side of the grid.
    """

    scale: int = 2

    def num_tokens(self, patches: int) -> int:
        """Returns Q for P patches: P / r^2."""
        return patches // self.scale**2

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, P / r^2, D], mask: True where any of the patches is real).

        Args:
            x: [B, P, D], row-major.
            mask: [B, P] bool, True = real token; None keeps all.
        """
        batch, _, width = x.shape
        if mask is None:
            cells = pixel_shuffle(x, self.scale)
            return cells.reshape(batch, -1, self.scale**2, width).mean(axis=2), None
        weight = pixel_shuffle(mask[:, :, None].astype(x.dtype), self.scale)  # [B, Q, r^2]
        cells = pixel_shuffle(jnp.where(mask[:, :, None], x, 0), self.scale)
        total = cells.reshape(batch, -1, self.scale**2, width).sum(axis=2)
        count = weight.sum(axis=2, keepdims=True)  # [B, Q, 1]
        return total / jnp.maximum(count, 1), count[:, :, 0] > 0


@dataclasses.dataclass(frozen=True)
class PixelShuffle:
    """r x r patches of a square grid side by side in one token; nothing is lost.

    Attributes:
        scale: r; must divide the side of the grid.
    """

    scale: int = 2

    def num_tokens(self, patches: int) -> int:
        """Returns Q for P patches: P / r^2."""
        return patches // self.scale**2

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, P / r^2, r^2 D], None).

        Raises:
            ValueError: for a mask: patches that are joined must all be there.
        """
        if mask is not None:
            raise ValueError("pixel_shuffle joins patches of whole images, it takes no mask")
        return pixel_shuffle(x, self.scale), None


@dataclasses.dataclass(frozen=True)
class TokenMerging:
    """Bipartite soft matching, again and again until Q tokens are left.

    A round: the 1st, 3rd, 5th ... token each look for the most similar one (cosine) of the 2nd, 4th
    ...; the r pairs that are most alike become one token each, the mean weighted by how many
    patches it already holds.

        a0 b0 a1 b1 a2 b2      a0 -> b1 and a2 -> b1 are the most alike
        b0 (a0 b1 a2) a1 b2    in the order of the image: a merged token stands where b1 stood

    Differs from the paper: the encoder is left as it is and its output is merged, so that keys of
    an attention and the proportional attention of the layers after are not needed; half of the
    tokens go in a round at most, and there are as many rounds as it takes; tokens keep their order,
    since a language model reads them in it.

    Attributes:
        tokens: Q; fewer patches than that are left alone.
    """

    tokens: int

    def num_tokens(self, patches: int) -> int:
        """Returns min(Q, P)."""
        return min(self.tokens, patches)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> Tokens:
        """Returns ([B, Q, D], mask: True where any of the patches is real).

        Args:
            x: [B, P, D].
            mask: [B, P] bool, True = real token; what masked tokens hold changes no real one.
        """
        check_shapes("B P D; B P", x, mask)
        if self.tokens < 1:
            raise ValueError(f"token_merging must leave at least one token, got {self.tokens}")
        if x.shape[1] <= self.tokens:
            return x, mask
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask
        place = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        merged = _Merged(x.astype(jnp.float32), real.astype(jnp.float32), place)
        while (count := merged.x.shape[1]) > self.tokens:
            merged = _merge(merged, min(count - self.tokens, count // 2))
        order = jnp.argsort(merged.place, axis=1)
        tokens = jnp.take_along_axis(merged.x, order[:, :, None], axis=1).astype(x.dtype)
        size = jnp.take_along_axis(merged.size, order, axis=1)
        return tokens, None if mask is None else size > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Merged:
    """Tokens between two rounds.

    Attributes:
        x: [B, n, D] float32.
        size: [B, n] float32, how many real patches each holds.
        place: [B, n] int32, the patch in whose place it stands.
    """

    x: jax.Array
    size: jax.Array
    place: jax.Array

    def take(self, index: jax.Array) -> _Merged:
        """Returns chosen tokens [B, m] of every row."""
        return _Merged(
            jnp.take_along_axis(self.x, index[:, :, None], axis=1),
            jnp.take_along_axis(self.size, index, axis=1),
            jnp.take_along_axis(self.place, index, axis=1),
        )


def _merge(tokens: _Merged, pairs: int) -> _Merged:
    """Returns the tokens with so many pairs made one."""
    a, b = (jax.tree.map(lambda leaf, k=k: leaf[:, k::2], tokens) for k in (0, 1))
    similar = jnp.einsum("BaD,BbD->Bab", _unit(a.x), _unit(b.x))
    similar = jnp.where((b.size > 0)[:, None, :], similar, -2.0)
    best, target = similar.max(axis=2), similar.argmax(axis=2)  # [B, a]
    best = jnp.where(a.size > 0, best, 2.0)  # nothing is lost with a masked token: it goes first
    order = jnp.argsort(-best, axis=1)
    gone, kept = a.take(order[:, :pairs]), a.take(jnp.sort(order[:, pairs:], axis=1))
    target = jnp.take_along_axis(target, order[:, :pairs], axis=1)
    into = jax.nn.one_hot(target, b.x.shape[1], dtype=jnp.float32) * gone.size[:, :, None]
    size = b.size + into.sum(axis=1)  # [B, b]
    # what masked tokens hold may be anything: not a number, too
    real = [jnp.where((part.size > 0)[:, :, None], part.x, 0) for part in (b, gone)]
    total = real[0] * b.size[:, :, None] + jnp.einsum("Brb,BrD->BbD", into, real[1])
    mean = total / jnp.maximum(size, 1)[:, :, None]
    return jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves, axis=1), kept, _Merged(mean, size, b.place)
    )


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


COMPRESSIONS: dict[str, Callable[..., Compression]] = {
    "average_pool": AveragePool,
    "pixel_shuffle": PixelShuffle,
    "token_merging": TokenMerging,
}


def build_compression(spec: Mapping[str, Any]) -> Compression:
    """Returns the compression of a config, {"name": a key of COMPRESSIONS, ...}."""
    return build(COMPRESSIONS, spec, "compression")
