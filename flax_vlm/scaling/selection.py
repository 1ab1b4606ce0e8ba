# SPDX-License-Identifier: Apache-2.0
"""Which points a law is fitted to: the best model of each compute bin, or those no other beats.

A law of the frontier fitted to all points is another law: on Cherti et al.'s points plain least
squares gives an exponent of -0.1012, the best of each bin -0.1114. Papers: Cherti et al. 2022,
arXiv:2212.07143; Nezhurina et al. 2025, arXiv:2506.04598.
"""

from __future__ import annotations

import numpy as np


def binned_minimum(
    x: np.ndarray, y: np.ndarray, bins: int = 5, pad: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns bin centres and the least y of each bin: Cherti et al.'s points.

    The bins are equally wide in log10 x, from the least x to `pad` decades above the largest. The
    x of a bin is its centre, not that of its best model. Empty bins are left out.

    Args:
        x: [n] > 0.
        y: [n].
        bins: how many.
        pad: decades.
    """
    log = np.log10(np.asarray(x, np.float64))
    edges = np.linspace(log.min(), log.max() + pad, bins + 1)
    place = np.digitize(log, edges) - 1
    filled = [b for b in range(bins) if (place == b).any()]
    centres = 0.5 * (edges[:-1] + edges[1:])
    y = np.asarray(y, np.float64)
    return 10 ** centres[filled], np.array([y[place == b].min() for b in filled])


def improving_bins(x: np.ndarray, y: np.ndarray, edges: int | None = None) -> np.ndarray:
    """Returns indices of the best point of each geometric bin, as long as they improve.

    Nezhurina et al.'s frontier: bins are half open, so that the largest x lies in none; it is added
    at the end if it improves on all before.

    Args:
        x: [n] > 0.
        y: [n].
        edges: of bins; None takes the paper's int(log2(max x / 1500)), which is meant for GFLOP.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    count = int(np.log(x.max() / 1500) / np.log(2)) if edges is None else edges
    limits = np.geomspace(x.min(), x.max(), count)
    chosen: list[int] = []
    for low, high in zip(limits[:-1], limits[1:], strict=True):
        inside = np.flatnonzero((x >= low) & (x < high))
        if len(inside):
            best = inside[np.argmin(y[inside])]
            if not chosen or y[best] < y[chosen[-1]]:
                chosen.append(int(best))
    last = int(np.argmax(x))
    return np.array(chosen + ([last] if y[last] < y[chosen[-1]] else []))


def pareto_front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns indices, by rising x, of the points that no point with as little x beats in y."""
    order = np.lexsort((y, x))
    best = np.minimum.accumulate(np.asarray(y, np.float64)[order])
    first = np.concatenate([[True], np.diff(best) < 0])
    return order[first]
