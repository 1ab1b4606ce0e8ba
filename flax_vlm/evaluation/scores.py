# SPDX-License-Identifier: Apache-2.0
"""Scores as pure numpy functions of predictions.

One rule for ties everywhere: **a tie is never won.** A target that scores as high as the right one
comes before it, so a collapsed model, whose scores are all equal, gets no credit for the order of
the data. (The one exception is `two_choice`, where a tie is a coin flip.) A NaN is never won
either.

Sources: recall@k as in Karpathy & Fei-Fei, "Deep Visual-Semantic Alignments" (2015), section 4.1,
with any number of right answers; Wilson, "Probable Inference, the Law of Succession, and
Statistical Inference" (1927).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

# Cosines closer than this are equal: float32 embeddings of one and the same picture differ by about
# 1e-7 when it is computed in another batch.
TIE = 1e-6


def unit(x: np.ndarray) -> np.ndarray:
    """Returns x / ||x|| over the last axis, float64; a zero vector stays zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine of every row of `a` with every row of `b`, computed in float64.

    Args:
        a: [n, E].
        b: [m, E].

    Returns:
        [n, m] float64 in -1..1.
    """
    return unit(a) @ unit(b).T


def class_embeddings(prompts: np.ndarray) -> np.ndarray:
    """Returns one unit vector per class: its prompts normalised, averaged, normalised again.

    Source: CLIP (Radford et al. 2021), section 3.1.4, and its notebook
        Prompt_Engineering_for_ImageNet.

    Args:
        prompts: [classes, templates, E].

    Returns:
        [classes, E] float64.
    """
    return unit(unit(prompts).mean(axis=1))


def label_ranks(scores: np.ndarray, labels: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """Returns how many other classes score at least as high as the right one.

    `(label_ranks(...) == 0).mean()` is the accuracy, `recall_at_k` of it the top-k accuracy.

    Args:
        scores: [n, classes].
        labels: [n] int in 0..classes-1.
        tolerance: scores closer than this are equal.

    Returns:
        [n] int64 in 0..classes-1; 0 = the right class alone is highest.
    """
    right = np.take_along_axis(scores, labels.astype(np.int64)[:, None], axis=1)  # [n, 1]
    # not "<" rather than ">=": a NaN, on either side, must count against the row
    return (~(scores < right - tolerance)).sum(axis=1) - 1  # less the right class itself


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns counts [classes, classes] int64: row = right class, column = predicted class.

    Args:
        predicted: [n] int in 0..num_classes-1.
        labels: [n] int in 0..num_classes-1.
        num_classes: size of both axes.
    """
    cells = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_class_accuracy(correct: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of the accuracies of the classes that occur.

    Args:
        correct: [n] bool.
        labels: [n] int.
    """
    return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))


def wilson_interval(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion; (0, 1) if nothing was counted.

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half   = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

    Args:
        correct: number of successes; halves are allowed.
        total: number of trials n.
        z: 1.96 for 95 %.
    """
    if total == 0:
        return 0.0, 1.0
    p, spread = correct / total, z * z / total
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def ranks(similarity: np.ndarray, positives: np.ndarray, tolerance: float = TIE) -> np.ndarray:
    """Returns how many wrong targets come before the best right one.

    rank = #{wrong j : s_j >= max over right i of s_i - tolerance}

    Right targets never push each other down, and a wrong target that ties with the best right one
    comes before it.

    Args:
        similarity: [q, m] float, queries by targets.
        positives: [q, m] bool, True = right answer.
        tolerance: scores closer than this are equal.

    Returns:
        [q] int64; 0 = a right target is retrieved first.

    Raises:
        ValueError: if a query has no right answer.
    """
    if not positives.any(axis=1).all():
        found = np.flatnonzero(~positives.any(axis=1))
        raise ValueError(
            f"every query needs a right answer, queries {found[:5].tolist()} have none"
        )
    best = np.where(positives, similarity, -np.inf).max(axis=1, keepdims=True)  # [q, 1]
    # as in label_ranks, a NaN counts against the query
    return (~(similarity < best - tolerance) & ~positives).sum(axis=1)


def retrieval_ranks(
    queries: np.ndarray,
    targets: np.ndarray,
    positives: Callable[[slice], np.ndarray],
    chunk: int = 1024,
) -> np.ndarray:
    """Returns `ranks` of all queries by cosine; memory grows with chunk * m, not with n * m.

    Args:
        queries: [n, E].
        targets: [m, E].
        positives: (slice of queries) -> [q, m] bool, True = right answer.
        chunk: queries at a time.

    Returns:
        [n] int64.
    """
    queries, targets = unit(queries), unit(targets)
    slices = [slice(start, start + chunk) for start in range(0, len(queries), chunk)]
    return np.concatenate([ranks(queries[s] @ targets.T, positives(s)) for s in slices])


def recall_at_k(rank: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """Returns {k: share of queries with a right answer among the first k}.

    Args:
        rank: [n] int, from `ranks`, `retrieval_ranks` or `label_ranks`.
        ks: for example (1, 5, 10).
    """
    return {k: float((rank < k).mean()) for k in ks}


def two_choice(right: np.ndarray, wrong: np.ndarray, tolerance: float = TIE) -> np.ndarray:
    """Returns 1 where the right choice scores higher, 0 where the wrong one does, 1/2 for a tie.

    A tie counts half because a model that cannot tell the two apart is at chance.

    Args:
        right: [n] float, score of the right choice.
        wrong: [n] float, score of the wrong choice.
        tolerance: scores closer than this are equal.

    Returns:
        [n] float64; 0 for a NaN.
    """
    difference = np.asarray(right, np.float64) - np.asarray(wrong, np.float64)
    return (difference > tolerance) + 0.5 * (np.abs(difference) <= tolerance)
