# SPDX-License-Identifier: Apache-2.0
"""Answer accuracy: a generated answer is right if it equals an accepted one after normalisation.

Per kind of question, and beside the majority answer: the share that a model would get right that
answers every question of a kind with one and the same text, the best one for the evaluated set
itself. No constant taken from the training data can do better, so a model above it has read the
question or the image. Which of the two, another run's answers beside them tell: of a model that was
trained on the same questions without their images, say.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_vlm.evaluation import scores
from flax_vlm.evaluation.answered import Answered, answer_all, kind_means, write_answers
from flax_vlm.evaluation.base import Predictor

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset

SENTENCE_MARKS = " .,;:!?\"'()[]"  # a minus sign and "%" are part of an answer


def normalize_answer(text: str) -> str:
    """Returns a text in lower case, with single spaces and no SENTENCE_MARKS at its ends."""
    return " ".join(text.casefold().split()).strip(SENTENCE_MARKS)


def is_correct(one: Answered) -> bool:
    """Returns whether the prediction equals an accepted answer after normalisation.

    An empty prediction is wrong, even where an accepted answer consists of punctuation alone.
    """
    found = normalize_answer(one.prediction)
    return bool(found) and found in map(normalize_answer, one.accepted)


def majority_accuracy(answered: Sequence[Answered]) -> float:
    """Returns the share that accepts the answer which most of these questions accept.

    Args:
        answered: questions of one kind.
    """
    counts = collections.Counter(
        text for one in answered for text in {normalize_answer(a) for a in one.accepted}
    )
    return max(counts.values()) / len(answered)


def answer_metrics(answered: Sequence[Answered], correct: Sequence[bool]) -> dict[str, float]:
    """Returns accuracies, overall and per kind.

    Args:
        answered: questions, at least one.
        correct: of each.

    Returns:
        "accuracy"; "accuracy_low" and "accuracy_high", its 95 % Wilson interval; "majority", of a
        model that knows the kind of a question alone; "examples"; and for every kind
        "<kind>/accuracy", "<kind>/majority", "<kind>/examples".
    """
    kinds: dict[str, list[int]] = {}
    for n, one in enumerate(answered):
        kinds.setdefault(one.kind, []).append(n)
    low, high = scores.wilson_interval(float(np.sum(correct)), len(answered))
    total = {"accuracy": float(np.mean(correct)), "accuracy_low": low, "accuracy_high": high}
    majority, metrics = 0.0, {}
    for kind, members in sorted(kinds.items()):
        share = majority_accuracy([answered[n] for n in members])
        majority += share * len(members) / len(answered)
        metrics[f"{kind}/accuracy"] = float(np.mean([correct[n] for n in members]))
        metrics[f"{kind}/majority"] = share
        metrics[f"{kind}/examples"] = len(members)
    return {**total, "majority": majority, "examples": len(answered), **metrics}


def correct_answers(file: str, answered: Sequence[Answered]) -> list[float]:
    """Returns what another run got for each of the same questions, from its answers.jsonl.

    Raises:
        ValueError: if the file has other questions.
    """
    rows = [json.loads(line) for line in pathlib.Path(file).read_text().splitlines()]
    theirs = [(row["index"], row["question"]) for row in rows]
    ours = [(one.index, one.question) for one in answered]
    if theirs != ours:
        same = sum(a == b for a, b in zip(theirs, ours, strict=False))
        raise ValueError(
            f"answers stand beside those to the same questions: {file} has {len(theirs)}, here are "
            f"{len(ours)}, and {same} of them are the same; evaluate both runs on the same data"
        )
    return [float(row["correct"]) for row in rows]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Measures the prediction "generate" against the accepted answers.

    Attributes:
        dataset: instructions, its preprocess makes prompts; see `answered.answer_all`.
        batch_size: global; changes no result.
        num_pictures: questions in answers.png.
        beside: {name: the answers.jsonl of another run to the same questions}; the accuracy of that
            run is "name" and, for every kind, "<kind>/name".
    """

    dataset: Dataset
    batch_size: int = 64
    num_pictures: int = 12
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        missing = [file for file in self.beside.values() if not pathlib.Path(file).is_file()]
        if missing:
            raise ValueError(
                f"beside must name the answers.jsonl of runs that were evaluated, found no file "
                f"{', '.join(missing)}; train or evaluate those runs first"
            )

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns what `answer_metrics` reports; writes answers.jsonl and answers.png."""
        answered = answer_all(predictor, self.dataset, self.batch_size)
        correct = [is_correct(one) for one in answered]
        metrics = answer_metrics(answered, correct)
        for name, file in self.beside.items():
            metrics |= kind_means(name, answered, correct_answers(file, answered))
        if folder is not None:
            title = f"{100 * metrics['accuracy']:.1f} % of {len(answered):,} questions"
            write_answers(folder, self.dataset, answered, correct, self.num_pictures, title)
        return metrics
