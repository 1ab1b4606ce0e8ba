# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes of coloured shapes, with answers that follow from the scene graph.

Pure logic over data.scenes, no pixels and no files. A question is put only where it has one answer
that a careful person would give: a thing is asked for by words that fit it alone, and sizes are
compared only where they differ in kind. What is random comes from the generator that is passed in.

After CLEVR's question families (Johnson et al., 2017, arXiv:1612.06890, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flax_vlm.data.scenes import COLORS, SHAPES, Scene, SceneObject, cell_of, describe, relation

Turn = tuple[str, str]  # question, answer
NUMBERS = ("zero", "one", "two", "three")
# One word each, a token: of "in the top left corner" only the first word would stand right behind
# what it is said of.
PLACES = (
    ("northwest", "north", "northeast"),
    ("west", "center", "east"),
    ("southwest", "south", "southeast"),
)
_DESCRIBE = ("Describe the picture.", "What do you see?", "Say what is in the picture.")
_DETAIL = ("Describe the picture in detail.", "List all things.", "What lies where?")


def description(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns a caption of the whole scene."""
    return [(_DESCRIBE[rng.integers(len(_DESCRIBE))], describe(scene, rng).caption())]


def detail(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns a list of all things with their places, in any order.

    An order that the picture gives away, such as from left to right, would be easier to learn: what
    is said next is then a matter of counting, and nothing has to be found by what it is like. The
    colour stands behind the shape, the place behind the colour.
    """
    things = [scene[i] for i in rng.permutation(len(scene))]
    said = ", ".join(f"a {o.size} {name(o)} {place_of(o)}" for o in things)
    return [(_DETAIL[rng.integers(len(_DETAIL))], f"{NUMBERS[len(scene)]}: {said}")]


def inventory(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns how many there are of some colours and shapes, in any order: up to three that the
    scene has, and others, six in all.
    """
    counts = count_colors(scene) | count_shapes(scene)
    words = [list(counts)[i] for i in rng.permutation(len(counts))]
    there = [word for word in words if counts[word]][:3]
    missing = [word for word in words if not counts[word]][: 6 - len(there)]
    said = [word for word in words if word in there or word in missing]
    return [("How many of each?", ", ".join(f"{word}: {NUMBERS[counts[word]]}" for word in said))]


def counting(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns how many things there are: all, or of a colour or shape.

    Of a scene's numbers, zero included, one is as likely asked for as another: a question shall not
    tell its answer (Goyal et al., 2017, arXiv:1612.00837).
    """
    what = rng.integers(3)
    if what == 0:
        return [("How many things are there?", NUMBERS[len(scene)])]
    counts = count_colors(scene) if what == 1 else count_shapes(scene)
    number = _pick(sorted(set(counts.values())), rng)
    word = _pick([word for word, count in counts.items() if count == number], rng)
    return [(f"How many things are {word}?", NUMBERS[number])]


def color(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns the colour of a thing whose shape no other has."""
    alone = [o for o in scene if sum(p.shape == o.shape for p in scene) == 1]
    thing = _pick(alone, rng)
    return [] if thing is None else [(f"What color is the {thing.shape}?", thing.color)]


def shape(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns the shape of a thing whose colour no other has."""
    alone = [o for o in scene if sum(p.color == o.color for p in scene) == 1]
    thing = _pick(alone, rng)
    return [] if thing is None else [(f"What shape is the {thing.color} thing?", thing.shape)]


def place(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns where a thing lies in the picture, a word of PLACES."""
    thing = _pick(scene, rng)
    return [(f"Where is the {name(thing)}?", place_of(thing))]


def spatial(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns how one thing lies to another, along the axis where they are farther apart."""
    if len(scene) < 2:
        return []
    a, b = (scene[i] for i in rng.permutation(len(scene))[:2])
    return [
        (f"Where is the {name(a)}, seen from the {name(b)}?", relation(a, b).removesuffix(" of"))
    ]


def comparison(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns which of two things, one large and one small, is the larger or the smaller."""
    kinds = {size: [o for o in scene if o.size == size] for size in ("large", "small")}
    if not all(kinds.values()):
        return []
    pair = {size: _pick(things, rng) for size, things in kinds.items()}
    word, answer = (("larger", "large"), ("smaller", "small"))[rng.integers(2)]
    first, second = (list(pair.values())[i] for i in rng.permutation(2))
    question = f"Which is {word}, the {name(first)} or the {name(second)}?"
    return [(question, f"the {name(pair[answer])}")]


def follow_up(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns a question about a thing and one that only the first makes clear: where "it" is."""
    first = shape(scene, rng)
    if not first:
        return []
    question, answer = first[0]
    thing = next(o for o in scene if f"the {o.color} thing" in question and o.shape == answer)
    return [*first, ("Where is it?", place_of(thing))]


# kind: the turns of a question of that kind, the last of which is the one that is counted; none
# where a scene does not allow it
QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], list[Turn]]] = {
    "description": description,
    "detail": detail,
    "inventory": inventory,
    "counting": counting,
    "color": color,
    "shape": shape,
    "place": place,
    "relation": spatial,
    "comparison": comparison,
    "follow_up": follow_up,
}
CAPTIONS = ("description", "detail", "inventory")  # kinds that tell what a picture shows


def place_of(thing: SceneObject) -> str:
    """Returns where a thing lies, a word of PLACES."""
    row, column = cell_of(thing)
    return PLACES[row][column]


def name(thing: SceneObject) -> str:
    """Returns the words that tell a thing from the others of its scene: shape and colour, as in
    `detail`.
    """
    return f"{thing.shape} in {thing.color}"


def count_colors(scene: Scene) -> dict[str, int]:
    """Returns how many things of a scene have each colour."""
    return {color: sum(o.color == color for o in scene) for color in COLORS}


def count_shapes(scene: Scene) -> dict[str, int]:
    """Returns how many things of a scene have each shape, by its plural."""
    return {plural(shape): sum(o.shape == shape for o in scene) for shape in SHAPES}


def plural(shape: str) -> str:
    """Returns the plural of a shape's name."""
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _pick(things, rng: np.random.Generator):
    return things[rng.integers(len(things))] if len(things) else None
