# SPDX-License-Identifier: Apache-2.0
"""Instructions about tiny pictures, and a model that answers from the sum of their pixels."""

import dataclasses
import importlib.util

import jax.numpy as jnp
import numpy as np

from flax_vlm.evaluation import EVALUATORS
from tests.evaluation import fakes

WORDS = ("1", "2", "3", "4", "Yes.", "no", " Red\n")
LENGTH = 6


class Tokenizer(fakes.CharTokenizer):
    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


def ids_of(word):
    return [ord(c) for c in word] + [0] * (LENGTH - len(word))


TABLE = np.array([ids_of(word) for word in WORDS], np.int32)


@dataclasses.dataclass
class Prompts:
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)

    def __call__(self, example, rng):
        image = example["images"][0] if example["images"] else np.zeros((4, 4, 3), np.uint8)
        good = image is not None
        question = next(
            (t["content"] for t in reversed(example["conversation"]) if t["role"] == "user"), " "
        )
        ids, mask, _ = self.tokenizer.encode([question], 40)
        return {
            "image": image if good else np.zeros((4, 4, 3), np.uint8),
            "text": ids[0],
            "text_mask": mask[0],
            "example_mask": np.bool_(good and bool(example["conversation"])),
        }


class Dataset(fakes.Dataset):
    def ordered(self, *, batch_size, shard=0, num_shards=1):
        b = batch_size // num_shards
        padding = {"images": [], "conversation": []}
        for start in range(0, len(self.source), batch_size):
            numbers = range(start + shard * b, start + (shard + 1) * b)
            rows = [
                self.preprocess(self.source[i] if i < len(self.source) else padding, None)
                for i in numbers
            ]
            yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def answer_number(total, first):
    """Returns which word is said: a number if asked "how", yes or no if asked "is", else red."""
    return np.where(first == ord("h"), total % 4, np.where(first == ord("i"), 4 + total % 2, 6))


def generate(params, extras, batch):
    total = batch["image"].astype(jnp.int32).sum((1, 2, 3))
    first = batch["text"][:, 0]
    number = jnp.where(first == ord("h"), total % 4, jnp.where(first == ord("i"), 4 + total % 2, 6))
    return jnp.asarray(TABLE)[number]


PREDICTIONS = {**fakes.PREDICTIONS, "generate": generate}


def said(example):
    """Returns what the model answers, in numpy."""
    image = example["images"][0] if example["images"] else np.zeros((4, 4, 3), np.uint8)
    asked = [t["content"] for t in example["conversation"] if t["role"] == "user"]
    return WORDS[int(answer_number(image.astype(np.int64).sum(), ord(asked[-1][0])))].strip()


def make_questions(n=47, seed=4):
    """Kinds of different sizes, two turns, no image, a broken image, several right answers."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        image = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        kind = ("counting", "counting", "yes_no", "colour")[i % 4]
        number = str(rng.integers(1, 4))
        question, answer = {
            "counting": (f"how many cubes in <image> number {i}?", number),
            "yes_no": (f"is there a cube {i}? <image>", "yes" if rng.random() < 0.7 else "No"),
            "colour": ("which colour?\n<image>", rng.choice(["red", "blue"])),
        }[kind]
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": str(answer)},
        ]
        if i % 5 == 0:
            turns = [
                {"role": "user", "content": "which colour?"},
                {"role": "assistant", "content": "green"},
                *turns,
            ]
        meta = {"kind": kind} if i % 11 else {}
        if kind == "colour":
            meta["answers"] = [str(answer), "RED" if i % 3 else "purple"]
        examples.append({"images": [image], "conversation": turns, "meta": meta})
    for i, images in ((6, [None]), (13, [])):
        if i < n:
            examples[i]["images"] = images
    return examples


def make_dataset(examples=None):
    examples = make_questions() if examples is None else examples
    return Dataset(fakes.Source(examples), Prompts())


def make_votes():
    """Ten answers each."""
    rng, examples = np.random.default_rng(8), make_questions()
    for example in examples:
        example["meta"]["answers"] = rng.choice(["one", "2", "3", "yes", "red"], 10).tolist()
    return make_dataset(examples)


def make_yes_no():
    return make_dataset([e for e in make_questions(60) if e["meta"].get("kind") == "yes_no"])


def make_choices():
    """Options of which some hold what the model says."""
    examples = make_questions()
    for n, example in enumerate(examples):
        if n % 4 != 2:
            example["meta"]["options"] = ["3", "blue", "red"]
            example["meta"]["answers"] = ["ABC"[n % 3]]
    return make_dataset(examples)


# the dataset of each evaluator of generated text
DATASETS = {
    "answers": make_dataset,
    "vqa": make_votes,
    "pope": make_yes_no,
    "multiple_choice": make_choices,
    "captioning": make_votes,
}
HAS_EVAL_EXTRA = all(map(importlib.util.find_spec, ("pycocoevalcap", "sacrebleu")))


def runnable():
    """Returns the evaluators whose libraries are installed."""
    return [name for name in EVALUATORS if name != "captioning" or HAS_EVAL_EXTRA]
