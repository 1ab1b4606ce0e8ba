# SPDX-License-Identifier: Apache-2.0
"""Scenes of coloured shapes, true captions of them, and false ones made of the same words.

Pure logic, no pixels and no files. Lengths are in units of the image's side, the origin is the top
left corner, y points down. What is random comes from the generator that is passed in.

The false captions follow Yuksekgonul et al., 2023, arXiv:2210.01936 (ARO): attributes or relation
swapped, so that a bag of words cannot tell. Unlike there, they are checked against the scene.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 48),
    "orange": (250, 140, 22),
    "yellow": (250, 210, 45),
    "green": (46, 164, 79),
    "blue": (38, 102, 222),
    "purple": (130, 64, 190),
    "pink": (246, 130, 180),
    "black": (45, 45, 52),
}
RADII = {"small": (0.09, 0.11), "large": (0.17, 0.20)}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
ATTRIBUTES = ("size", "color", "shape")

_NUM_OBJECTS = (0.2, 0.5, 0.3)  # probabilities of one, two and three
_GAP = 0.04  # least distance between two objects
_BORDER = 0.02  # least distance to the border
_MAX_TURN = 12.0  # degrees


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        shape: one of SHAPES.
        color: a key of COLORS.
        size: a key of RADII.
        center: (x, y).
        radius: of the circle about `center` that holds the object.
        angle: degrees by which it is turned clockwise.
    """

    shape: str
    color: str
    size: str
    center: tuple[float, float]
    radius: float
    angle: float = 0.0

    def outline(self) -> np.ndarray:
        """Returns the corners of the shape, [n, 2] float64 (x, y)."""
        turn = np.deg2rad(self.angle)
        rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        return np.array(self.center) + self.radius * unit_outline(self.shape) @ rotation

    def box(self) -> tuple[float, float, float, float]:
        """Returns the bounding box (left, top, right, bottom)."""
        corners = self.outline()
        return (*corners.min(0).tolist(), *corners.max(0).tolist())

    def to_json(self) -> dict[str, Any]:
        """Returns all attributes and "box" in types that JSON has."""
        box = [round(x, 5) for x in self.box()]
        return {**dataclasses.asdict(self), "center": list(self.center), "box": box}


Scene = tuple[SceneObject, ...]


def scene_from_json(objects: Sequence[Mapping[str, Any]]) -> Scene:
    """Returns the scene whose objects `SceneObject.to_json` gave, as in `meta["scene"]`."""
    keys = [field.name for field in dataclasses.fields(SceneObject)]
    return tuple(
        SceneObject(**{k: o[k] for k in keys if k != "center"}, center=tuple(o["center"]))
        for o in objects
    )


@functools.cache
def unit_outline(shape: str) -> np.ndarray:
    """Returns the corners of a shape inside the unit circle about its middle, [n, 2] float64."""
    if shape in ("circle", "square", "triangle"):
        number, first = {"circle": (48, 0), "square": (4, 45), "triangle": (3, -90)}[shape]
        turn = np.deg2rad(first + np.arange(number) * (360 / number))
        return np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "star":
        turn = np.deg2rad(-90 + np.arange(10) * 36)
        length = np.where(np.arange(10) % 2, 0.45, 1.0)
        return np.stack([length * np.cos(turn), length * np.sin(turn)], 1)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 2
        return np.stack([x, y], 1) / np.hypot(x, y).max()
    if shape == "cross":
        a, b = 0.94, 0.34  # length and half width of an arm; a^2 + b^2 = 1
        quarter = [(b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a)]
        return np.array(quarter + [(-x, -y) for x, y in quarter])
    raise ValueError(f"unknown shape {shape!r}, choose one of {SHAPES}")


def sample_scene(rng: np.random.Generator) -> Scene:
    """Returns one to three objects that do not touch, no two with the same colour and shape."""
    number = 1 + int(rng.choice(len(_NUM_OBJECTS), p=_NUM_OBJECTS))
    while True:
        objects: list[SceneObject] = []
        for _ in range(50):
            new = _sample_object(rng)
            if all(_fit(new, old) for old in objects):
                objects.append(new)
            if len(objects) == number:
                return tuple(objects)


def _sample_object(rng: np.random.Generator) -> SceneObject:
    size = _one_of(tuple(RADII), rng)
    radius = rng.uniform(*RADII[size])
    room = radius + _BORDER
    return SceneObject(
        shape=_one_of(SHAPES, rng),
        color=_one_of(tuple(COLORS), rng),
        size=size,
        center=(_rounded(rng.uniform(room, 1 - room)), _rounded(rng.uniform(room, 1 - room))),
        radius=_rounded(radius),
        angle=_rounded(rng.uniform(-_MAX_TURN, _MAX_TURN)),
    )


def _one_of(names: tuple[str, ...], rng: np.random.Generator) -> str:
    return names[rng.integers(len(names))]


def _rounded(x: float) -> float:
    return round(float(x), 5)


def _fit(a: SceneObject, b: SceneObject) -> bool:
    distance = np.hypot(a.center[0] - b.center[0], a.center[1] - b.center[1])
    return distance > a.radius + b.radius + _GAP and (a.color, a.shape) != (b.color, b.shape)


