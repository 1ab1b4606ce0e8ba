# SPDX-License-Identifier: Apache-2.0
"""The next-token objective over a model that sees and one that does not."""

import dataclasses

import jax
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.batch import normalize_image
from flax_vlm.models.generate import generate, start
from flax_vlm.models.prompts import Prompt
from flax_vlm.objectives import build_objective
from flax_vlm.training.optimizers import build_optimizer
from flax_vlm.training.state import make_init
from flax_vlm.training.step import make_train_step

IMAGE = 40
DECODER = {
    "vocab_size": 48,
    "width": 24,
    "depth": 2,
    "mlp_dim": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
}
TOWER = {"name": "vit", "width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 2}
LLAVA = {
    "name": "llava",
    "image": {**TOWER, "image_size": 16, "patch_size": 8},
    "connector": {"name": "mlp"},
    "language_model": DECODER,
    "image_token_id": IMAGE,
}
TEXT = np.array([[1, *[IMAGE] * 4, 5, 6, 7, 8, 0], [1, 9, 8, 7, 6, 5, 4, 3, 2, 1]], np.int32)
BATCH = {
    "text": TEXT,
    "text_mask": TEXT != 0,
    "loss_mask": np.isin(np.arange(10), [6, 7, 8]) & np.ones((2, 1), bool),
    "images": np.random.default_rng(0).integers(0, 256, (2, 1, 16, 16, 3), np.uint8),
}
RNG = jax.random.key(3)


@pytest.fixture(scope="module")
def llava():
    return build_objective(LLAVA, {"name": "next_token", "max_new_tokens": 4})


@pytest.fixture(scope="module")
def params(llava):
    leaves, tree = jax.tree.flatten(llava.init(jax.random.key(0), BATCH)[0])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


def loss(objective, params, batch):
    return objective.loss(params, {}, batch, RNG, train=True)[0]


def test_the_loss_is_the_mean_over_supervised_tokens_of_the_logits_before_them(llava, params):
    logits = np.asarray(llava.predictions["logits"](params, {}, BATCH), np.float64)
    terms = []
    for b, i in np.argwhere(BATCH["loss_mask"]):
        row = logits[b, i - 1]
        terms.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[TEXT[b, i]])
    found = loss(llava, params, BATCH)
    assert float(found.weight) == len(terms) == 6
    np.testing.assert_allclose(found.value(), np.mean(terms), rtol=1e-5)


def test_only_supervised_tokens_and_rows_that_are_examples_count(llava, params):
    reference = loss(llava, params, BATCH)
    # row 1 sees no image, so a change of the tokens behind its last supervised one changes nothing
    text = BATCH["text"].copy()
    text[1, 9] = 30
    np.testing.assert_allclose(loss(llava, params, BATCH | {"text": text}).total, reference.total)
    masked = loss(llava, params, BATCH | {"example_mask": np.array([True, False])})
    assert float(masked.weight) == 3


def test_chunks_of_the_logits_change_neither_loss_nor_gradients(llava, params):
    chunked = dataclasses.replace(llava, logit_chunk=5)
    whole = jax.value_and_grad(lambda p: loss(llava, p, BATCH).total)(params)
    parts = jax.value_and_grad(lambda p: loss(chunked, p, BATCH).total)(params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="logit_chunk must divide the length of the text, got 3"):
        loss(dataclasses.replace(llava, logit_chunk=3), params, BATCH)


def test_a_frozen_image_encoder_stays_bit_identical_and_has_no_slots(llava):
    params, _ = jax.eval_shape(llava.init, RNG, BATCH)
    spec = {"name": "adamw", "lr": 1e-2, "freeze": ("image/.*",), "schedule": {"name": "constant"}}
    optimizer = build_optimizer(spec, 3, list(trees.named_leaves(params)))
    state = make_init(llava, optimizer, ema=False)(RNG, BATCH)
    before = jax.tree.map(np.asarray, state.params)
    step = jax.jit(make_train_step(llava, optimizer, seed=0))
    for _ in range(3):
        state, metrics = step(state, BATCH)
    for path, leaf in trees.named_leaves(state.params).items():
        same = np.array_equal(leaf, trees.named_leaves(before)[path])
        assert same == path.startswith("image/"), path
    slots = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(state.opt_state)]
    assert any("connector" in slot for slot in slots)
    assert not any("'image'" in slot for slot in slots) and np.isfinite(metrics["loss"].value())


