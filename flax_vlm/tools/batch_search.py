# SPDX-License-Identifier: Apache-2.0
"""The largest batch per chip that fits, in few compilations.

Memory grows with the batch along a nearly straight line, so two sizes that fit predict the one that
fills the chip; bisection closes in on what the compiler accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

GIB = 2**30
RESOLUTION = 8  # the answer is a multiple of this, or of a power of two below it


def largest_batch(
    attempt: Callable[[int], Mapping[str, Any]], start: int, limit: int = 2**16
) -> Mapping[str, Any] | None:
    """Returns the report of the largest batch that fits, None if not even one example does.

    The answer is exact to RESOLUTION, or to an eighth of itself where that is more.

    Args:
        attempt: batch -> report with "fits"; with "hbm_gib" and "peak_gb" where it fits.
        start: the first batch to try.
        limit: no larger one is tried.
    """
    fitting: list[tuple[int, Mapping[str, Any]]] = []
    too_large, size = limit + 1, _round(start)
    while size:
        report = attempt(size)
        if report["fits"]:
            fitting.append((size, report))
        else:
            too_large = min(too_large, size)
        best = max((fits for fits, _ in fitting), default=0)
        if too_large - best <= max(RESOLUTION, best // 8) and best:
            break
        size = _next(fitting, best, too_large, limit)
    return max(fitting, key=lambda entry: entry[0])[1] if fitting else None


def _next(
    fitting: list[tuple[int, Mapping[str, Any]]], best: int, too_large: int, limit: int
) -> int:
    """Returns the next batch to try; 0 where there is none."""
    guess = 2 * best if too_large > limit else (best + too_large) // 2
    if len(fitting) >= 2 and too_large > limit:
        (a, first), (b, second) = sorted(fitting, key=lambda entry: entry[0])[-2:]
        slope = (second["peak_gb"] - first["peak_gb"]) / (b - a)
        if slope > 0 and second.get("hbm_gib"):
            room = second["hbm_gib"] * GIB / 1e9 - second["peak_gb"]
            guess = b + int(room / slope)
    rounded = _round(min(guess, limit))
    if best < rounded < too_large:
        return rounded
    above = best + min(RESOLUTION, max(1, best))
    return above if above < too_large else 0


def _round(size: int) -> int:
    """Returns the size rounded down to a multiple of RESOLUTION, or to a power of two below it."""
    if size >= RESOLUTION:
        return size // RESOLUTION * RESOLUTION
    return 1 << (max(size, 1).bit_length() - 1)
