# SPDX-License-Identifier: Apache-2.0
"""The largest batch per chip that fits, in few compilations.

Memory grows with the batch along a nearly straight line, so that one size that fits predicts the
one that fills the chip: the search goes there, proves that the next step up does not fit, and
bisects where the prediction was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Report = Mapping[str, Any]

GB_PER_GIB = 2**30 / 1e9
STEP = 8  # sizes above it are multiples of it, sizes below it powers of two


def largest_batch(
    attempt: Callable[[int], Report], start: int, limit: int = 2**16
) -> Report | None:
    """Returns the report of the largest batch that fits, None if not even one example does.

    Exact to STEP examples, or to an eighth of the answer where that is more: a batch larger by that
    much was tried and did not fit.

    Args:
        attempt: batch -> report with "fits" and, where it fits, "hbm_gib" (or None),
            "argument_gb" and "peak_gb".
        start: the first batch to try.
        limit: no larger one is tried.
    """
    best, found = 0, None
    too_large, size = limit + 1, _rounded(min(start, limit))
    while size:
        report = attempt(size)
        if report["fits"]:
            best, found = size, report
        else:
            too_large = size
        if too_large > limit:
            size = min(limit, _upward(best, found)) if best < limit else 0
        else:
            size = _between(best, too_large)
    return found


def _upward(best: int, found: Report) -> int:
    """Returns the next size to try where none has failed yet."""
    if not found["hbm_gib"]:
        return 2 * best
    per_example = (found["peak_gb"] - found["argument_gb"]) / best
    fills = (found["hbm_gib"] * GB_PER_GIB - found["argument_gb"]) / per_example
    if fills < best:  # a report of memory that counts more than the compiler needs
        return max(_above(best), _rounded(best * 3 // 2))
    # a little below: what just fits is worth more than what just does not
    return max(_above(best), _rounded(int(0.95 * fills)))


def _between(best: int, too_large: int) -> int:
    """Returns a size between one that fits and one that does not; 0 where they are close enough."""
    if _above(best) >= too_large:
        return 0
    return max(_rounded((best + too_large) // 2), best + STEP if best >= STEP else _above(best))


def _above(best: int) -> int:
    """Returns the smallest size above `best` that is worth knowing."""
    return best + max(STEP, _rounded(best // 8)) if best >= STEP else max(1, 2 * best)


def _rounded(size: int) -> int:
    """Returns the size rounded down to a multiple of STEP, or to a power of two below it."""
    return size // STEP * STEP if size >= STEP else 1 << (max(size, 1).bit_length() - 1)