def test_micro_batches_of_unequal_answers_give_the_gradient_of_the_whole_batch(llava):
    mask = BATCH["loss_mask"].copy()
    mask[1, 7:] = False
    batch = BATCH | {"loss_mask": mask}
    paths = list(trees.named_leaves(jax.eval_shape(llava.init, RNG, BATCH)[0]))
    spec = {"name": "sgd", "lr": 0.1, "schedule": {"name": "constant"}}
    optimizer = build_optimizer(spec, 1, paths)
    state = make_init(llava, optimizer, ema=False)(RNG, batch)
    ends = [
        jax.jit(make_train_step(llava, optimizer, seed=0, micro_batches=n))(state, batch)[0].params
        for n in (1, 2)
    ]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_generation_continues_the_most_probable_way_and_stops(llava, params):
    text = BATCH["text"][:, :6]
    prompt = {"text": text, "text_mask": np.ones_like(text, bool), "images": BATCH["images"]}
    tokens = np.asarray(jax.jit(llava.predictions["generate"])(params, {}, prompt))
    for _ in range(4):  # the same without a cache
        longer = prompt | {"text": text, "text_mask": np.ones_like(text, bool)}
        logits = np.asarray(llava.predictions["logits"](params, {}, longer))[:, -1]
        text = np.concatenate([text, logits.argmax(-1)[:, None].astype(np.int32)], 1)
    np.testing.assert_array_equal(tokens, text[:, 6:])
    stopping = dataclasses.replace(llava, stop_ids=(int(tokens[0, 1]),), pad_id=47)
    stopped = np.asarray(stopping.predictions["generate"](params, {}, prompt))
    assert stopped[0, 1] == tokens[0, 1] and (stopped[0, 2:] == 47).all()


def test_a_pruned_model_drops_the_image_of_a_prompt_alone(llava, params):
    text = np.concatenate([TEXT[:1, :9], TEXT[:1, :9]])
    batch = {"text": text, "text_mask": np.ones_like(text, bool), "images": BATCH["images"]}
    objective = build_objective(
        LLAVA | {"pruning": {"layer": 1, "keep": 0}}, {"name": "next_token", "max_new_tokens": 3}
    )
    model = objective.model
    generated = objective.predictions["generate"]
    images = normalize_image(batch["images"], objective.image_mean, objective.image_std)
    x = model.apply({"params": params}, text, images, method="embed")
    decoder, visual = model.language_model, text == IMAGE
    prompt = Prompt(embeddings=x, mask=batch["text_mask"], visual=visual)
    expected = generate(decoder, params["language_model"], prompt, max_new_tokens=3)
    np.testing.assert_array_equal(generated(params, {}, batch), expected.tokens)
    assert expected.cache.rest.capacity == expected.cache.first.capacity - 4
    whole = llava.predictions["logits"](params, {}, batch)[:, -1]
    pruned = start(decoder, params["language_model"], prompt, max_new_tokens=3).logits
    assert np.abs(pruned - whole).max() > 1e-3
    traced = str(jax.make_jaxpr(lambda b: generated(params, {}, b))(batch))
    assert "[1,2,8,2,6]" in traced  # the later layer's cache: 9 + 3 - 4 slots
    trained = [loss(one, params, BATCH).value() for one in (objective, llava)]
    assert trained[0] == trained[1]  # nothing is dropped in training


def test_text_alone_trains_and_an_image_given_to_it_is_refused():
    objective = build_objective({"name": "language_model", **DECODER}, {"name": "next_token"})
    batch = {key: value for key, value in BATCH.items() if key != "images"}
    params, _ = objective.init(RNG, batch)
    assert np.isfinite(loss(objective, params, batch).value())
    assert "visual_tokens" not in objective.predictions
    with pytest.raises(ValueError, match="a LanguageModel reads text alone, got images"):
        loss(objective, params, BATCH)
