# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: the letter of an option is read out of a generated answer, or the reading fails.

A failure counts as wrong and its share is reported. Nothing is drawn by chance: runners that fall
back to a random option print several points more for the same model.

For MMMU (arXiv:2311.16502; micro-average over all questions), ScienceQA, MMStar, AI2D. Differs from
MMMU's own script: open questions (no options) are right by `answers.is_correct`, which does not
look for a number inside a sentence.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_vlm.evaluation.answered import Answered, answer_all, kind_means, write_answers
from flax_vlm.evaluation.answers import is_correct, normalize_answer
from flax_vlm.evaluation.base import Predictor

if TYPE_CHECKING:
    from flax_vlm.data.pipeline import Dataset

LETTERS = string.ascii_uppercase


def parse_letter(text: str, options: Sequence[str]) -> str | None:
    """Returns the letter that an answer chooses; None if it cannot be read.

    A text that joins two letters ("A or B", "A, C") chooses none. Otherwise the first of these that
    finds exactly one option: the text is a letter, or begins with one and
    a mark ("B", "B.", "(B) because"); it says "answer is B" or "answer: (B)"; it holds a letter in
    brackets; it is the text of an option; it holds the text of an option.

    Args:
        text: what the model wrote.
        options: texts of A, B, C ...; at most 26.
    """
    text, letters = text.strip(), LETTERS[: len(options)]
    if re.search(rf"(?<!\w)[{letters}]\)?\s*(?:,|/|or|and)\s*\(?[{letters}](?![\w'])", text):
        return None
    patterns = (
        rf"^\(?([{letters}])(?:$|[).:,]|\s*\n)",
        rf"(?i:\banswer)(?i:\s+is)?\s*:?\s*\(?([{letters}])(?![\w'])",
        rf"\(([{letters}])\)",
    )
    for pattern in patterns:
        found = set(re.findall(pattern, text))
        if len(found) == 1:
            return found.pop()
    whole = normalize_answer(text)
    known = {letter: normalize_answer(o) for letter, o in zip(letters, options, strict=True)}
    same = [letter for letter, option in known.items() if option and option == whole]
    held = [
        letter
        for letter, option in known.items()
        if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", whole)
    ]
    for candidates in (same, held):
        if len(candidates) == 1:
            return candidates[0]
    return None


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Measures the prediction "generate" on questions with options.

    Attributes:
        dataset: instructions with meta["options"], a list of texts; the answer is a letter.
            Questions without options are open ones.
        batch_size: global; changes no result.
        num_pictures: questions in answers.png.
    """

    dataset: Dataset
    batch_size: int = 64
    num_pictures: int = 12

    def run(self, predictor: Predictor, folder: pathlib.Path | None) -> dict[str, float]:
        """Returns the accuracy; writes answers.jsonl and answers.png.

        Returns:
            "accuracy", over all questions; "parse_failures", the share of those with options whose
            answer could not be read, all of them counted as wrong; "examples"; "<kind>/accuracy".
        """
        answered = answer_all(predictor, self.dataset, self.batch_size)
        chosen = [_choice(one) for one in answered]
        correct = [
            is_correct(one) if not _options(one) else letter == one.accepted[0]
            for one, letter in zip(answered, chosen, strict=True)
        ]
        failed = [
            letter is None for one, letter in zip(answered, chosen, strict=True) if _options(one)
        ]
        metrics = kind_means("accuracy", answered, correct)
        metrics["parse_failures"] = float(np.mean(failed)) if failed else 0.0
        if folder is not None:
            title = f"{100 * metrics['accuracy']:.1f} % of {len(answered):,} questions"
            write_answers(folder, self.dataset, answered, correct, self.num_pictures, title)
        return metrics


def _options(one: Answered) -> Sequence[str]:
    return one.meta.get("options") or ()


def _choice(one: Answered) -> str | None:
    options = _options(one)
    if not options:
        return None
    if one.accepted[0] not in LETTERS[: len(options)] or len(one.accepted) != 1:
        raise ValueError(
            f"a question with {len(options)} options needs one of the letters "
            f"{LETTERS[: len(options)]!r} as its answer, example {one.index} has "
            f"{list(one.accepted)}"
        )
    return parse_letter(one.prediction, options)
