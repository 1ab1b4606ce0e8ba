# SPDX-License-Identifier: Apache-2.0
"""The embedded instruction set: true answers, held-out scenes and pairs, and weak blind guesses."""

import collections

import numpy as np
import pytest

from flax_vlm.data import load_source
from flax_vlm.data.instructions import HELD_OUT, KINDS, is_novel
from flax_vlm.data.questions import QUESTIONS
from flax_vlm.data.scenes import COLORS, SHAPES, SceneObject, sample_scene

RED = SceneObject("circle", "red", "large", (0.2, 0.2), 0.18)
BLUE = SceneObject("star", "blue", "small", (0.8, 0.3), 0.1)
GREEN = SceneObject("circle", "green", "small", (0.2, 0.8), 0.1)
SCENE = (RED, BLUE, GREEN)


def asked(kind, scene=SCENE, draws=200):
    """Returns every question of a kind with its answer."""
    rng = np.random.default_rng(0)
    return dict(turn for _ in range(draws) for turn in QUESTIONS[kind](scene, rng))


def test_things_are_counted():
    answers = asked("counting")
    assert answers["How many things are there?"] == "three"
    assert answers["How many things are circles?"] == "two"
    assert answers["How many things are red?"] == "one"
    assert answers["How many things are yellow?"] == "zero"
    assert answers["How many things are crosses?"] == "zero"


def test_the_numbers_of_a_scene_are_asked_for_equally_often():
    rng = np.random.default_rng(0)
    turns = [QUESTIONS["counting"](SCENE, rng)[0] for _ in range(3000)]
    named = [(question.removesuffix("?").split()[-1], answer) for question, answer in turns]
    of_colors = collections.Counter(a for name, a in named if name in COLORS)
    of_shapes = collections.Counter(a for name, a in named if name not in (*COLORS, "there"))
    assert set(of_colors) == {"zero", "one"} and set(of_shapes) == {"zero", "one", "two"}
    for counts in (of_colors, of_shapes):
        share = np.array(list(counts.values())) / sum(counts.values())
        np.testing.assert_allclose(share, 1 / len(counts), atol=0.06)


def test_only_what_words_fit_alone_is_asked_for():
    assert asked("color") == {"What color is the star?": "blue"}  # there are two circles
    assert asked("shape") == {
        "What shape is the red thing?": "circle",
        "What shape is the blue thing?": "star",
        "What shape is the green thing?": "circle",
    }
    assert QUESTIONS["color"]((RED, GREEN), np.random.default_rng(0)) == []


def test_a_thing_is_found_among_nine_places():
    assert asked("place") == {
        "Where is the circle in red?": "northwest",
        "Where is the star in blue?": "northeast",
        "Where is the circle in green?": "southwest",
    }


def test_all_things_are_listed_in_any_order():
    drawn = (QUESTIONS["detail"](SCENE, np.random.default_rng(seed)) for seed in range(50))
    lists = {answer for [(_, answer)] in drawn}
    assert len(lists) == 6
    for said in lists:
        number, _, things = said.partition(": ")
        assert number == "three" and sorted(things.split(", ")) == [
            "a large circle in red northwest",
            "a small circle in green southwest",
            "a small star in blue northeast",
        ]


def test_an_inventory_has_what_is_there_and_what_is_not():
    names = collections.Counter()
    counts = {"circles": 2, "stars": 1, "red": 1, "blue": 1, "green": 1}
    words = {"zero": 0, "one": 1, "two": 2}
    for seed in range(300):
        [(_, answer)] = QUESTIONS["inventory"](SCENE, np.random.default_rng(seed))
        items = dict(item.split(": ") for item in answer.split(", "))
        assert all(words[number] == counts.get(name, 0) for name, number in items.items())
        assert len(items) == 6 and sum(name in counts for name in items) == 3
        names.update(list(items))
    assert len(names) == len(SHAPES) + len(COLORS)


