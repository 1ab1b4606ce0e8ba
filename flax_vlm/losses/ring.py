# SPDX-License-Identifier: Apache-2.0
"""Every image against every text of the global batch: texts travel round a ring of devices, tile
by tile.

The idea is that of Inf-CL (arXiv 2410.17243) and Ring Attention (arXiv 2310.01889). Nothing here
is differentiated: the losses write their own backward sweep, so that no step of the ring is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flax_vlm.losses.logits import times
from flax_vlm.losses.pairs import Side

Tree = Any
# (rows, state of rows, columns, state of columns) of one tile -> (state of rows, state of columns)
Visit = Callable[[Side, Tree, Side, Tree], tuple[Tree, Tree]]


@dataclasses.dataclass(frozen=True)
class Ring:
    """How the pairs of a batch are walked (static).

    Attributes:
        tile: greatest number of rows and of columns of logits that exist at a time on a device.
        axes: mesh axes over which the batch is split; those that the mesh lacks are passed over.
        bidirectional: half of the texts travel the other way. Same bytes; on links that carry both
            directions at once (TPU tori) each direction then takes half of them. Twice as many
            messages.
        mesh: None takes the mesh of jax.set_mesh, or one device if there is none.
    """

    tile: int = 1024
    axes: tuple[str, ...] = ("data", "fsdp")
    bidirectional: bool = False
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, got {self.tile}")

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes of the mesh that split the batch; () without a mesh."""
        return tuple(axis for axis in self.axes if axis in self._mesh().shape)

    @property
    def size(self) -> int:
        """The number of devices in the ring."""
        size = 1
        for axis in self.batch_axes:
            size *= self._mesh().shape[axis]
        return size

    def _mesh(self) -> Any:
        return jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh

    def run(self, function: Callable[..., Tree], split: Tree, whole: Tree) -> Tree:
        """Returns function(split, whole) run on every device with its rows of `split` and all of
        `whole`.

        Args:
            function: returns (tree of arrays with rows, tree of scalars); the scalars are summed
                over the ring.
            split: arrays whose leading axis is a multiple of `size`.
            whole: scalars.
        """

        def local(split, whole):
            rows, sums = function(split, jax.tree.map(self._varying, whole))
            return rows, jax.lax.psum(sums, self.batch_axes) if self.batch_axes else sums

        if not self._mesh().shape:
            return local(split, whole)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(self.batch_axes), P()),
            out_specs=(P(self.batch_axes), P()),
        )(split, whole)

    def _varying(self, x: jax.Array) -> jax.Array:
        return jax.lax.pcast(x, self.batch_axes, to="varying") if self.batch_axes else x

    def full(self, shape: tuple[int, ...], dtype: jnp.dtype, value: float = 0.0) -> jax.Array:
        """Returns an array of one value: a state for `sweep` to start from."""
        return self._varying(jnp.full(shape, value, dtype))

    def sweep(
        self, visit: Visit, rows: Side, row_state: Tree, streams: tuple[tuple[Side, Tree], ...]
    ) -> tuple[Tree, tuple[Tree, ...]]:
        """Returns the states after `visit` saw every tile of pairs once; to be called inside `run`.

        Args:
            visit: called with at most tile x tile pairs.
            rows: this device's images [b].
            row_state: tree of [b, ...].
            streams: (texts [c], tree of [c, ...]) of this device; both travel, and are home again
                at the end.
        """
        streams, join = self._directions(streams)

        def turn(_, carry):
            row_state, streams = carry
            moved = []
            for number, (columns, column_state) in enumerate(streams):
                row_state, column_state = self._block(visit, rows, row_state, columns, column_state)
                moved.append(self._rotate((columns, column_state), 1 if number % 2 == 0 else -1))
            return row_state, tuple(moved)

        row_state, streams = jax.lax.fori_loop(0, self.size, turn, (row_state, streams))
        return row_state, join([state for _, state in streams])

    def _directions(self, streams: tuple) -> tuple[tuple, Callable[[list], tuple]]:
        if not self.bidirectional or any(s[0].index.shape[0] < 2 for s in streams):
            return streams, tuple
        halves = []
        for stream in streams:
            half = stream[0].index.shape[0] // 2
            halves.append(jax.tree.map(lambda x, half=half: x[:half], stream))
            halves.append(jax.tree.map(lambda x, half=half: x[half:], stream))

        def join(states):
            return tuple(map(_glue, states[::2], states[1::2]))

        return tuple(halves), join

    def _rotate(self, tree: Tree, step: int) -> Tree:
        if self.size == 1:
            return tree
        order = [(i, (i + step) % self.size) for i in range(self.size)]
        leaves, structure = jax.tree.flatten(tree)
        # one message per dtype for what is a number per row: latency, not bytes
        groups: dict[Any, list[int]] = {}
        for place, leaf in enumerate(leaves):
            groups.setdefault(leaf.dtype if leaf.ndim == 1 else place, []).append(place)
        for places in groups.values():
            sent = jnp.stack([leaves[i] for i in places])
            received = jax.lax.ppermute(sent, self.batch_axes, order)
            for i, leaf in zip(places, received, strict=True):
                leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves)

    def _block(self, visit: Visit, rows: Side, row_state: Tree, columns: Side, column_state: Tree):
        row_tiles, column_tiles = (
            _Tiles(side.index.shape[0], self.tile) for side in (rows, columns)
        )

        def over_rows(r, carry):
            row_state, column_state = carry
            some_rows = row_tiles.side(rows, r)

            def over_columns(c, carry):
                rows_seen, column_state = carry
                rows_seen, seen = visit(
                    some_rows,
                    rows_seen,
                    column_tiles.side(columns, c),
                    column_tiles.take(column_state, c),
                )
                return rows_seen, column_tiles.put(column_state, seen, c)

            rows_seen, column_state = jax.lax.fori_loop(
                0, column_tiles.count, over_columns, (row_tiles.take(row_state, r), column_state)
            )
            return row_tiles.put(row_state, rows_seen, r), column_state

        return jax.lax.fori_loop(0, row_tiles.count, over_rows, (row_state, column_state))


