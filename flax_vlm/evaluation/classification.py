# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier's logits, and what every evaluator with class scores reports."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_vlm.evaluation import pictures, scores
from flax_vlm.evaluation.base import Predictor, predict_all

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset


@dataclasses.dataclass(frozen=True)
class Classification:
    """Measures the prediction "logits" [B, classes] against the labels.

    Attributes:
        dataset: examples with a label; those without one are left out.
        batch_size: global; changes no result.
        num_pictures: test images in predictions.png.
    """

    dataset: Dataset
    batch_size: int = 256
    num_pictures: int = 24

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns what `class_metrics` reports; writes predictions.png."""
        rows = predict_all(predictor, self.dataset, ["logits"], self.batch_size)
        rows = labelled(rows, rows["logits"].shape[1])
        metrics = class_metrics(scores.label_ranks(rows["logits"], rows["label"]), rows["label"])
        if folder is not None:
            names = self.dataset.source.class_names
            names = names or [str(i) for i in range(rows["logits"].shape[1])]
            draw_predictions(
                folder,
                self.dataset,
                names,
                rows,
                rows["logits"].argmax(1),
                self.num_pictures,
                f"Classification: {100 * metrics['accuracy']:.1f} % of "
                f"{len(rows['label']):,} test images",
            )
        return metrics


def labelled(rows: dict[str, np.ndarray], num_classes: int) -> dict[str, np.ndarray]:
    """Returns the rows that have a label.

    Args:
        rows: from `predict_all`.
        num_classes: labels must be below it.

    Raises:
        ValueError: if no row has a label, or a label has no class.
    """
    labels = rows.get("label", np.full(len(rows["index"]), -1))
    keep = labels >= 0
    if not keep.any():
        raise ValueError(
            "accuracy needs examples with a label, got none; use a dataset with labels"
        )
    if labels.max() >= num_classes:
        raise ValueError(
            f"labels must be below the number of classes {num_classes}, got {labels.max()}; "
            f"the model or the class names belong to another dataset"
        )
    return {key: array[keep] for key, array in rows.items()}


def class_metrics(rank: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns what is reported about ranks of right classes.

    Args:
        rank: [n] from `scores.label_ranks`.
        labels: [n].

    Returns:
        "accuracy"; "accuracy_low" and "accuracy_high", its 95 % Wilson interval; "accuracy_top5";
        "mean_class_accuracy", over the classes that occur; "examples", how many were counted.
    """
    correct = rank == 0
    low, high = scores.wilson_interval(correct.sum(), len(correct))
    return {
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_top5": scores.recall_at_k(rank, (5,))[5],
        "mean_class_accuracy": scores.mean_class_accuracy(correct, labels),
        "examples": len(correct),
    }


def evenly_spaced(count: int, total: int) -> np.ndarray:
    """Returns at most `count` indices spread over 0..total-1: sorted data shows all classes."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def images_of(dataset: Dataset, index: Sequence[int]) -> list[np.ndarray]:
    """Returns the images [H, W, C] uint8 at positions of the source, as the model saw them."""
    source, rng = dataset.source, np.random.default_rng(0)
    return [dataset.preprocess(source[int(i)], rng)["image"] for i in index]


def draw_predictions(
    folder: pathlib.Path,
    dataset: Dataset,
    class_names: Sequence[str],
    rows: dict[str, np.ndarray],
    predicted: np.ndarray,
    count: int,
    title: str,
) -> None:
    """Writes predictions.png: evenly spaced test images with predicted labels, wrong ones in red.

    Args:
        folder: where to write.
        dataset: holds the images.
        class_names: names of the labels.
        rows: labelled rows of `predict_all`.
        predicted: [n] int.
        count: number of images.
        title: above the grid.
    """
    chosen = evenly_spaced(count, len(predicted))
    figure = pictures.prediction_grid(
        images_of(dataset, rows["index"][chosen]),
        [class_names[i] for i in predicted[chosen]],
        [class_names[i] for i in rows["label"][chosen]],
        title=title,
    )
    pictures.save_figure(figure, folder / "predictions.png")