def test_relations_are_told_along_the_axis_that_differs_more():
    answers = asked("relation")
    assert answers["Where is the circle in red, seen from the star in blue?"] == "left"
    assert answers["Where is the star in blue, seen from the circle in red?"] == "right"
    assert answers["Where is the circle in green, seen from the circle in red?"] == "below"
    assert QUESTIONS["relation"]((RED,), np.random.default_rng(0)) == []


def test_a_large_and_a_small_thing_are_compared():
    answers = asked("comparison")
    assert answers["Which is larger, the star in blue or the circle in red?"] == "the circle in red"
    assert (
        answers["Which is smaller, the circle in red or the circle in green?"]
        == "the circle in green"
    )
    assert QUESTIONS["comparison"]((BLUE, GREEN), np.random.default_rng(0)) == []


def test_a_follow_up_speaks_of_what_was_asked_before():
    rng = np.random.default_rng(0)
    for _ in range(20):
        (first, _), (second, place) = QUESTIONS["follow_up"](SCENE, rng)
        assert second == "Where is it?"
        assert (
            place
            == {
                "red": "northwest",
                "blue": "northeast",
                "green": "southwest",
            }[first.split()[4]]
        )


def test_a_question_has_one_answer_whatever_is_drawn():
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene, answers = sample_scene(rng), {}
        for kind in ("counting", "color", "shape", "place", "relation", "comparison"):
            for _ in range(20):
                for question, answer in QUESTIONS[kind](scene, rng):
                    assert answers.setdefault(question, answer) == answer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    options = dict(data_dir=folder, image_size=16, train_size=400, test_size=800)
    splits = ("train", "test", "novel")
    return {s: load_source("instructions", split=s, **options) for s in splits}


def test_examples_are_a_function_of_split_and_index(sources):
    for source in sources.values():
        a, b = source[3], source[3]
        np.testing.assert_array_equal(a["images"][0], b["images"][0])
        assert a["conversation"] == b["conversation"] and a["meta"] == b["meta"]
    with pytest.raises(IndexError):
        sources["train"][400]


def test_training_never_shows_or_names_a_held_out_pair(sources):
    pairs = {f"{color} {shape}" for color, shape in HELD_OUT}
    pairs |= {f"{shape} in {color}" for color, shape in HELD_OUT}
    assert len(pairs) == 12 and {s for _, s in HELD_OUT} == set(SHAPES)
    for split in ("train", "test"):
        texts = [t["content"] for i in range(400) for t in sources[split][i]["conversation"]]
        assert not [text for text in texts if any(pair in text for pair in pairs)]
    novel = [t["content"] for i in range(800) for t in sources["novel"][i]["conversation"]]
    assert any(pair in text for pair in pairs for text in novel)
    assert is_novel((SceneObject("circle", next(iter(COLORS)), "small", (0.5, 0.5), 0.1),))


def test_every_kind_is_asked_and_blind_guesses_are_weak(sources):
    answers = collections.defaultdict(collections.Counter)
    for i in range(800):
        example = sources["test"][i]
        answers[example["meta"]["kind"]][example["conversation"][-1]["content"]] += 1
    assert set(answers) == set(KINDS)
    for kind, counts in answers.items():
        assert 60 <= counts.total() <= 140
        assert counts.most_common(1)[0][1] / counts.total() < 0.6, kind


def test_conversations_of_training_have_several_turns_and_questions_of_tests_one(sources):
    turns = collections.Counter(len(sources["train"][i]["conversation"]) // 2 for i in range(400))
    assert turns[3] > 100 and max(turns) >= 3
    for i in range(100):
        example = sources["test"][i]
        expected = 4 if example["meta"]["kind"] == "follow_up" else 2
        assert len(example["conversation"]) == expected
        assert example["conversation"][0]["content"].startswith("<image>\n")


@pytest.mark.parametrize(
    "options", [dict(split="val"), dict(kinds=("riddles",)), dict(kinds=()), dict(turns=0)]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="instructions"):
        load_source("instructions", **options)
