# SPDX-License-Identifier: Apache-2.0
"""Shape checks that read like the comments beside them: check_shapes("B L; B L", text,
text_mask).
"""

from __future__ import annotations

from typing import Any


def check_shapes(spec: str, *arrays: Any) -> dict[str, int]:
    """Returns the size of every letter, having checked that all arrays agree on it.

    Runs while tracing and leaves no operation in the compiled program.

    Args:
        spec: one group of axis names per array, groups separated by ";". A number is a fixed size,
            "_" any size, a leading "..." any number of axes. "" is a scalar.
        *arrays: anything with a shape; None is skipped.

    Raises:
        ValueError: naming the rule and the shapes that were found.
    """
    groups = [group.split() for group in spec.split(";")]
    if len(groups) != len(arrays):
        raise ValueError(
            f"check_shapes got {len(arrays)} arrays for the {len(groups)} groups of {spec!r}"
        )
    sizes: dict[str, int] = {}
    for names, array in zip(groups, arrays, strict=True):
        if array is None:
            continue
        shape = tuple(array.shape)
        if names and names[0] == "...":
            names, shape = names[1:], shape[max(0, len(shape) - len(names) + 1) :]
        fits = len(names) == len(shape)
        for name, size in zip(names, shape, strict=False):
            expected = int(name) if name.isdigit() else sizes.setdefault(name, size)
            fits = fits and (name == "_" or expected == size)
        if not fits:
            found = [None if a is None else tuple(a.shape) for a in arrays]
            raise ValueError(f"shapes must be {spec!r}, got {found}")
    sizes.pop("_", None)
    return sizes
