# SPDX-License-Identifier: Apache-2.0
"""Image-text retrieval: recall@k from images to texts and from texts to images.

Karpathy & Fei-Fei (2015), section 4.1. Every example gives one image and one caption. Captions that
are equal (`text_id`) are right answers to each other's images: nobody could tell them apart.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_vlm.evaluation import pictures, scores
from flax_vlm.evaluation.base import Predictor, predict_all
from flax_vlm.evaluation.classification import evenly_spaced, images_of

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Measures recall@k both ways from "image_embedding" and "text_embedding".

    Attributes:
        dataset: images with captions.
        batch_size: global; changes no result.
        ks: numbers of retrieved candidates.
        num_pictures: images and captions in similarity.png.
    """

    dataset: Dataset
    batch_size: int = 256
    ks: Sequence[int] = (1, 5, 10)
    num_pictures: int = 10

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns the recalls; writes similarity.png.

        Returns:
            "i2t@k" (an image looks for its text) and "t2i@k" for every k; "examples", how many
            there are.
        """
        names = ["image_embedding", "text_embedding"]
        rows = predict_all(predictor, self.dataset, names, self.batch_size)
        image, text, ids = (rows[key] for key in (*names, "text_id"))

        def positives(queries: slice) -> np.ndarray:  # [q, n]; the same relation both ways
            return ids[queries, None] == ids[None]

        metrics: dict[str, float] = {}
        for way, queries, targets in (("i2t", image, text), ("t2i", text, image)):
            recalls = scores.recall_at_k(
                scores.retrieval_ranks(queries, targets, positives), self.ks
            )
            metrics |= {f"{way}@{k}": value for k, value in recalls.items()}
        if folder is not None:
            self._draw(folder, rows)
        return metrics | {"examples": len(ids)}

    def _draw(self, folder: pathlib.Path, rows: dict[str, np.ndarray]) -> None:
        """Writes the similarities of a few examples with different captions."""
        _, first = np.unique(rows["text_id"], return_index=True)
        chosen = np.sort(first)[evenly_spaced(self.num_pictures, len(first))]
        source = self.dataset.source
        figure = pictures.similarity_matrix(
            images_of(self.dataset, rows["index"][chosen]),
            [source[int(i)]["caption"] for i in rows["index"][chosen]],
            scores.cosines(rows["image_embedding"][chosen], rows["text_embedding"][chosen]),
            title=f"Cosine similarity of {len(chosen)} test images and captions",
        )
        pictures.save_figure(figure, folder / "similarity.png")
