# SPDX-License-Identifier: Apache-2.0
"""The gradient cache gives the gradient of the whole batch, and takes the memory of a micro-batch.

The reference is what it replaces: the towers run on each micro-batch in turn with the same random
keys, nothing is recomputed, one dense loss sees all embeddings, jax.grad. The proof is in float64,
where a real difference cannot hide in rounding. In float32 the entries of a leaf that are sums of
what nearly cancels differ by more than 1e-6 between any two programs, without a cache too.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.batch import normalize_image, split_micro_batches
from flax_vlm.build import build
from flax_vlm.losses import LOSSES
from flax_vlm.losses.pairs import Pairs
from flax_vlm.models import MODELS
from flax_vlm.objectives.contrastive import Contrastive
from flax_vlm.training import sharding
from flax_vlm.training.optimizers import build_optimizer
from tests.objectives.towers import make_batch, randomised, toy_model

B = 32
HALF = (0.5, 0.5, 0.5)
TOWER = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "dropout": 0.1}
LIMIT = {"float32": 1e-6, "float64": 1e-12}
LOSS = {
    "sigmoid": {"name": "sigmoid"},
    "softmax": {"name": "softmax"},
    "sharded sigmoid": {"name": "sigmoid", "form": "sharded", "tile": 5},
    "sharded softmax": {"name": "softmax", "form": "sharded", "tile": 5},
}


@pytest.fixture
def in_dtype(monkeypatch):
    """Makes the whole code compute in that dtype: float32 is written as jnp.float32 everywhere."""

    def use(dtype):
        monkeypatch.setattr(jnp, "float32", getattr(jnp, dtype))
        return jax.enable_x64(dtype == "float64")

    return use


def real_model():
    image = {"name": "vit", "image_size": 8, "patch_size": 2, "patch_dropout": 0.5, **TOWER}
    text = {"name": "text_encoder", "vocab_size": 40, "length": 6, **TOWER}
    image, text = (tower | {"dtype": "float64", "remat": "full"} for tower in (image, text))
    return build(MODELS, {"name": "siglip", "embed_dim": 12, "image": image, "text": text}, "model")


def cached_gradient(objective, params, batch, rng):
    """(value, {path: gradient}) of the mean loss."""

    def mean(params):
        total, _ = objective.loss(params, {}, batch, rng, train=True)
        return total.total / total.weight

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    return value, trees.named_leaves(grads)


def reference(model, loss, params, batch, rng, count):
    """The same by the plain way: no loop, no recomputation, no micro-batch code of flax_vlm."""
    pairs = Pairs(jnp.asarray(batch["text_id"]), jnp.asarray(batch["example_mask"]))

    def encode(params, image, text, text_mask, key):
        rngs = {"dropout": jax.random.fold_in(key, 0), "patch_dropout": jax.random.fold_in(key, 1)}
        arguments = (normalize_image(image, HALF, HALF), text, text_mask)
        out = model.apply({"params": params}, *arguments, train=True, rngs=rngs)
        return out.image_embedding, out.text_embedding

    def dense_loss(image, text, scale, bias):
        dense = build(LOSSES, {"name": loss["name"]}, "loss")
        return dense(image, text, scale, bias, pairs=pairs).sum() / batch["example_mask"].sum()

    def mean(params):
        keys = [rng] if count == 1 else jax.random.split(rng, count)
        parts = [
            encode(params, *(batch[name][k::count] for name in ("image", "text", "text_mask")), key)
            for k, key in enumerate(keys)
        ]
        # where example k + i * count, row i of micro-batch k, has gone
        order = np.argsort(np.concatenate([np.arange(k, B, count) for k in range(count)]))
        image, text = (jnp.concatenate(part)[order] for part in zip(*parts, strict=True))
        return dense_loss(image, text, jnp.exp(params["logit_scale"]), params.get("logit_bias"))

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    return value, trees.named_leaves(grads)


def check_equal(found, expected, limit):
    (value, grads), (expected_value, expected_grads) = found, expected
    assert value.dtype == expected_value.dtype == (jnp.float64 if limit < 1e-9 else np.float32)
    assert abs(value - expected_value) <= limit * abs(expected_value)
    assert grads.keys() <= expected_grads.keys() and "logit_scale" in grads
    for path, leaf in grads.items():
        # a key's bias moves all scores of a query alike: its gradient is 0, its rounding is not
        largest = abs(expected_grads[path.replace("/k/bias", "/q/bias")]).max()
        distance = abs(np.asarray(leaf) - np.asarray(expected_grads[path])).max()
        assert distance <= limit * largest, (path, float(distance / largest))


@pytest.mark.parametrize(
    ("loss", "count", "dtype"),
    [
        *((loss, m, "float64") for loss in ("sigmoid", "softmax") for m in (1, 2, 4, 8)),
        ("sharded sigmoid", 4, "float64"),
        ("sharded softmax", 8, "float64"),
        *((loss, m, "float32") for loss, m in zip(LOSS, (2, 4, 8, 8), strict=True)),
    ],
)
def test_every_gradient_is_that_of_the_whole_batch_dropout_included(loss, count, dtype, in_dtype):
    with in_dtype(dtype):
        model, batch, rng = toy_model(), make_batch(B), jax.random.key(0)
        objective = Contrastive(model, LOSS[loss], micro_batches=count)
        params, _ = randomised(objective, batch, dtype)
        expected = reference(model, LOSS[loss], params, batch, rng, count)
        check_equal(cached_gradient(objective, params, batch, rng), expected, LIMIT[dtype])
        assert "logit_bias" in expected[1]


def test_transformers_with_remat_have_the_gradient_of_the_whole_batch(in_dtype):
    with in_dtype("float64"):
        model, batch, rng = real_model(), make_batch(B), jax.random.key(0)
        objective = Contrastive(model, LOSS["sigmoid"], micro_batches=4)
        params, _ = randomised(objective, batch, "float64")
        expected = reference(model, LOSS["sigmoid"], params, batch, rng, 4)
        check_equal(cached_gradient(objective, params, batch, rng), expected, LIMIT["float64"])


@pytest.mark.parametrize("loss", ["sigmoid", "sharded softmax"])
@pytest.mark.parametrize("freeze", [(), ("image/.*",)])
def test_a_mesh_and_a_frozen_tower_change_no_gradient(loss, freeze, in_dtype, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 8)  # so that tiny tensors are split too
    with in_dtype("float64"):
        model, batch, rng = toy_model(), make_batch(B), jax.random.key(0)
        objective = Contrastive(model, LOSS[loss], micro_batches=4)
        params, _ = randomised(objective, batch, "float64")
        expected = reference(model, LOSS[loss], params, batch, rng, 4)
        optimizer = build_optimizer({"name": "sgd", "lr": 1.0, "freeze": freeze}, steps=1)

        def mean(trained, frozen, batch):
            joined = optimizer.join(trained, frozen)
            total, _ = objective.loss(joined, {}, batch, rng, train=True)
            return total.total / total.weight

        mesh = sharding.make_mesh(2, 4, 1)
        rows = sharding.batch_sharding(mesh)
        trained, frozen = (
            jax.device_put(part, sharding.parameter_shardings(part, mesh))
            for part in optimizer.split(params)
        )
        with jax.set_mesh(mesh):
            run = jax.jit(jax.value_and_grad(mean))
            value, grads = run(trained, frozen, sharding.put_batch(batch, rows))
        grads = trees.named_leaves(grads)
        assert any(p.startswith("image") for p in grads) == (not freeze)
        check_equal((value, grads), expected, LIMIT["float64"])


def test_memory_falls_with_the_number_of_micro_batches():
    batch = jax.eval_shape(lambda: make_batch(512))
    temporary = []
    for count in (1, 2, 4, 8):
        model = toy_model()
        wide = model.clone(image=model.image.clone(width=256), text=model.text.clone(width=256))
        objective = Contrastive(wide, {**LOSS["sharded sigmoid"], "tile": 64}, micro_batches=count)
        params = jax.eval_shape(objective.init, jax.random.key(0), batch)[0]

        def total(params, batch, objective=objective):
            return objective.loss(params, {}, batch, jax.random.key(0), train=True)[0].total

        compiled = jax.jit(jax.grad(total)).lower(params, batch).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    halves = [b / a for a, b in zip(temporary[:-1], temporary[1:], strict=True)]
    assert max(halves) < 0.7, temporary
    assert temporary[-1] < 0.25 * temporary[0], temporary


def consecutive(batch, count):
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


@pytest.mark.parametrize(
    ("split", "moves"),
    [(split_micro_batches, False), (consecutive, True)],
    ids=["every count-th row", "negative control: consecutive rows"],
)
def test_no_image_leaves_its_device(split, moves):
    mesh = sharding.make_mesh(2, 4, 1)
    rows = sharding.batch_sharding(mesh)
    kernel = jnp.ones((8 * 8 * 3, 5))

    def scores(image):
        def one(x):
            return x.reshape(len(x), -1).astype(jnp.float32) @ kernel

        return jax.lax.map(one, split(image, 4)).sum()

    image = jax.ShapeDtypeStruct((B, 8, 8, 3), jnp.uint8, sharding=rows)
    program = jax.jit(scores).lower(image).compile().as_text()
    collectives = re.findall(r"= (\S+) (?:all-|collective-|reduce-)[a-z-]+\(", program)
    assert collectives and any("u8[" in shape for shape in collectives) == moves, collectives


def test_micro_batches_must_divide_the_batch():
    objective = Contrastive(toy_model(), LOSS["sigmoid"], micro_batches=5)
    batch = make_batch(B)
    params, _ = randomised(objective, batch)
    with pytest.raises(ValueError, match="micro_batches must divide batch_size, got 5 and 32"):
        objective.loss(params, {}, batch, jax.random.key(0), train=True)
