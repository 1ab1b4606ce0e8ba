# SPDX-License-Identifier: Apache-2.0
"""shapes: pictures, scene graphs and captions agree, judged by a reader of captions of its own."""

import itertools
import re

import numpy as np
import pytest

from flax_vlm.data import class_names, load_source
from flax_vlm.data.images import decode_image
from flax_vlm.data.scenes import COLORS, RADII, SHAPES, SceneObject, Statement, relation
from flax_vlm.data.shapes_world import (
    BACKGROUND,
    describe,
    example,
    holds,
    render,
    sample_scene,
    scene_from_json,
    swap_attributes,
)
from tests.data.conftest import SHAPES as SIZES

THING = rf"a ({'|'.join(RADII)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
WORDS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "higher than": (1, -1),
    "below": (1, 1),
    "lower than": (1, 1),
}
PLACES = {
    "in the top left corner": (0, 0),
    "at the top": (1, 0),
    "in the top right corner": (2, 0),
    "on the left": (0, 1),
    "in the middle": (1, 1),
    "on the right": (2, 1),
    "in the bottom left corner": (0, 2),
    "at the bottom": (1, 2),
    "in the bottom right corner": (2, 2),
}


def is_true(caption, scene):
    """Returns whether a caption is true of a scene graph, read from its words alone."""
    things = re.findall(THING, caption)
    relations = re.findall("|".join(WORDS), caption)
    assert caption.count(" a ") + caption.startswith("a ") == len(things) + ("picture" in caption)
    place = [at for words, at in PLACES.items() if caption.endswith(words)]
    for cast in itertools.permutations(scene, len(things)):
        named = [(o["size"], o["color"], o["shape"]) for o in cast] == things
        first = cast[0]["center"]
        placed = not place or place == [tuple(int(3 * c) for c in first)]
        related = all(
            (first[axis] - other["center"][axis]) * sign > 0
            for other, (axis, sign) in zip(cast[1:], map(WORDS.get, relations), strict=True)
        )
        if named and placed and related:
            return True
    return False


def everything(shapes):
    return [example for source in shapes.values() for example in source]


def test_captions_are_true_of_the_scene_graph_and_name_all_objects(shapes):
    for item in everything(shapes):
        assert is_true(item["caption"], item["meta"]["scene"]), item["caption"]
        assert len(re.findall(THING, item["caption"])) == len(item["meta"]["scene"])


def test_swapped_captions_are_false_and_every_scene_of_several_objects_has_one(shapes):
    for item in everything(shapes):
        several = len(item["meta"]["scene"]) > 1
        assert ("swapped" in item["meta"]) == several
        if several:
            assert not is_true(item["meta"]["swapped"], item["meta"]["scene"])


def test_swapped_captions_have_the_words_of_the_caption_but_for_one_relation(shapes):
    kinds = set()
    for item in everything(shapes):
        if "swapped" in item["meta"]:
            words, swapped = (sorted(item[k].split()) for k in ("caption", "caption"))
            swapped = sorted(item["meta"]["swapped"].split())
            changed = {w for w in words + swapped if words.count(w) != swapped.count(w)}
            relations = [{"left", "right"}, {"above", "below"}, {"higher", "lower"}]
            assert not changed or changed in relations
            kinds.add(bool(changed))
    assert kinds == {True, False}


def test_scenes_have_one_to_three_objects_of_every_kind_that_do_not_touch():
    scenes = [example("train", i)[0] for i in range(300)]
    assert {len(scene) for scene in scenes} == {1, 2, 3}
    things = [thing for scene in scenes for thing in scene]
    assert {t.shape for t in things} == set(SHAPES) and {t.color for t in things} == set(COLORS)
    for scene in scenes:
        assert len({(t.color, t.shape) for t in scene}) == len(scene)
        for a, b in itertools.combinations(scene, 2):
            assert np.hypot(*np.subtract(a.center, b.center)) > a.radius + b.radius
        for thing in scene:
            assert RADII[thing.size][0] <= thing.radius <= RADII[thing.size][1]
            assert min(thing.box()) > 0 and max(thing.box()) < 1


