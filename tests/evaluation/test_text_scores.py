# SPDX-License-Identifier: Apache-2.0
"""Scores of generated text against hand-computed values."""

import math

import numpy as np
import pytest

from flax_vlm.evaluation.captioning import caption_scores, caption_tokens
from flax_vlm.evaluation.multiple_choice import parse_letter
from flax_vlm.evaluation.pope import says_yes, yes_no_metrics
from flax_vlm.evaluation.vqa import normalize_vqa, vqa_score
from tests.evaluation.fake_questions import HAS_EVAL_EXTRA


@pytest.mark.parametrize(
    ("k", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)]
)
def test_an_answer_that_k_of_ten_gave_climbs_the_official_ladder(k, score):
    answers = ["two cats"] * k + ["dog"] * (10 - k)
    assert vqa_score("2 Cats.", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog.", "dog"),
        ("a half-full glass", "half full glass"),
        ("half- full", "half full"),
        ("1,000", "1000"),
        ("2.5 m", "2.5 m"),
        ("Two\nor three", "2 or 3"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("shouldnt've", "shouldn't've"),
        ("shed", "shed"),
        ("yes!", "yes"),
        ("black/white", "black white"),
    ],
)
def test_vqa_normalisation_is_that_of_the_evaluation_server(text, expected):
    assert normalize_vqa(text) == expected


def test_the_vqa_rule_refuses_questions_with_one_answer():
    with pytest.raises(ValueError, match=r"at least four people, got \['a'\].*'answers'"):
        vqa_score("a", ["a"])


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No, there is not.", False),
        ("There is no dog in the image", False),
        ("A dog. It is not black.", True),  # the first sentence alone
        ("there is nothing", True),  # the rule looks for words
        ("NO", True),  # LLaVA's rule knows "No" and "no"
        ("", True),
    ],
)
def test_yes_and_no_are_read_by_the_rule_of_llava(text, yes):
    assert says_yes(text) == yes


def test_yes_no_metrics_equal_hand_computed_values():
    predicted, actual = [1, 1, 1, 1, 0, 0, 0, 1], [1, 1, 1, 0, 0, 1, 0, 0]
    assert yes_no_metrics(predicted, actual) == pytest.approx(
        {"accuracy": 5 / 8, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "yes_ratio": 5 / 8}
    )  # half of the questions are yes: the ratio is of what was said


def test_a_model_that_never_says_yes_has_no_f1():
    found = yes_no_metrics([0, 0], [1, 0])
    assert (found["accuracy"], found["f1"], found["precision"], found["yes_ratio"]) == (
        0.5,
        0,
        0,
        0,
    )


OPTIONS = ("a red fox", "the sun", "red", "42")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C) because it is so", "C"),
        ("D.", "D"),
        ("B: the sun", "B"),
        ("The answer is C", "C"),
        ("I think that the correct answer: (D) here", "D"),
        ("It must be (A), I say", "A"),
        ("42", "D"),
        ("It is The Sun!", "B"),
        ("A red fox", "A"),  # an article is no letter
        ("I see A man", None),
        ("A or B", None),
        ("(A) or (B)", None),
        ("A, C", None),
        ("A, since a fox is there", "A"),
        ("E", None),  # there are four options
        ("the answer is a lemon", None),
        ("redder", None),
        ("", None),
    ],
)
def test_a_letter_is_read_or_the_reading_fails_but_never_guessed(text, letter):
    assert parse_letter(text, OPTIONS) == letter


def test_caption_tokens_are_lower_case_words():
    assert caption_tokens("A man's well-worn Hat,  on a 3.") == "a man's well-worn hat on a 3"


@pytest.mark.skipif(HAS_EVAL_EXTRA, reason="the extra eval is installed")
def test_caption_scores_without_their_libraries_name_the_extra():
    with pytest.raises(ValueError, match=r"pip install \"flax_vlm\[eval\]\""):
        caption_scores(["a"], [["a"]])


@pytest.mark.skipif(not HAS_EVAL_EXTRA, reason="the extra eval is not installed")
def test_cider_and_bleu_equal_hand_computed_values():
    # every n-gram is in one image alone: all weights are equal and a copy has cosine 1 for every n
    references = [["a b c d e"], ["f g h i j"]]
    found = caption_scores(["A b c, d e!", "f g h i k"], references)
    # second: cosines 4/5, 3/4, 2/3, 1/2 of n-grams, no penalty for length
    assert found["cider"] == pytest.approx(10 * (1 + np.mean([4 / 5, 3 / 4, 2 / 3, 1 / 2])) / 2)
    precisions = [9 / 10, 7 / 8, 5 / 6, 3 / 4]
    expected = math.exp(np.mean(np.log(precisions)))
    assert found["bleu4"] == pytest.approx(expected, rel=1e-6)
    several = caption_scores(["f g h i j"], [["x", "f g h i j"]])
    assert several["bleu4"] == pytest.approx(1)
    assert several["sacrebleu"] == pytest.approx(100)
