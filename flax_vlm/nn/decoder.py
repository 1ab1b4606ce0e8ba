# SPDX-License-Identifier: Apache-2.0
"""The layer of a language model, and what each of its queries may see.

Papers: LLaMA, Touvron et al. 2023, arXiv:2302.13971, section 2.2 (RMSNorm before each sub-layer);
Gemma 2, arXiv:2408.00118, section 2 (one more after each); Mistral, arXiv:2310.06825, section 2
(sliding window).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_vlm.nn.ambient_mesh import keep_rows
from flax_vlm.nn.kv_cache import PADDING, KVCache
from flax_vlm.nn.masks import combine_masks
from flax_vlm.nn.rotary import Rotary
from flax_vlm.shapes import check_shapes


class DecoderBlock(nn.Module):
    """One layer: x + post_norm1(attention(norm1(x))), then x + post_norm2(mlp(norm2(x))).

    Attributes:
        make_norm: name -> norm.
        make_attention: name -> MultiHeadAttention.
        make_mlp: name -> Mlp.
        post_norms: there are post_norm1 and post_norm2 (Gemma 2).
    """

    make_norm: Callable[..., nn.Module]
    make_attention: Callable[..., nn.Module]
    make_mlp: Callable[..., nn.Module]
    post_norms: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, KVCache | None],
        layer: jax.Array,
        window: jax.Array | None,
        visible: jax.Array | None,
        distance: jax.Array | None,
        rotary: Rotary,
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        """Returns ((x [B, S, D], cache), None): the carry of the scan, and nothing per layer.

        Args:
            carry: (x [B, S, D], a KVCache with slots claimed for the S tokens, or None).
            layer: [] int32, its number.
            window: [] int32, how many tokens a query sees, itself included; None: all.
            visible: [B|1, 1, S|1, T] bool, what may be seen besides; None: all that causality lets.
            distance: [B, 1, S, T] int32, from key to query; needed for a window.
            rotary: angles that q and k are turned by.
        """
        x, cache = carry
        x = keep_rows(x)
        mask = visible if window is None else combine_masks(visible, distance < window)
        y = self.make_norm(name="norm1")(x)
        y = self.make_attention(name="attention")(
            y,
            mask=mask,
            is_causal=cache is None,  # with a cache the positions say it
            rotary=rotary,
            cache=None if cache is None else (cache, layer),
        )
        y, cache = (y, None) if cache is None else y
        x = x + self._after("post_norm1", y)
        y = self.make_norm(name="norm2")(x)
        y = self.make_mlp(name="mlp")(y)
        return (keep_rows(x + self._after("post_norm2", y)), cache), None

    def _after(self, name: str, y: jax.Array) -> jax.Array:
        return self.make_norm(name=name)(y) if self.post_norms else y


def positions_of(mask: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Returns [B, S] int32: the number of each real token in its row, PADDING for padding.

    Args:
        mask: [B, S] bool, True = real token.
        start: [B] or a number, the position of a row's first token.
    """
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), mask.shape[:1])
    return jnp.where(mask, count + start[:, None], PADDING)


def read_slots(
    positions: jax.Array,
    mask: jax.Array | None,
    segments: jax.Array | None,
    cache: KVCache | None,
) -> tuple[jax.Array, jax.Array | None, KVCache | None]:
    """Returns (positions of the keys [B, T], what may be seen, the cache with slots claimed).

    Args:
        positions: [B, S] int32 of the tokens that are read, PADDING for padding.
        mask: [B, S] bool, True = real token; None keeps all.
        segments: [B, S] int32; see `visible_in_text`.
        cache: of the tokens before; None: there are none, and causality is not in what is returned.

    Raises:
        ValueError: if segments are read into a cache, or shapes disagree.
    """
    if cache is None:
        return positions, visible_in_text(mask, segments), None
    if segments is not None:
        raise ValueError("packed texts (segments) cannot be read into a cache")
    check_shapes("_ B _ _ _; B S", cache.k, positions)
    cache = cache.claim(positions)
    return cache.positions, visible_in_cache(positions, cache.positions), cache


def distances(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns [B, 1, S, T] int32: how far each key lies before each query.

    Args:
        queries: [B, S] int32 positions.
        keys: [B, T] int32 positions.
    """
    return (queries[:, :, None] - keys[:, None, :])[:, None]


def visible_in_cache(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns [B, 1, S, T] bool: real tokens that do not come after the query.

    Args:
        queries: [B, S] int32 positions, PADDING for padding.
        keys: [B, T] int32, the positions of a cache.
    """
    return (distances(queries, keys) >= 0) & (keys != PADDING)[:, None, None, :]


def visible_in_text(mask: jax.Array | None, segments: jax.Array | None) -> Any:
    """Returns [B, 1, S|1, S] bool, what may be seen besides causality; None: all.

    Args:
        mask: [B, S] bool, True = real token.
        segments: [B, S] int32; tokens see those of their own number.
    """
    padding = None if mask is None else mask[:, None, None, :]
    if segments is None:
        return padding
    return combine_masks(padding, (segments[:, :, None] == segments[:, None, :])[:, None])