def _glue(first: Tree, second: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)


class _Tiles:
    """Tiles of one axis; the last one ends with the axis, what it sees twice is masked once."""

    def __init__(self, size: int, tile: int):
        self.size, self.tile = size, min(size, tile)
        self.count = -(-size // self.tile)

    def _start(self, number: jax.Array) -> jax.Array:
        return jnp.minimum(number * self.tile, self.size - self.tile)

    def take(self, tree: Tree, number: jax.Array) -> Tree:
        start = self._start(number)
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, self.tile), tree)

    def put(self, tree: Tree, part: Tree, number: jax.Array) -> Tree:
        start = self._start(number)
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part
        )

    def side(self, side: Side, number: jax.Array) -> Side:
        part = self.take(side, number)
        if self.size % self.tile == 0:
            return part
        fresh = self._start(number) + jnp.arange(self.tile) >= number * self.tile
        return dataclasses.replace(part, keep=fresh if part.keep is None else part.keep & fresh)


def add_slope(
    slope: jax.Array,
    rows: Side,
    row_state: Tree,
    columns: Side,
    column_state: Tree,
    precision: str | None,
) -> tuple[Tree, Tree]:
    """Returns the states {"image": [R, E]}, {"text": [C, E]} with d loss / d x [R, C] added."""
    image = times(slope, columns.embedding, precision)
    text = times(slope.T, rows.embedding, precision)
    return {"image": row_state["image"] + image}, {"text": column_state["text"] + text}


def embedding_gradients(
    image: jax.Array,
    texts: Sequence[jax.Array],
    scale: jax.Array,
    weight: jax.Array,
    row_state: Tree,
    column_states: Sequence[Tree],
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Returns the gradients of the images, the texts, and this device's part of that of the scale.

    Args:
        image: [b, E].
        texts: (matched [b, E], ...).
        scale: [].
        weight: [b], d loss / d x_ii of the matching pairs, which the sweep leaves out.
        row_state: {"image": [b, E]}, sum_j d loss / d x_ij T_j over the other pairs.
        column_states: {"text": ...}, the same for every array of texts.
    """
    weight = weight[:, None]
    image_slope = row_state["image"] + weight * texts[0]
    text_slopes = [state["text"] for state in column_states]
    text_slopes[0] += weight * image
    # sum_ij g_ij <I_i, T_j> needs no pass of its own
    d_scale = (image * image_slope).sum()
    d_texts = tuple(
        (scale * slope).astype(text.dtype) for slope, text in zip(text_slopes, texts, strict=True)
    )
    return (scale * image_slope).astype(image.dtype), d_texts, d_scale
