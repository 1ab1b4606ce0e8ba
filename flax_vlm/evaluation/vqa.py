# SPDX-License-Identifier: Apache-2.0
"""VQA accuracy by the official ten-answer rule, for VQAv2, TextVQA, OK-VQA and the like.

    score = mean over the annotators i of min(matches among the others than i / 3, 1)

so that an answer that 0, 1, 2, 3, 4 or more of ten people gave gets 0, 0.3, 0.6, 0.9, 1. Equal are
answers after the normalisation of the VQA evaluation server: lower case, punctuation, number words,
articles, apostrophes of contractions.

Paper: Goyal et al. 2017, arXiv:1612.00837; rule: visualqa.org/evaluation. Differs from the official
script: answers are always normalised, where it leaves them as they are if all ten agree letter by
letter (as in open_flamingo).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_vlm.evaluation.answered import answer_all, kind_means, write_answers
from flax_vlm.evaluation.base import Predictor

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBER_WORDS = {"none": "0", **{word: str(n) for n, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")
# Not here are those that are other words without their apostrophe: she'd, he'll, we're, let's ...
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# every way to leave out one apostrophe
_APOSTROPHES = {
    word[:n] + word[n + 1 :]: word
    for word in CONTRACTIONS
    for n, letter in enumerate(word)
    if letter == "'"
}


def normalize_vqa(text: str) -> str:
    """Returns an answer as the VQA evaluation server compares it."""
    text = " ".join(text.split())
    thousands = re.search(r"\d,\d", text) is not None
    out = text
    for mark in MARKS:
        # "half-full" is two words, "half- full" and "1,000" lose the mark alone
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if thousands or beside_space else " ")
    out = re.sub(r"\.(?!\d)", "", out).lower()
    words = [NUMBER_WORDS.get(word, word) for word in out.split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of a prediction in 0..1.

    Args:
        prediction: any text.
        answers: of the annotators, ten in the published sets.

    Raises:
        ValueError: for fewer than four answers: no prediction could get 1.
    """
    if len(answers) < 4:
        raise ValueError(
            f"the VQA rule needs the answers of at least four people, got {list(answers)}; use the "
            f"evaluator 'answers' for questions with one right answer"
        )
    found = normalize_vqa(prediction)
    matches = np.array([normalize_vqa(answer) == found for answer in answers])
    others = matches.sum() - matches  # [annotators]: matches without each
    return float(np.minimum(others / 3, 1).mean())


@dataclasses.dataclass(frozen=True)
class Vqa:
    """Measures the prediction "generate" against ten answers.

    Attributes:
        dataset: instructions with meta["answers"].
        batch_size: global; changes no result.
        num_pictures: questions in answers.png.
    """

    dataset: Dataset
    batch_size: int = 64
    num_pictures: int = 12

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns "vqa_accuracy", "<kind>/vqa_accuracy" and "examples"; writes answers.jsonl."""
        answered = answer_all(predictor, self.dataset, self.batch_size)
        scores = [vqa_score(one.prediction, one.accepted) for one in answered]
        metrics = kind_means("vqa_accuracy", answered, scores)
        if folder is not None:
            title = f"VQA accuracy {100 * metrics['vqa_accuracy']:.1f} %"
            write_answers(folder, self.dataset, answered, scores, self.num_pictures, title)
        return metrics