@dataclasses.dataclass(frozen=True)
class Statement:
    """What a caption claims: an object, and where it is.

    Attributes:
        subject: (size, colour, shape).
        facts: (relation, (size, colour, shape)) of the objects that the subject is related to.
        place: one of PLACES, or "" if nothing is said.
        template: the caption with the fields a (subject), place, and r0, b0, r1, b1 (relation and
            object of every fact).
        wording: which of the relation's wordings is used.
    """

    subject: tuple[str, str, str]
    facts: tuple[tuple[str, tuple[str, str, str]], ...]
    place: str
    template: str
    wording: int = 0

    def caption(self) -> str:
        """Returns the statement in words."""
        fields = {"a": "a " + " ".join(self.subject), "place": self.place}
        for i, (relation, other) in enumerate(self.facts):
            fields[f"r{i}"] = RELATIONS[relation][self.wording]
            fields[f"b{i}"] = "a " + " ".join(other)
        return self.template.format(**fields)


TEMPLATES: tuple[tuple[str, ...], ...] = (
    ("{a} {place}", "there is {a} {place}", "a picture of {a} {place}"),
    ("{a} {r0} {b0}", "there is {a} {r0} {b0}", "{a} is {r0} {b0}"),
    ("{a} {r0} {b0} and {r1} {b1}", "there is {a} {r0} {b0} and {r1} {b1}"),
)


def describe(scene: Scene, rng: np.random.Generator) -> Statement:
    """Returns a true statement that names every object of the scene with all its attributes.

    Of two objects the relation along the axis on which they are farther apart is told; a single
    object gets its place among nine.
    """
    order = rng.permutation(len(scene))
    subject, others = scene[order[0]], [scene[i] for i in order[1:]]
    templates = TEMPLATES[len(others)]
    return Statement(
        subject=_attributes(subject),
        facts=tuple((relation(subject, other), _attributes(other)) for other in others),
        place="" if others else place_of(subject),
        template=templates[rng.integers(len(templates))],
        wording=int(rng.integers(2)),
    )


def _attributes(thing: SceneObject) -> tuple[str, str, str]:
    return thing.size, thing.color, thing.shape


def relation(a: SceneObject, b: SceneObject) -> str:
    """Returns how `a` lies to `b`, a key of RELATIONS: along the axis where they differ more."""
    dx, dy = b.center[0] - a.center[0], b.center[1] - a.center[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def cell_of(thing: SceneObject) -> tuple[int, int]:
    """Returns the (row, column) of an object's centre, of three by three."""
    column, row = (min(2, int(3 * c)) for c in thing.center)
    return row, column


def place_of(thing: SceneObject) -> str:
    """Returns where an object lies, in words of PLACES."""
    row, column = cell_of(thing)
    return PLACES[row][column]


def holds(statement: Statement, scene: Scene) -> bool:
    """Returns whether different objects of the scene can play all roles of a statement.

    A relation holds here as soon as the centres differ in the right direction, however little and
    whatever the other axis says: what is called false is false by any reading.
    """
    roles = [statement.subject, *(other for _, other in statement.facts)]
    for cast in itertools.permutations(scene, len(roles)):
        fits = all(_attributes(o) == role for o, role in zip(cast, roles, strict=True))
        fits = fits and statement.place in ("", place_of(cast[0]))
        facts = zip(statement.facts, cast[1:], strict=True)
        if fits and all(_is_so(cast[0], relation, other) for (relation, _), other in facts):
            return True
    return False


def _is_so(a: SceneObject, relation: str, b: SceneObject) -> bool:
    axis = 0 if relation in ("left of", "right of") else 1
    a_first = relation in ("left of", "above")
    return a.center[axis] < b.center[axis] if a_first else a.center[axis] > b.center[axis]


def swap_attributes(
    statement: Statement, scene: Scene, rng: np.random.Generator
) -> Statement | None:
    """Returns a false statement made of the same words, or of the opposite relation.

    One of these, drawn among those that are false: the sizes, colours or shapes of the subject and
    another object exchanged, or their relation turned round. None for a statement on one object;
    any other has one, because its turned relation is always false.
    """
    candidates = [
        swapped
        for i in range(len(statement.facts))
        for swapped in _swaps(statement, i)
        if not holds(swapped, scene)
    ]
    return candidates[rng.integers(len(candidates))] if candidates else None


def _swaps(statement: Statement, i: int) -> list[Statement]:
    """Returns the statements in which the subject and the object of fact i are mixed up."""
    relation, other = statement.facts[i]
    swaps = [_with_fact(statement, i, statement.subject, (OPPOSITE[relation], other))]
    for k in range(len(ATTRIBUTES)):
        if statement.subject[k] != other[k]:
            subject, new = list(statement.subject), list(other)
            subject[k], new[k] = new[k], subject[k]
            swaps.append(_with_fact(statement, i, tuple(subject), (relation, tuple(new))))
    return swaps


def _with_fact(
    statement: Statement, i: int, subject: tuple, fact: tuple[str, tuple[str, str, str]]
) -> Statement:
    facts = (*statement.facts[:i], fact, *statement.facts[i + 1 :])
    return dataclasses.replace(statement, subject=subject, facts=facts)