@pytest.mark.parametrize("size", [48, 64, 96])
def test_pixels_show_every_object_in_its_colour_and_box(size):
    for index in range(40):
        scene = example("test", index)[0]
        picture = render(scene, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        outside = np.ones((size, size), bool)
        for thing in scene:
            x, y = (int(c * size) for c in thing.center)
            assert tuple(picture[y, x]) == COLORS[thing.color]
            left, top, right, bottom = (int(c * size) for c in thing.box())
            outside[max(0, top - 2) : bottom + 3, max(0, left - 2) : right + 3] = False
            # the box is no larger than the object, either
            part = (picture[top : bottom + 1, left : right + 1] != BACKGROUND).any(2)
            for edge in (part[:2], part[-2:], part[:, :2], part[:, -2:]):
                assert edge.any()
        assert (picture[outside] == BACKGROUND).all()


def test_the_picture_of_a_shape_is_that_shape():
    areas = {}
    for shape in SHAPES:
        thing = SceneObject(shape, "red", "large", (0.5, 0.5), 0.4)
        areas[shape] = (render((thing,), 64) != BACKGROUND).any(2).mean() / (np.pi * 0.16)
    expected = {"circle": 1, "square": 2 / np.pi, "triangle": 3 * 3**0.5 / 4 / np.pi}
    expected["cross"] = (4 * 0.94 * 0.34 * 2 - 4 * 0.34**2) / np.pi
    expected["star"] = 10 * 0.5 * 0.45 * np.sin(np.pi / 5) / np.pi
    for shape, area in expected.items():  # the edge adds its outer half and half a pixel
        assert area + 0.05 < areas[shape] < area + 0.1, shape
    assert 0.55 < areas["heart"] < 0.7


def test_scene_is_a_function_of_split_and_index(shapes):
    assert example("train", 5) == example("train", 5)
    assert example("train", 5) != example("train", 6)
    assert example("train", 5) != example("test", 5)
    for split, source in shapes.items():
        for index in (0, 7):
            scene, statement, swapped = example(split, index)
            item = source[index]
            assert scene_from_json(item["meta"]["scene"]) == scene
            assert item["caption"] == statement.caption()
            assert item["meta"].get("swapped") == (swapped and swapped.caption())
            np.testing.assert_array_equal(decode_image(item["image"]), render(scene, 64))


def test_sizes_are_options_and_change_no_scene(data_dir, shapes):
    other = load_source(
        "shapes", split="train", data_dir=data_dir, image_size=48, train_size=9, test_size=2
    )
    assert len(other) == 9 and len(shapes["train"]) == SIZES["train_size"]
    assert decode_image(other[3]["image"]).shape == (48, 48, 3)
    assert other[3]["meta"] == shapes["train"][3]["meta"]
    options = {"image_size": 48, "train_size": 9, "test_size": 3}
    assert len(load_source("shapes", split="test", data_dir=data_dir, **options)) == 3
    with pytest.raises(ValueError, match="positive sizes, got image_size 0"):
        load_source("shapes", data_dir=data_dir, image_size=0)
    with pytest.raises(ValueError, match="no class names"):
        class_names("shapes", data_dir=data_dir, **SIZES)


def thing(color, shape, x, y, size="small"):
    return SceneObject(shape, color, size, (x, y), 0.1)


SCENE = (thing("red", "circle", 0.2, 0.5), thing("blue", "star", 0.8, 0.4, "large"))
RED, BLUE = ("small", "red", "circle"), ("large", "blue", "star")


def statement(subject, *facts, place=""):
    return Statement(subject, facts, place, "{a} {r0} {b0}" if facts else "{a} {place}")


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        (statement(RED, ("left of", BLUE)), True),
        (statement(BLUE, ("right of", RED)), True),
        (statement(RED, ("right of", BLUE)), False),
        (statement(RED, ("below", BLUE)), True),  # by a little, which is enough
        (statement(RED, ("above", BLUE)), False),
        (statement(("small", "blue", "circle"), ("left of", ("large", "red", "star"))), False),
        (statement(("large", "red", "circle"), ("left of", BLUE)), False),
        (statement(RED, ("left of", RED)), False),  # nothing is left of itself
        (statement(RED, ("left of", BLUE), ("left of", BLUE)), False),  # there is only one
        (statement(RED, place="on the left"), True),
        (statement(RED, place="in the middle"), False),
    ],
)
def test_statement_holds_or_not(claim, truth):
    assert holds(claim, SCENE) is truth


def test_relation_is_told_along_the_axis_of_the_greater_distance():
    middle = thing("red", "circle", 0.5, 0.5)
    for x, y, expected in [(0.9, 0.6, "left of"), (0.1, 0.6, "right of"), (0.6, 0.9, "above")]:
        assert relation(middle, thing("blue", "star", x, y)) == expected
    assert relation(middle, thing("blue", "star", 0.4, 0.1)) == "below"


def test_swap_that_would_be_true_is_not_taken():
    # exchanging the colours of the first two gives a sentence that is true of the last two
    scene = (
        thing("red", "circle", 0.2, 0.5),
        thing("blue", "star", 0.5, 0.5),
        thing("blue", "circle", 0.3, 0.8),
        thing("red", "star", 0.9, 0.8),
    )
    claim = statement(RED, ("left of", ("small", "blue", "star")))
    exchanged = statement(("small", "blue", "circle"), ("left of", ("small", "red", "star")))
    assert holds(claim, scene) and holds(exchanged, scene)
    swaps = {swap_attributes(claim, scene, np.random.default_rng(i)) for i in range(30)}
    turned = statement(RED, ("right of", ("small", "blue", "star")))
    shapes = statement(("small", "red", "star"), ("left of", ("small", "blue", "circle")))
    assert swaps == {turned, shapes}


def test_all_kinds_of_swaps_are_drawn():
    claim = statement(RED, ("left of", BLUE))
    swaps = {swap_attributes(claim, SCENE, np.random.default_rng(i)).caption() for i in range(60)}
    assert swaps == {
        "a small red circle right of a large blue star",
        "a large red circle left of a small blue star",
        "a small blue circle left of a large red star",
        "a small red star left of a large blue circle",
    }
    assert swap_attributes(statement(RED, place="on the left"), SCENE[:1], None) is None


def test_description_is_random_and_true():
    scene = sample_scene(np.random.default_rng(2))
    claims = {describe(scene, np.random.default_rng(i)).caption() for i in range(40)}
    assert len(claims) > 4
    graph = [thing.to_json() for thing in scene]
    assert all(is_true(claim, graph) for claim in claims)
