# SPDX-License-Identifier: Apache-2.0
"""Questions with the answers that a model wrote: what every evaluator of generated text begins
with, and the files it leaves (answers.jsonl, answers.png).

    prompts --"generate"--> token ids --tokenizer.decode--> Answered, in the order of the source
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_vlm.data.decode import BrokenImage, decode_image
from flax_vlm.evaluation import pictures
from flax_vlm.evaluation.base import Predictor, predict_all

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset

IMAGE_MARKER = "<image>"
NO_KIND = "other"  # kind of the questions whose meta names none


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question, what the model wrote, and what would be right.

    Attributes:
        index: position in the source.
        kind: of the question, `meta["kind"]`.
        question: the turn of the user that is answered, without image markers.
        prediction: what the model wrote, without white space around it.
        accepted: right answers, at least one: `meta["answers"]`, else the content of the last turn.
        meta: of the example.
    """

    index: int
    kind: str
    question: str
    prediction: str
    accepted: tuple[str, ...]
    meta: Mapping[str, Any]


def answer_all(predictor: Predictor, dataset: Dataset, batch_size: int) -> list[Answered]:
    """Returns the readable examples of an instruction dataset with the model's answers.

    Args:
        predictor: with the prediction "generate"; all processes must call.
        dataset: its preprocess makes prompts, padded on the left and ending where the answer to the
            last turn of the user begins; `preprocess.tokenizer` decodes.
        batch_size: of the global batch; changes no result.

    Raises:
        ValueError: if no example can be read, or one has no answer.
    """
    rows = predict_all(predictor, dataset, ["generate"], batch_size)
    tokenizer = dataset.preprocess.tokenizer
    return [
        _answered(int(index), dataset.source[int(index)], tokenizer.decode(tokens).strip())
        for index, tokens in zip(rows["index"], rows["generate"], strict=True)
    ]


def _answered(index: int, example: Mapping[str, Any], prediction: str) -> Answered:
    meta, conversation = example.get("meta", {}), example["conversation"]
    last = conversation[-1] if conversation else {}
    accepted = tuple(meta.get("answers") or ())
    if not accepted and last.get("role") == "assistant":
        accepted = (last["content"],)
    if not accepted:
        raise ValueError(
            f"example {index} must have an answer to be evaluated: meta['answers'] or a last turn "
            f"of the assistant, got {[turn['role'] for turn in conversation]}"
        )
    asked = [turn["content"] for turn in conversation if turn["role"] == "user"]
    question = " ".join((asked[-1] if asked else "").replace(IMAGE_MARKER, " ").split())
    return Answered(index, meta.get("kind", NO_KIND), question, prediction, accepted, meta)


def kind_means(
    name: str, answered: Sequence[Answered], scores: Sequence[float]
) -> dict[str, float]:
    """Returns {name: mean of all scores, "<kind>/name": that of each kind, "examples": n}."""
    metrics = {name: float(np.mean(scores)), "examples": len(answered)}
    for kind in sorted({one.kind for one in answered}):
        members = [s for one, s in zip(answered, scores, strict=True) if one.kind == kind]
        metrics[f"{kind}/{name}"] = float(np.mean(members))
    return metrics


def write_answers(
    folder: pathlib.Path,
    dataset: Dataset,
    answered: Sequence[Answered],
    scores: Sequence[float],
    num_pictures: int,
    title: str,
) -> None:
    """Writes answers.jsonl, one object per question, and answers.png with some of the images.

    Args:
        folder: where to write; made if it is not there.
        dataset: holds the images.
        answered: from `answer_all`.
        scores: what each answer got, 0..1 (true and false for right and wrong).
        num_pictures: how many questions are drawn, evenly spaced; 0 draws none.
        title: above the picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_json_row(one, score) for one, score in zip(answered, scores, strict=True)]
    file = folder / "answers.jsonl"
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(unfinished, file)
    shown = _with_images(dataset, answered, num_pictures)
    if shown:
        numbers = list(shown)
        figure = pictures.question_grid(
            [shown[n] for n in numbers],
            [answered[n].question for n in numbers],
            [answered[n].prediction for n in numbers],
            [answered[n].accepted[0] for n in numbers],
            [scores[n] >= 0.5 for n in numbers],
            title=title,
        )
        pictures.save_figure(figure, folder / "answers.png")


def _json_row(one: Answered, score: float) -> dict[str, Any]:
    row = {"index": one.index, "kind": one.kind, "question": one.question}
    answer = one.accepted[0] if len(one.accepted) == 1 else list(one.accepted)
    return {**row, "prediction": one.prediction, "answer": answer, "correct": score}


def _with_images(
    dataset: Dataset, answered: Sequence[Answered], count: int
) -> dict[int, np.ndarray]:
    """Returns {number in `answered`: its first image}; questions without an image are left out."""
    spaced = np.linspace(0, len(answered) - 1, min(count, len(answered))).round()
    found = {}
    for n in np.unique(spaced.astype(np.int64)).tolist():
        images = dataset.source[answered[n].index]["images"]
        if not images:
            continue
        first = pathlib.Path(images[0]) if isinstance(images[0], str) else images[0]
        try:
            found[n] = decode_image(first)
        except BrokenImage:
            continue  # it was answered without the image, and is counted where images are read
    return found
