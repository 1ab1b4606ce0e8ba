# SPDX-License-Identifier: Apache-2.0
"""POPE: does a model say that things are there which are not? Questions with yes and no.

Paper: Li et al. 2023, arXiv:2305.10355. An answer is read by LLaVA's rule: its first sentence says
no if it has the word "no" (or "No") or "not", and yes otherwise, so that no answer is left out. The
yes-ratio is of the predictions: above the share of true yeses (a half) the model sees too much.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_vlm.evaluation.answered import Answered, answer_all, write_answers
from flax_vlm.evaluation.base import Predictor

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset


def says_yes(text: str) -> bool:
    """Returns whether an answer says yes, by LLaVA's rule."""
    words = text.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def yes_no_metrics(predicted: Sequence[bool], actual: Sequence[bool]) -> dict[str, float]:
    """Returns accuracy, precision, recall and f1 of "yes", and yes_ratio of the predictions.

    What would be divided by zero is 0: a model that never says yes has no precision.

    Args:
        predicted: True = yes.
        actual: True = yes.
    """
    said, true = np.asarray(predicted, bool), np.asarray(actual, bool)
    hits = (said & true).sum()
    precision = hits / max(said.sum(), 1)
    recall = hits / max(true.sum(), 1)
    return {
        "accuracy": float((said == true).mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * hits / max(said.sum() + true.sum(), 1)),
        "yes_ratio": float(said.mean()),
    }


@dataclasses.dataclass(frozen=True)
class Pope:
    """Measures the prediction "generate" on questions whose answer is yes or no.

    Attributes:
        dataset: instructions; kinds are POPE's splits, "random", "popular" and "adversarial".
        batch_size: global; changes no result.
        num_pictures: questions in answers.png.
    """

    dataset: Dataset
    batch_size: int = 64
    num_pictures: int = 12

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns `yes_no_metrics`, "examples", and the same per kind; writes answers.jsonl."""
        answered = answer_all(predictor, self.dataset, self.batch_size)
        metrics = _metrics(answered)
        for kind in sorted({one.kind for one in answered}):
            of_kind = _metrics([one for one in answered if one.kind == kind])
            metrics |= {f"{kind}/{name}": value for name, value in of_kind.items()}
        if folder is not None:
            correct = [says_yes(one.prediction) == _truth(one) for one in answered]
            title = f"F1 {metrics['f1']:.3f}, yes-ratio {metrics['yes_ratio']:.3f}"
            write_answers(folder, self.dataset, answered, correct, self.num_pictures, title)
        return metrics


def _metrics(answered: Sequence[Answered]) -> dict[str, float]:
    said = [says_yes(one.prediction) for one in answered]
    return {**yes_no_metrics(said, [_truth(one) for one in answered]), "examples": len(answered)}


def _truth(one: Answered) -> bool:
    label = one.accepted[0].strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(
            f"pope needs questions whose answer is yes or no, example {one.index} has "
            f"{one.accepted[0]!r}; use the evaluator 'answers'"
        )
    return label == "yes"
