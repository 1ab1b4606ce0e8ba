# SPDX-License-Identifier: Apache-2.0
"""The largest batch per chip that fits, in few compilations.

The TPU compiler refuses a program that is too large within seconds, and says how much memory it
would need; one that fits takes minutes. The need grows with the batch along a nearly straight line,
so two refusals tell the size that fills the chip: the search compiles that one, shows that the next
step up is refused, and bisects where the line was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Report = Mapping[str, Any]

STEP = 8  # sizes above it are multiples of it, sizes below it powers of two


def largest_batch(
    attempt: Callable[[int], Report], start: int, limit: int = 2**16
) -> Report | None:
    """Returns the report of the largest batch that fits, None if not even one example does.

    Exact to STEP examples, or to an eighth of the answer where that is more: a batch larger by that
    much was tried and refused.

    Args:
        attempt: batch -> report with "fits" and, where it does not, "needed_gib" and
            "available_gib" (None if the compiler did not say).
        start: the first batch to try; better too large than too small.
        limit: no larger one is tried.
    """
    best, found = 0, None
    refused: dict[int, Report] = {}
    size = _rounded(min(start, limit))
    while size:
        report = attempt(size)
        if report["fits"]:
            best, found = size, report
        else:
            refused[size] = report
        size = _next(best, refused, limit)
    return found


def _next(best: int, refused: Mapping[int, Report], limit: int) -> int:
    """Returns the next size to try; 0 where the answer is close enough."""
    too_large = min(refused, default=limit + 1)
    if best == limit or _above(best) >= too_large:
        return 0
    if len(refused) < 2 and 2 * max(best, *refused, 1) <= limit:
        return 2 * max(best, *refused, 1)
    if not refused:
        return limit
    predicted = _predict(refused)
    if predicted is not None and predicted < too_large:
        return predicted if predicted > best else _above(best)
    return max(_rounded((best + too_large) // 2), best + STEP if best >= STEP else _above(best))


def _predict(refused: Mapping[int, Report]) -> int | None:
    """Returns the size whose need fills the chip, on the line through the two smallest refusals."""
    known = sorted(size for size, report in refused.items() if report["needed_gib"])
    if len(known) < 2:
        return None
    low, high = known[:2]
    at_low, at_high = refused[low]["needed_gib"], refused[high]["needed_gib"]
    if at_high <= at_low:
        return None
    excess = at_low - refused[low]["available_gib"]
    return _rounded(max(1, low - round(excess * (high - low) / (at_high - at_low) + 0.5)))


def _above(best: int) -> int:
    """Returns the smallest size above `best` that is worth knowing."""
    return best + max(STEP, _rounded(best // 8)) if best >= STEP else max(1, 2 * best)


def _rounded(size: int) -> int:
    """Returns the size rounded down to a multiple of STEP, or to a power of two below it."""
    return size // STEP * STEP if size >= STEP else 1 << (max(size, 1).bit_length() - 1)
