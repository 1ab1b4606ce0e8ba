# SPDX-License-Identifier: Apache-2.0
"""A dataset as the data contract describes it, and a linear two-tower model, both tiny."""

import dataclasses
import zlib

import jax.numpy as jnp
import numpy as np

VOCABULARY = 128
E = 6
SIDE = 4


def text_id(caption):
    return np.int32(zlib.crc32(caption.encode()) & 0x7FFFFFFF)


class CharTokenizer:
    def encode(self, texts, length):
        ids, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            codes = [ord(c) % VOCABULARY for c in text][:length]
            ids[row, : len(codes)], mask[row, : len(codes)] = codes, True
        return ids, mask, np.array([len(text) > length for text in texts])


@dataclasses.dataclass
class Source:
    examples: list
    class_names: tuple | None = None

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


@dataclasses.dataclass
class Preprocess:
    text_length: int = 40
    tokenizer: CharTokenizer = dataclasses.field(default_factory=CharTokenizer)

    def __call__(self, example, rng):
        ids, mask, truncated = self.tokenizer.encode([example["caption"]], self.text_length)
        good = example["image"] is not None
        return {
            "image": example["image"] if good else np.zeros((SIDE, SIDE, 3), np.uint8),
            "text": ids[0],
            "text_mask": mask[0],
            "text_id": text_id(example["caption"]),
            "label": np.int32(example.get("label", -1)),
            "example_mask": np.bool_(good),
            "broken": np.int8(not good),
            "text_truncated": truncated[0],
        }


@dataclasses.dataclass
class Dataset:
    source: Source
    preprocess: Preprocess = dataclasses.field(default_factory=Preprocess)

    def ordered(self, *, batch_size, shard=0, num_shards=1):
        b = batch_size // num_shards
        for start in range(0, len(self.source), batch_size):
            rows = []
            for i in range(start + shard * b, start + (shard + 1) * b):
                padding = i >= len(self.source)
                example = {"image": None, "caption": ""} if padding else self.source[i]
                rows.append(self.preprocess(example, np.random.default_rng(i)))
            yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def image_embedding(params, extras, batch):
    pixels = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 255 - 0.5
    z = pixels @ params["image"] + extras.get("shift", 0.0)
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def text_embedding(params, extras, batch):
    # a weight that depends on the position, so that the order of the words matters
    place = jnp.arange(1, batch["text"].shape[1] + 1, dtype=jnp.float32)
    weight = batch["text_mask"] * jnp.cos(place)[None]
    z = jnp.einsum("BLE,BL->BE", params["text"][batch["text"]], weight)
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def logits(params, extras, batch):
    pixels = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 255 - 0.5
    return pixels @ params["classes"]


PREDICTIONS = {
    "image_embedding": image_embedding,
    "text_embedding": text_embedding,
    "logits": logits,
}


def make_params(seed=0, classes=5):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(SIDE * SIDE * 3, E)).astype(np.float32),
        "text": rng.normal(size=(VOCABULARY, E)).astype(np.float32),
        "classes": rng.normal(size=(SIDE * SIDE * 3, classes)).astype(np.float32),
    }


def make_examples(n=53, seed=0):
    """Examples with equal captions, twin images, broken images and missing labels and swaps."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        size, colour = rng.choice(["big", "tiny"]), rng.choice(["red", "blue", "green", "black"])
        swap = f"a {colour} {size} cube {i % 9}" if i % 3 else None
        examples.append(
            {
                "image": rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
                "caption": f"a {size} {colour} cube {i % 9}",
                "label": int(rng.integers(5)) if i % 5 else -1,
                "meta": {"swapped": swap} if i % 4 else {},
            }
        )
    for i in (7, 30):
        examples[i]["image"] = None
    for i in (11, 12, 40):
        examples[i]["image"] = examples[5]["image"]
    return examples


CLASS_NAMES = ("zero", "one_hole", "two, second", "three", "four")


def make_dataset(examples=None):
    return Dataset(Source(make_examples() if examples is None else examples, CLASS_NAMES))


def numpy_image_embedding(params, images):
    pixels = np.stack(images).reshape(len(images), -1).astype(np.float64) / 255 - 0.5
    z = pixels @ params["image"]
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def numpy_text_embedding(params, texts, length=40):
    ids, mask, _ = CharTokenizer().encode(texts, length)
    weight = mask * np.cos(np.arange(1, length + 1))
    z = np.einsum("BLE,BL->BE", params["text"].astype(np.float64)[ids], weight)
    return z / np.linalg.norm(z, axis=1, keepdims=True)
