# SPDX-License-Identifier: Apache-2.0
"""Rules between the tensors of a checkpoint file and the leaves of our parameters.

A rule names a tensor, the leaf (or leaves) it holds and a layout, from which both directions
follow. Our blocks are scanned: "...layers.{layer}.mlp.fc1.weight" names `depth` tensors that are
the rows of one leaf. Matching is strict in both directions, and one error lists all that is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]
LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a tensor are made of the axes of a leaf.

    The tensor's axis i is the product of the leaf's axes `axes[i]`, in that order; an empty group
    is an axis of size one. [D, N, K] with axes ((1, 2), (0,)) is the tensor [N K, D].

    Attributes:
        axes: None keeps the leaf as it is.
    """

    axes: tuple[tuple[int, ...], ...] | None = None

    def tensor_shape(self, leaf: Shape) -> Shape:
        """Returns the shape of the tensor that a leaf of this shape is written to."""
        if self.axes is None:
            return leaf
        return tuple(math.prod(leaf[axis] for axis in group) for group in self.axes)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the tensor of a leaf."""
        if self.axes is None:
            return leaf
        order = [axis for group in self.axes for axis in group]
        return leaf.transpose(order).reshape(self.tensor_shape(leaf.shape))

    def to_leaf(self, tensor: np.ndarray, leaf: Shape) -> np.ndarray:
        """Returns the leaf of a tensor, the inverse of `to_tensor`.

        Args:
            tensor: of `tensor_shape(leaf)`.
            leaf: shape of the leaf.
        """
        if self.axes is None:
            return tensor
        order = [axis for group in self.axes for axis in group]
        return tensor.reshape([leaf[axis] for axis in order]).transpose(np.argsort(order))

    def row_blocks(
        self, leaf: Shape, rows: int
    ) -> Iterator[tuple[tuple[Any, ...], tuple[int, int] | None]]:
        """Yields (index of a part of the leaf, (start, stop) of the tensor's rows that hold it).

        Args:
            leaf: shape of the leaf.
            rows: of a block, about; rows that belong together stay together.
        """
        group = (0,) if self.axes is None else self.axes[0]
        if not group or not leaf:
            yield (...,), None
            return
        axis, together = group[0], math.prod(leaf[i] for i in group[1:])
        step = max(1, rows // together)
        for start in range(0, leaf[axis], step):
            stop = min(start + step, leaf[axis])
            index = (*[slice(None)] * axis, slice(start, stop))
            yield index, (start * together, stop * together)


SAME = Layout()
DENSE = Layout(((1,), (0,)))  # [in, out] -> [out, in]
HEADS = Layout(((1, 2), (0,)))  # q, k, v kernel: [D, N, K] -> [N K, D]
HEADS_BIAS = Layout(((0, 1),))  # [N, K] -> [N K]
MERGE_HEADS = Layout(((2,), (0, 1)))  # o kernel: [N, K, D] -> [D, N K]
CONV = Layout(((3,), (2,), (0,), (1,)))  # [h, w, C, D] -> [D, C, h, w]
CONV_LINEAR = Layout(((3,), (0, 1, 2)))  # [h, w, C, D] -> [D, h w C]
VECTOR = Layout(((0, 1),))  # [1, D] -> [D]
TOKENS = Layout(((), (0,), (1,)))  # [T, D] -> [1, T, D]
SCALAR = Layout(((),))  # [] -> [1]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    Attributes:
        tensor: its name; "{layer}" stands for the number of the layer.
        leaves: paths of the leaves; several are concatenated along the tensor's first axis.
        layout: of every leaf, its layer axis left out.
    """

    tensor: str
    leaves: tuple[str, ...]
    layout: Layout = SAME


def rule(tensor: str, leaf: str, layout: Layout = SAME) -> Rule:
    """Returns the rule of a tensor that holds one leaf."""
    return Rule(tensor, (leaf,), layout)


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Tensors that a file may hold and that nothing is filled from.

    Attributes:
        pattern: regular expression of the whole name.
        reason: why they are not needed.
        same_as: name of the tensor that they are tied to: they must be equal to it, bit by bit;
            None where their value does not matter.
    """

    pattern: str
    reason: str
    same_as: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a tensor that hold one leaf, or one layer of it.

    Attributes:
        leaf: its path.
        layer: index on the leaf's leading axis; None takes the whole leaf.
        shape: of the leaf, or of one layer of it.
        rows: (start, stop) on the tensor's first axis; None takes the whole tensor.
    """

    leaf: str
    layer: int | None
    shape: Shape
    rows: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that the model has: its name and shape, and where its values belong."""

    tensor: str
    shape: Shape
    layout: Layout
    parts: tuple[Part, ...]


def expand(rules: Iterable[Rule], leaves: Mapping[str, Shape]) -> list[Entry]:
    """Returns the tensors of a model: the rules that apply to it, layer by layer.

    A rule whose leaves the model does not have is left out, so that one table serves models with
    and without a head.

    Args:
        rules: of the family.
        leaves: paths and shapes of the model's parameters.

    Raises:
        ValueError: if a leaf is filled by no rule, or by two.
    """
    applicable = [r for r in rules if all(leaf in leaves for leaf in r.leaves)]
    filled = [leaf for r in applicable for leaf in r.leaves]
    bare = sorted(leaves.keys() - set(filled))
    twice = sorted({leaf for leaf in filled if filled.count(leaf) > 1})
    if bare or twice:
        raise ValueError(
            f"every parameter must have exactly one rule, got none for {bare}, two for {twice}; "
            "the family's format cannot hold this model"
        )
    entries = []
    for r in applicable:
        depth = leaves[r.leaves[0]][0] if LAYER in r.tensor else None
        for layer in [None] if depth is None else range(depth):
            entries.append(_entry(r, leaves, layer))
    return entries


def _entry(r: Rule, leaves: Mapping[str, Shape], layer: int | None) -> Entry:
    shapes = [leaves[leaf] if layer is None else leaves[leaf][1:] for leaf in r.leaves]
    tensors = [r.layout.tensor_shape(shape) for shape in shapes]
    shape = tensors[0]
    rows: list[tuple[int, int] | None] = [None]
    if len(tensors) > 1:
        ends = np.cumsum([t[0] for t in tensors]).tolist()
        rows = list(zip([0, *ends[:-1]], ends, strict=True))
        shape = (ends[-1], *shape[1:])
    parts = [Part(leaf, layer, s, x) for leaf, s, x in zip(r.leaves, shapes, rows, strict=True)]
    return Entry(r.tensor.replace(LAYER, str(layer)), shape, r.layout, tuple(parts))


def canonical_names(
    names: Iterable[str], entries: Sequence[Entry], renames: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Returns {name in the rules: name in the file}.

    A name that the rules know stays; others go through the renames, in their order.

    Args:
        names: of the file.
        entries: of the model.
        renames: (regular expression, replacement) pairs that turn another dialect into the rules'.

    Raises:
        ValueError: if two tensors of the file mean the same.
    """
    known = {entry.tensor for entry in entries}
    result: dict[str, str] = {}
    for name in names:
        new = name
        for pattern, replacement in () if name in known else renames:
            new = re.sub(pattern, replacement, new)
        if new in result:
            raise ValueError(f"one tensor must have one name, got {result[new]} and {name}")
        result[new] = name
    return result


def check_tensors(
    entries: Sequence[Entry],
    tensors: Mapping[str, Shape],
    ignored: Sequence[Ignored],
    where: str,
) -> None:
    """Raises one ValueError that lists every missing, unexpected and misshapen tensor.

    Args:
        entries: of the model.
        tensors: canonical names and shapes of the file.
        ignored: what the file may hold besides.
        where: what is being read, for the message.
    """
    expected = {entry.tensor: entry.shape for entry in entries}
    lines = [f"missing: {name} {list(expected[name])}" for name in expected if name not in tensors]
    for name, shape in tensors.items():
        if name not in expected:
            if not any(re.fullmatch(i.pattern, name) for i in ignored):
                lines.append(f"unexpected: {name} {list(shape)}")
        elif shape != expected[name]:
            lines.append(f"wrong shape: {name} {list(shape)}, needed {list(expected[name])}")
    if lines:
        raise ValueError(
            f"the tensors of {where} must be those its config says, got {len(lines)} differences; "
            "is the config that of these weights?\n  " + "\n  ".join(lines)
        )
