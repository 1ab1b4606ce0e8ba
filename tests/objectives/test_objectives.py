# SPDX-License-Identifier: Apache-2.0
"""Objectives on tiny models: masks, sharding, freezing, fitting one batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.objectives import build_objective
from flax_vlm.training import sharding
from flax_vlm.training.optimizers import build_optimizer
from flax_vlm.training.state import make_init, state_shardings
from flax_vlm.training.step import make_train_step

TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4}
MESHES = [(8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)]
TEXT = {"name": "text_encoder", "vocab_size": 40, "length": 6, "dropout": 0.1, **TOWER}
IMAGE = {"name": "vit", "image_size": 8, "patch_size": 4, **TOWER}
MAP_IMAGE = {**IMAGE, "pool": "map", "dropout": 0.1}
SIGLIP = {"name": "siglip", "embed_dim": 16, "image": MAP_IMAGE, "text": TEXT}
CLIP = {
    "name": "clip", "embed_dim": 16, "image": {**IMAGE, "patch_dropout": 0.5},
    "text": {**TEXT, "eos_id": 1, "pooling": "eos", "is_causal": True},
}  # fmt: skip
VIT = {**IMAGE, "pool": "cls", "num_classes": 8, "dropout": 0.1}
KINDS = {
    "sigmoid": (SIGLIP, {"name": "contrastive", "pair_loss": {"name": "sigmoid"}}),
    "softmax": (CLIP, {"name": "contrastive", "pair_loss": {"name": "softmax"}}),
    "sharded": (
        SIGLIP,
        {"name": "contrastive", "pair_loss": {"name": "sigmoid", "form": "sharded", "tile": 4}},
    ),
    "classification": (VIT, {"name": "classification", "label_smoothing": 0.1}),
}


def make(kind):
    return build_objective(*KINDS[kind])


def make_batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(2, 40, (size, 6)).astype(np.int32)
    text[:, -1] = 1
    text[3] = text[5]  # two equal captions
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8),
        "text": text,
        "text_mask": np.ones((size, 6), bool),
        "text_id": np.where(np.arange(size) == 3, 5, np.arange(size)).astype(np.int32),
        "label": rng.integers(0, 8, size).astype(np.int32),
        "example_mask": np.arange(size) != size - 2,
    }


def randomised(objective, batch, seed=1):
    """Parameters none of which keeps its initial value: zeros hide errors."""
    params, extras = jax.jit(objective.init)(jax.random.key(seed), batch)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params
    ), extras


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_row_changes_nothing(kind):
    objective = make(kind)
    batch = make_batch()
    params, extras = randomised(objective, batch)
    other = {k: v.copy() for k, v in batch.items()}
    other["image"][-2], other["text"][-2], other["label"][-2] = 255, 7, 3
    totals = [
        jax.jit(lambda b: objective.loss(params, extras, b, jax.random.key(0), train=False)[0])(b)
        for b in (batch, other)
    ]
    assert totals[0].total == totals[1].total and totals[0].weight == 15


def test_pairs_of_equal_captions_are_not_pushed_apart():
    batch = make_batch()
    objective = make("sigmoid")
    params, extras = randomised(objective, batch)

    def loss(batch, objective=objective):
        run = jax.jit(
            lambda b: objective.loss(params, extras, b, jax.random.key(0), train=False)[0]
        )
        return float(run(batch).total)

    different = {**batch, "text_id": np.arange(16, dtype=np.int32)}
    assert loss(batch) < loss(different), "two pairs fewer are negatives"
    negative = dataclasses.replace(
        objective, pair_loss={"name": "sigmoid", "same_text": "negative"}
    )
    np.testing.assert_allclose(loss(batch, negative), loss(different), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        *(("sigmoid", axes) for axes in MESHES),
        ("softmax", (2, 2, 2)),
        ("classification", (2, 2, 2)),
    ],
)
def test_sharded_equals_unsharded_in_value_gradient_and_update(kind, axes, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)  # so that tiny tensors are split too
    objective = make(kind)
    optimizer = build_optimizer({"name": "sgd", "lr": 0.5}, steps=10)
    batch = make_batch()
    params, extras = randomised(objective, batch)
    init = jax.jit(make_init(objective, optimizer, ema=False))
    state = dataclasses.replace(init(jax.random.key(0), batch), params=params)
    step = make_train_step(objective, optimizer, seed=0)
    expected, expected_metrics = jax.jit(step)(state, batch)

    mesh = sharding.make_mesh(*axes)
    shardings = state_shardings(jax.eval_shape(lambda: state), mesh)
    if axes[1] * axes[2] > 1:
        specs = [s.spec for s in jax.tree.leaves(shardings.params)]
        assert sum(any(axis for axis in spec) for spec in specs) > 4, "something is split"
    rows = sharding.batch_sharding(mesh)
    placed = jax.device_put(state, shardings), sharding.put_batch(batch, rows)
    sharded = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        new, metrics = sharded(*placed)
    np.testing.assert_allclose(metrics["loss"].total, expected_metrics["loss"].total, rtol=2e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=2e-5)
    for path, leaf in trees.named_leaves(expected.params).items():
        # SGD: the update is the gradient
        np.testing.assert_allclose(
            trees.named_leaves(new.params)[path],
            leaf,
            atol=2e-5 * max(1, abs(leaf).max()),
            err_msg=path,
        )


def test_a_locked_image_tower_stays_bit_identical_and_has_no_slots():
    objective = make("sigmoid")
    optimizer = build_optimizer({"name": "adamw", "lr": 0.1, "freeze": ("image/.*",)}, steps=10)
    state = jax.jit(make_init(objective, optimizer, ema=False))(jax.random.key(0), make_batch())
    step = jax.jit(make_train_step(objective, optimizer, seed=0))
    new = state
    for seed in range(3):
        new, _ = step(new, make_batch(seed=seed))
    assert not trees.differences(new.params["image"], state.params["image"])
    assert trees.differences(new.params["text"], state.params["text"])
    assert not [path for path in trees.named_leaves(new.opt_state) if "/image/" in path]


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_fits_one_batch(kind):
    objective = make(kind)
    optimizer = build_optimizer({"name": "adamw", "lr": 3e-3}, steps=60)
    batch = make_batch()
    state = jax.jit(make_init(objective, optimizer, ema=False))(jax.random.key(0), batch)
    step = jax.jit(make_train_step(objective, optimizer, seed=0), donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value()))
    assert losses[-1] < 0.6 * losses[0]
    if kind != "classification":
        predict = objective.predictions
        image = jax.jit(predict["image_embedding"])(state.params, {}, batch)
        text = jax.jit(predict["text_embedding"])(state.params, {}, batch)
        found = np.argmax(image @ text.T, axis=1)
        right = (found == np.arange(16)) | (batch["text_id"][found] == batch["text_id"])
        assert right[:14].mean() > 0.7
        np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_have_the_shapes_of_the_contract(kind):
    objective = make(kind)
    batch = make_batch()
    params, extras = jax.eval_shape(objective.init, jax.random.key(0), batch)
    predictions = objective.predictions.items()
    out = {name: jax.eval_shape(fn, params, extras, batch) for name, fn in predictions}
    assert all(value.dtype == jnp.float32 for value in out.values())
    if kind == "classification":
        assert out["logits"].shape == (16, 8)
    else:
        assert out["image_embedding"].shape == out["text_embedding"].shape == (16, 16)
        assert out["logits"].shape == (16, 16)
    assert out["image_tokens"].shape[0::2] == (16, 32)
