# SPDX-License-Identifier: Apache-2.0
"""Parameter trees by path: "image/encoder/blocks/attention/q/kernel" is the name every rule speaks
about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Tree = Any


def path_str(key_path: Sequence[Any]) -> str:
    """Returns a jax key path as "a/b/c"."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
    )


def named_leaves(tree: Tree) -> dict[str, Any]:
    """Returns {path: leaf} in the order of the tree's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_str(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """Returns the nested dict of {"a/b/c": leaf}: the inverse of `named_leaves`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        _insert(tree, path.split("/"), leaf)
    return tree


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Returns the tree of `function(path, leaf, *leaves_of_rest)`, path as "a/b/c"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *x: function(path_str(path), *x), tree, *rest
    )


def is_scanned(path: str) -> bool:
    """Returns whether a leaf has a leading layer axis, as all parameters of scanned blocks have."""
    return "blocks" in path.split("/")


def owner(path: str, leaf: Any, parameters: Mapping[str, Any]) -> str | None:
    """Returns the path of the parameter that a leaf belongs to, None if it belongs to none.

    That is the parameter in whose path the leaf's own ends and whose shape it has: an optimizer
    slot, a moving average, a teacher.

    Args:
        path: of the leaf, "0/mu/image/patches/kernel".
        leaf: with a shape.
        parameters: path -> parameter (arrays or shapes), see `named_leaves`.
    """
    parts = path.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    owners = (tail for tail in tails if tail in parameters)
    return next((o for o in owners if tuple(parameters[o].shape) == tuple(leaf.shape)), None)


def matches(patterns: Sequence[str], path: str) -> bool:
    """Returns whether any regular expression matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def check_patterns(patterns: Sequence[str], paths: Sequence[str], what: str) -> None:
    """Raises ValueError if a pattern matches no path: a rule that does nothing is a typing error.

    Args:
        patterns: regular expressions, matched against the whole path.
        paths: all parameter paths.
        what: the config key that holds the patterns, for the message.
    """
    idle = [p for p in patterns if not any(re.fullmatch(p, path) for path in paths)]
    if idle:
        raise ValueError(
            f"every rule of {what} must match a parameter path, these match none: {idle}; "
            f"paths look like {list(paths)[:5]}"
        )


def split(tree: Mapping, keep: Callable[[str], bool]) -> tuple[dict, dict]:
    """Returns (part whose paths `keep` accepts, the other part), both as nested dicts without empty
    branches.
    """
    leaves = named_leaves(tree)
    kept = {path: leaf for path, leaf in leaves.items() if keep(path)}
    return unflatten(kept), unflatten({p: leaf for p, leaf in leaves.items() if p not in kept})


def join(first: Mapping, second: Mapping) -> dict:
    """Returns the union of two nested dicts with disjoint leaves: the inverse of `split`."""
    return unflatten({**named_leaves(first), **named_leaves(second)})


def _insert(tree: dict, keys: Sequence[str], leaf: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = leaf


def num_parameters(tree: Tree) -> int:
    """Returns the number of scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Returns the size of a tree of arrays or ShapeDtypeStructs in bytes."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def differences(a: Tree, b: Tree) -> list[str]:
    """Returns one line per leaf that is missing in one tree or not bit-identical in both; [] if the
    trees are equal.
    """
    left, right = named_leaves(a), named_leaves(b)
    lines = [f"{path}: only in the first" for path in left if path not in right]
    lines += [f"{path}: only in the second" for path in right if path not in left]
    for path in left.keys() & right.keys():
        x, y = np.asarray(left[path]), np.asarray(right[path])
        if x.shape != y.shape or x.dtype != y.dtype:
            lines.append(f"{path}: {x.dtype}{x.shape} and {y.dtype}{y.shape}")
        elif x.tobytes() != y.tobytes():
            gap = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
            lines.append(f"{path}: differs by up to {gap}")
    return sorted(lines)
