# SPDX-License-Identifier: Apache-2.0
"""Two choices: does the model prefer the true caption to one whose words say something else?

A caption such as "a small red circle left of a large blue square" with its attributes swapped ("a
small blue circle left of a large red square") has the same words, so that only a model that binds
attributes to objects is above 50 %. As in ARO (Yuksekgonul et al. 2023) and SugarCrepe (Hsieh et
al. 2023), but with a tie counted half, because there the first caption wins it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

from flax_vlm.evaluation import scores
from flax_vlm.evaluation.base import Predictor, embed_texts, predict_all

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset


@dataclasses.dataclass(frozen=True)
class TwoChoice:
    """Measures how often cos(image, caption) > cos(image, swapped caption).

    Attributes:
        dataset: examples whose `meta[key]` holds another caption; those without one are left out.
        batch_size: global; changes no result.
        key: of the example's meta.
    """

    dataset: Dataset
    batch_size: int = 256
    key: str = "swapped"

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns the accuracy.

        Returns:
            "accuracy", a tie counts half; "accuracy_low" and "accuracy_high", its 95 % Wilson
            interval; "examples", all that could be read; "examples_with_swap", those counted.
        """
        names = ["image_embedding", "text_embedding"]
        rows = predict_all(predictor, self.dataset, names, self.batch_size)
        chosen = [n for n, i in enumerate(rows["index"]) if self._swapped[i]]
        if not chosen:
            raise ValueError(
                f"two_choice needs examples with meta[{self.key!r}], "
                f"got none of {len(rows['index'])}; use a dataset that has them, such as shapes"
            )
        wrong = embed_texts(
            predictor,
            self.dataset.preprocess,
            [self._swapped[rows["index"][n]] for n in chosen],
            self.batch_size,
        )
        image, right = (scores.unit(rows[name][chosen]) for name in names)
        points = scores.two_choice((image * right).sum(1), (image * scores.unit(wrong)).sum(1))
        low, high = scores.wilson_interval(points.sum(), len(points))
        return {
            "accuracy": float(points.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "examples": len(rows["index"]),
            "examples_with_swap": len(points),
        }

    @functools.cached_property
    def _swapped(self) -> list[str]:
        """Returns the other caption of every example, "" where there is none; read only once."""
        source = self.dataset.source
        return [source[i].get("meta", {}).get(self.key) or "" for i in range(len(source))]
