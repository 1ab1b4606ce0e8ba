# SPDX-License-Identifier: Apache-2.0
"""instructions: questions and answers about the shapes world and the handwritten digits.

Needs no network and writes nothing: an example is a function of split and index, drawn when it is
read (1 ms). Splits:

    train   scenes without held-out pairs of colour and shape; several questions in a conversation
    test    other scenes of that kind; one question each (a follow-up has the turns before it)
    novel   scenes with a held-out pair, such as a red circle, which no picture or text of `train`
            has; both of its words are known

Digits: `data.digits`, its train images for "train", its test images for the others. Kinds of
questions are those of `data.questions` and "digit"; each is as frequent as it stands in `kinds`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_vlm.data.digits import CLASS_NAMES, load_digits
from flax_vlm.data.questions import QUESTIONS, Turn
from flax_vlm.data.scenes import COLORS, SHAPES, Scene, sample_scene
from flax_vlm.data.shapes_world import render

SPLITS = {"train": 0, "test": 1, "novel": 2}  # part of the seed, so that no scene is in two
KINDS = (*QUESTIONS, "digit")
_SEED = 11
# 6 of 48, so that every shape and most colours are held out once
HELD_OUT = frozenset(
    (color, shape)
    for (c, color), (s, shape) in itertools.product(enumerate(COLORS), enumerate(SHAPES))
    if c == s
)
_DIGIT = ("Which digit is this?", "Read the digit.", "What number is written here?")


def is_novel(scene: Scene) -> bool:
    """Returns whether a scene has a pair of colour and shape that training never shows."""
    return any((o.color, o.shape) in HELD_OUT for o in scene)


@dataclasses.dataclass(frozen=True)
class InstructionSource:
    """Conversations about pictures, by random access.

    Attributes:
        split: a key of SPLITS.
        size: number of examples.
        image_size: height and width of the pictures of scenes; digits have 8 x 8 pixels.
        kinds: of questions.
        turns: questions per training conversation.
        data_dir: where the digits lie.
    """

    split: str
    size: int
    image_size: int = 64
    kinds: Sequence[str] = KINDS
    turns: int = 3
    data_dir: str | None = None

    class_names = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not below {self.size}")
        rng = np.random.default_rng([_SEED, SPLITS[self.split], index])
        kind = self.kinds[rng.integers(len(self.kinds))]
        image, turns = self._digit(rng) if kind == "digit" else self._scene(kind, rng)
        return {
            "images": [image],
            "conversation": conversation(turns),
            "meta": {"id": f"{self.split} {index}", "kind": kind},
        }

    def _digit(self, rng: np.random.Generator) -> tuple[np.ndarray, list[Turn]]:
        images, labels = digit_images("train" if self.split == "train" else "test", self.data_dir)
        number = rng.integers(len(images))
        return images[number], [(_DIGIT[rng.integers(len(_DIGIT))], CLASS_NAMES[labels[number]])]

    def _scene(self, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, list[Turn]]:
        turns: list[Turn] = []
        while not turns:
            scene = sample_scene(rng)
            if is_novel(scene) == (self.split == "novel"):
                turns = QUESTIONS[kind](scene, rng)
        if self.split == "train":
            others = [k for k in self.kinds if k in QUESTIONS]
            for _ in range(self.turns - 1):
                more = QUESTIONS[others[rng.integers(len(others))]](scene, rng)
                # a question is asked once; "it" stays what was spoken of last
                turns = (
                    [*more, *turns] if not {q for q, _ in more} & {q for q, _ in turns} else turns
                )
        return render(scene, self.image_size), turns


def conversation(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Returns questions and answers as a conversation, the image in front of the first."""
    said = []
    for n, (question, answer) in enumerate(turns):
        marker = "<image>\n" if n == 0 else ""
        said.append({"role": "user", "content": marker + question})
        said.append({"role": "assistant", "content": answer})
    return said


@functools.cache
def digit_images(split: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images [n, 8, 8, C] uint8 and labels [n] of the digits of a split."""
    source = load_digits(split=split, data_dir=data_dir)
    examples = [source[i] for i in range(len(source))]
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])


def load_instructions(
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    image_size: int = 64,
    train_size: int = 100_000,
    test_size: int = 2_000,
    kinds: Sequence[str] = KINDS,
    turns: int = 3,
) -> InstructionSource:
    """Returns the instructions.

    Args:
        split: a key of SPLITS.
        data_dir: where datasets are kept; the digits are written there at the first use.
        image_size: height and width of the pictures.
        train_size: number of training conversations.
        test_size: number of questions of each of the other splits.
        kinds: of questions, of KINDS; a kind that stands twice is asked twice as often. Those of
            questions.CAPTIONS are captions.
        turns: questions per training conversation.

    Raises:
        ValueError: for an unknown split or kind, or numbers that are not positive.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if split not in SPLITS or unknown or not kinds:
        raise ValueError(
            f"instructions have the splits {list(SPLITS)} and the kinds {list(KINDS)}, "
            f"got {split!r} and {list(kinds)}"
        )
    if min(image_size, train_size, test_size, turns) < 1:
        raise ValueError(
            f"instructions need positive numbers, got image_size {image_size}, train_size "
            f"{train_size}, test_size {test_size}, turns {turns}"
        )
    folder = None if data_dir is None else os.fspath(data_dir)
    size = train_size if split == "train" else test_size
    return InstructionSource(split, size, image_size, tuple(kinds), turns, folder)
