# SPDX-License-Identifier: Apache-2.0
"""Packed rows: which examples share one, and that sharing changes neither loss nor gradient."""

import dataclasses

import jax
import numpy as np
import pytest

from flax_vlm.batch import HOST_KEYS, check_batch
from flax_vlm.data.conversations import ConversationPreprocess
from flax_vlm.data.decode import REASONS
from flax_vlm.data.images import Resize
from flax_vlm.data.packing import (
    PackedPreprocess,
    PackedSource,
    first_fit,
    packed_source,
    read_index,
    size_of,
)
from flax_vlm.data.pipeline import Dataset
from flax_vlm.data.sources import MemorySource
from flax_vlm.data.text import byte_level
from flax_vlm.objectives import build_objective

TOKENIZER = byte_level(special=("<image>",))
LENGTH, IMAGES = 64, 3
RNG = np.random.default_rng(0)


def say(question, answer, images=0):
    pictures = [RNG.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(images)]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": pictures, "conversation": turns, "meta": {}}


EXAMPLES = [
    say("<image>how?", "so", 1),
    say("hello", "good day"),
    say("<image> or <image>?", "the first", 2),
    say("<image>", "a", 1),
    say("why", "x" * LENGTH),
]
INNER = ConversationPreprocess(
    image_ops=(Resize(8),),
    image_size=(8, 8),
    tokenizer=TOKENIZER,
    text_length=LENGTH,
    template="short",
    tokens_per_image=4,
    num_images=IMAGES,
)
PACKED = PackedPreprocess(INNER)
SIZES = [size_of(example, INNER) for example in EXAMPLES]
ROWS = first_fit(SIZES, LENGTH, IMAGES)


@pytest.fixture(scope="module")
def objective():
    decoder = {"vocab_size": TOKENIZER.vocab_size, "width": 24, "depth": 2, "mlp_dim": 48}
    tower = {"name": "vit", "width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2}
    model = {
        "name": "llava",
        "image": {**tower, "image_size": 8, "patch_size": 4},
        "connector": {"name": "mlp"},
        "language_model": {**decoder, "num_heads": 4, "num_kv_heads": 2},
        "image_token_id": TOKENIZER.id_of("<image>"),
    }
    return build_objective(model, {"name": "next_token"})


def batch_of(source, preprocess):
    with Dataset(source=source, preprocess=preprocess).ordered(batch_size=4) as batches:
        batch = next(batches)
    batch = {key: x for key, x in batch.items() if key not in HOST_KEYS}
    assert check_batch(batch) == 4
    return batch


def test_an_example_goes_into_the_first_row_with_room_for_tokens_and_images():
    sizes = [(5, 1), (6, 0), (3, 1), (0, 0), (2, 0), (8, 0), (2, 1)]
    assert first_fit(sizes, 8, 2) == [[0, 2], [1, 4], [5], [6]]
    assert first_fit(sizes, 8, 1) == [[0, 4], [1, 6], [2], [5]]


def test_what_has_no_answer_that_fits_is_in_no_row():
    assert SIZES[4] == (0, 0) and sorted(n for row in ROWS for n in row) == [0, 1, 2, 3]
    assert len(ROWS) == 2


def test_packed_rows_have_the_loss_and_the_gradient_of_the_same_texts_alone(objective):
    alone = batch_of(MemorySource(EXAMPLES[:4]), INNER)
    packed = batch_of(PackedSource(MemorySource(EXAMPLES), ROWS), PACKED)
    assert packed["example_mask"].tolist() == [True, True, False, False]
    leaves, tree = jax.tree.flatten(objective.init(jax.random.key(0), alone)[0])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, noise)

    @jax.jit
    def run(params, batch):
        def loss(params):
            return objective.loss(params, {}, batch, jax.random.key(2), train=True)[0].total

        weight = objective.loss(params, {}, batch, jax.random.key(2), train=True)[0].weight
        return weight, jax.value_and_grad(loss)(params)

    expected, found = run(params, alone), run(params, packed)
    assert float(found[0]) == float(expected[0]) > 10
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1, np.abs(b).max()))
    # and the numbers of the texts matter: without them the first text is seen by the second
    mixed = run(params, {k: x for k, x in packed.items() if k not in ("segments", "positions")})
    assert abs(float(mixed[1][0]) - float(expected[1][0])) > 1e-3


def test_texts_are_numbered_and_positions_start_anew_with_each():
    row = PACKED({"packed": [EXAMPLES[0], EXAMPLES[1]]}, RNG)
    first, rest = SIZES[0][0], LENGTH - SIZES[0][0]
    np.testing.assert_array_equal(row["segments"], [1] * first + [2] * rest)
    np.testing.assert_array_equal(row["positions"], [*range(first), *range(rest)])
    assert row["text_mask"].sum() == first + SIZES[1][0]


def test_a_broken_image_takes_its_own_conversation_alone_out_of_the_row(tmp_path):
    lost = say("<image>", "b", 1) | {"images": [tmp_path / "none.png"]}
    row = PACKED({"packed": [EXAMPLES[0], lost, EXAMPLES[3]]}, RNG)
    rest = PACKED({"packed": [EXAMPLES[0], EXAMPLES[3]]}, RNG)
    assert REASONS[row.pop("broken")] == "unreadable" and rest.pop("broken") == 0
    for key in rest:
        np.testing.assert_array_equal(row[key], rest[key], err_msg=key)
    alone = PACKED({"packed": [lost]}, RNG)
    assert not alone["example_mask"] and REASONS[alone["broken"]] == "unreadable"
    assert alone["segments"].shape == alone["positions"].shape == (LENGTH,)


def test_rows_that_were_packed_for_something_else_are_refused():
    with pytest.raises(ValueError, match="must fit into 64 tokens, got .*: pack again"):
        PACKED({"packed": EXAMPLES[1:2] * 5}, RNG)
    fewer = dataclasses.replace(INNER, num_images=2)
    with pytest.raises(ValueError, match="a row must have at most 2 images, got 3; set data.chat"):
        PackedPreprocess(fewer)({"packed": [EXAMPLES[3]] * 3}, RNG)
    with pytest.raises(ValueError, match="made of 9 examples and there are 5; pack again"):
        packed_source(MemorySource(EXAMPLES), {"examples": 9, "rows": ROWS})


def test_a_file_that_is_no_index_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.json must be an index of flax_vlm.tools.pack"):
        read_index(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="it lacks .'source', 'examples', 'rows'"):
        read_index(tmp_path / "other.json")
