# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens that a decoder has read: slots of a fixed number, filled in order.

All rows fill the same slots, so that a step is one write of a static shape; what a slot holds of a
row is said by its position in the row's own text, -1 for padding. Whether a query sees a key is
decided by their positions alone, and gaps in a row (left padding, or a shorter question behind a
shared prefix) change nothing.

With dtype int8 every key and value vector is stored with a scale of its own, largest / 127: K + 4
bytes for the 2 K of bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from flax_vlm.nn.ambient_mesh import BATCH_AXES, HEAD_AXIS, ambient_mesh_shape

STORES = ("k", "v", "k_scale", "v_scale")
PADDING = -1  # the position of a slot that nothing may see


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers.

    Attributes:
        k: [layers, B, T, M, K], keys as they are attended to, already turned.
        v: [layers, B, T, M, K].
        k_scale: [layers, B, T, M] float32 for int8, else None.
        v_scale: likewise.
        positions: [B, T] int32, of every slot's token in its row's text; PADDING is seen by none.
        length: [] int32, slots that are filled.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    positions: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """T, the number of slots."""
        return self.k.shape[2]

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self.k.shape[1]

    def next_position(self) -> jax.Array:
        """Returns [B] int32: where each row's text goes on."""
        return self.positions.max(axis=1) + 1

    def claim(self, positions: jax.Array) -> KVCache:
        """Returns the cache with slots for S more tokens; `write` fills them, layer by layer.

        Args:
            positions: [B, S] int32; PADDING for padding.
        """
        new = jax.lax.dynamic_update_slice(self.positions, positions, (0, self.length))
        length = self.length + positions.shape[1]
        return dataclasses.replace(self, positions=new, length=length)

    def write(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
        """Returns the cache with keys and values of a layer in the slots that were claimed last.

        Args:
            layer: [] int32.
            k: [B, S, M, K].
            v: [B, S, M, K].
        """
        start = (layer, 0, self.length - k.shape[1], 0)
        new: dict[str, Any] = {}
        for name, x in (("k", k), ("v", v)):
            store, scales = getattr(self, name), getattr(self, f"{name}_scale")
            if scales is not None:
                x, scale = quantize_vectors(x)
                update = jax.lax.dynamic_update_slice(scales, scale[None], start)
                new[f"{name}_scale"] = update
            x = x.astype(store.dtype)[None]
            new[name] = jax.lax.dynamic_update_slice(store, x, (*start, 0))
        return dataclasses.replace(self, **new)

    def read(self, layer: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of a layer, [B, T, M, K] each, in `dtype`."""
        result = []
        for store, scales in ((self.k, self.k_scale), (self.v, self.v_scale)):
            x = jax.lax.dynamic_index_in_dim(store, layer, keepdims=False)  # [B, T, M, K]
            if scales is not None:
                scale = jax.lax.dynamic_index_in_dim(scales, layer, keepdims=False)
                x = x.astype(jnp.float32) * scale[..., None]
            result.append(x.astype(dtype))
        return result[0], result[1]

    def grow(self, capacity: int) -> KVCache:
        """Returns the cache with more slots behind those it has.

        Args:
            capacity: T, at least the present one.
        """
        more = (0, capacity - self.capacity)

        def longer(x: jax.Array | None) -> jax.Array | None:
            return (
                None
                if x is None
                else split(jnp.pad(x, [(0, 0)] * 2 + [more] + [(0, 0)] * (x.ndim - 3)))
            )

        positions = jnp.pad(self.positions, [(0, 0), more], constant_values=PADDING)
        stores = {name: longer(getattr(self, name)) for name in STORES}
        return dataclasses.replace(self, **stores, positions=positions)

    def take(self, rows: jax.Array) -> KVCache:
        """Returns the cache of chosen rows, in their order, repeated as often as they are named.

        Args:
            rows: [B'] int32.
        """
        stores = {
            name: None if getattr(self, name) is None else getattr(self, name)[:, rows]
            for name in STORES
        }
        return dataclasses.replace(self, **stores, positions=self.positions[rows])


def init_cache(
    layers: int,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
) -> KVCache:
    """Returns an empty cache, split over the ambient mesh: rows as the batch, heads over `tensor`.

    Args:
        layers: number of them.
        batch: B.
        capacity: T, slots for the prompt and all that is generated.
        num_kv_heads: M.
        head_dim: K.
        dtype: of the store, "float32", "bfloat16" or "int8".
    """
    shape = (layers, batch, capacity, num_kv_heads, head_dim)
    stores = [split(jnp.zeros(shape, dtype)) for _ in "kv"]
    scales: list[jax.Array | None] = [None, None]
    if jnp.dtype(dtype) == jnp.int8:
        scales = [split(jnp.ones(shape[:-1], jnp.float32)) for _ in "kv"]
    positions = jnp.full((batch, capacity), PADDING, jnp.int32)
    return KVCache(*stores, *scales, positions, jnp.zeros((), jnp.int32))


def split(x: jax.Array) -> jax.Array:
    """Returns [layers, B, T, M, ...] split over the ambient mesh, where its axes divide it."""
    mesh_shape = ambient_mesh_shape() or {}
    rows = tuple(axis for axis in BATCH_AXES if axis in mesh_shape)
    rows = rows if x.shape[1] % math.prod(mesh_shape[axis] for axis in rows) == 0 else ()
    heads = (
        HEAD_AXIS if HEAD_AXIS in mesh_shape and x.shape[3] % mesh_shape[HEAD_AXIS] == 0 else None
    )
    if not mesh_shape:
        return x
    return jax.lax.with_sharding_constraint(x, P(None, rows or None, None, heads))


def quantize_vectors(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (int8 [..., K], scale [...] float32) with x nearly int8 * scale, off by half a step.

    Args:
        x: [..., K].
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-12) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale
