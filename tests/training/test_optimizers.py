# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_vlm import trees
from flax_vlm.training.optimizers import SCHEDULES, build_optimizer

PARAMS = {
    "image": {"fc1": {"kernel": jnp.full((64, 48), 0.5), "bias": jnp.full((48,), 0.5)}},
    "logit_scale": jnp.float32(4.5),
}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 0.25), PARAMS)
PATHS = list(trees.named_leaves(PARAMS))


def update(spec, params=PARAMS, grads=GRADS, steps=1):
    optimizer = build_optimizer(spec, steps=100, paths=PATHS)
    state = optimizer.transform.init(params)
    for _ in range(steps):
        change, state = optimizer.transform.update(grads, state, params)
        params = optax.apply_updates(params, change)
    return params


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_every_optimizer_moves_against_the_gradient(name):
    new = update({"name": name, "lr": 0.01}, steps=2)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a < b)), new, PARAMS)))


def test_adamw_equals_its_formula():
    new = update({"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "b2": 0.95}, steps=1)
    # first step: m / sqrt(v) = g / |g| after bias correction; decay is multiplied by the learning
    # rate
    expected = 0.5 - 0.01 * (0.25 / (0.25 + 1e-8) + 0.1 * 0.5)
    np.testing.assert_allclose(new["image"]["fc1"]["kernel"][0, 0], expected, rtol=1e-6)


def test_decay_acts_on_what_its_rule_matches():
    new = update(
        {"name": "sgd", "lr": 1.0, "weight_decay": 0.1}, grads=jax.tree.map(jnp.zeros_like, GRADS)
    )
    np.testing.assert_allclose(new["image"]["fc1"]["kernel"], 0.45, rtol=1e-6)
    assert float(new["image"]["fc1"]["bias"][0]) == 0.5 and float(new["logit_scale"]) == 4.5


def test_learning_rate_multipliers_act_by_first_match():
    spec = {"name": "sgd", "lr": 1.0, "lr_multipliers": (("image/.*bias", 0.0), ("image/.*", 0.5))}
    new = update(spec)
    assert float(new["image"]["fc1"]["bias"][0]) == 0.5
    assert float(new["image"]["fc1"]["kernel"][0, 0]) == 0.5 - 0.125
    assert float(new["logit_scale"]) == 4.25


def test_layer_decay_slows_early_layers_of_each_encoder():
    def encoder(depth):
        blocks = {"blocks": {"mlp": {"fc1": {"kernel": jnp.ones((depth, 3, 2))}}}}
        return {"positions": jnp.ones((4, 3)), "encoder": {**blocks, "norm": jnp.ones(3)}}

    params = {"image": encoder(3), "text": encoder(2), "logit_scale": jnp.ones(())}
    spec = {"name": "sgd", "lr": 1.0, "layer_decay": 0.5}
    optimizer = build_optimizer(spec, steps=10, paths=list(trees.named_leaves(params)))
    change, _ = optimizer.transform.update(params, optimizer.transform.init(params), params)
    change = trees.named_leaves(change)
    blocks = [change[f"{tower}/encoder/blocks/mlp/fc1/kernel"] for tower in ("image", "text")]
    for found, factors in zip(blocks, ([0.125, 0.25, 0.5], [0.25, 0.5]), strict=True):
        expected = -np.broadcast_to(np.reshape(factors, (-1, 1, 1)), found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert float(change["image/positions"][0, 0]) == -(0.5**4)
    assert float(change["text/positions"][0, 0]) == -(0.5**3)
    assert float(change["text/encoder/norm"][0]) == float(change["logit_scale"]) == -1.0


def test_the_clamp_keeps_the_logit_scale_inside_its_bounds():
    up = jax.tree.map(lambda g: -g, GRADS)
    new = update(
        {"name": "sgd", "lr": 1.0, "clamp": (("logit_scale", 0.0, 4.6052),)}, grads=up, steps=3
    )
    np.testing.assert_allclose(new["logit_scale"], 4.6052, rtol=1e-6)
    assert float(new["image"]["fc1"]["kernel"][0, 0]) == 1.25, "others are free"


def test_gradient_clipping_bounds_the_global_norm():
    new = update({"name": "sgd", "lr": 1.0, "grad_clip": 0.1})
    change = jax.tree.map(lambda a, b: a - b, new, PARAMS)
    np.testing.assert_allclose(optax.tree.norm(change), 0.1, rtol=1e-4)


def test_adafactor_keeps_factored_moments_and_bfloat16_momentum():
    optimizer = build_optimizer({"name": "adafactor", "lr": 1.0}, steps=10)
    leaves = jax.tree.leaves(optimizer.transform.init({"w": jnp.ones((256, 128))}))
    second = [x.size for x in leaves if x.dtype == jnp.float32]
    assert sum(second) < 256 + 128 + 8 and any(x.dtype == jnp.bfloat16 for x in leaves)


def test_muon_makes_kernels_of_blocks_orthogonal_and_leaves_the_rest_to_adam():
    shapes = {  # layers first; heads go out of q and come into o
        "encoder/blocks/attention/q/kernel": (2, 6, 3, 4),
        "encoder/blocks/attention/o/kernel": (2, 3, 4, 6),
        "encoder/blocks/mlp/fc1/kernel": (2, 6, 20),
        "encoder/blocks/mlp/fc1/bias": (2, 20),
        "patches/kernel": (4, 4, 3, 6),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = {p: jax.random.normal(k, s) for k, (p, s) in zip(keys, shapes.items(), strict=True)}
    tree = trees.unflatten(grads)
    optimizer = build_optimizer({"name": "muon", "lr": 1.0, "rms": 0.5}, 10, list(shapes))
    change, _ = optimizer.transform.update(tree, optimizer.transform.init(tree), tree)
    change = trees.named_leaves(change)
    for path, (rows, columns) in zip(shapes, [(6, 12), (12, 6), (6, 20)], strict=False):
        expected = []
        for layer in np.asarray(grads[path]).reshape(2, rows, columns):
            left, _, right = np.linalg.svd(layer, full_matrices=False)
            expected.append(-left @ right * 0.5 * max(rows, columns) ** 0.5)
        found = np.asarray(change[path]).reshape(2, rows, columns)
        # Newton and Schulz bring singular values near one, to within 0.7 .. 1.2
        scale = np.sum(found * expected) / np.sum(np.square(expected))
        assert 0.7 < scale < 1.2, path
        cosine = np.sum(found * expected) / np.linalg.norm(found) / np.linalg.norm(expected)
        assert cosine > 0.97, path
    for path in ("encoder/blocks/mlp/fc1/bias", "patches/kernel"):
        np.testing.assert_allclose(change[path], -np.sign(grads[path]), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "points"),
    [
        ("warmup_cosine", {"warmup": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("warmup_cosine", {"warmup": 0.1, "end": 0.2}, {10: 1.0, 100: 0.2}),
        ("rsqrt", {"warmup": 10, "timescale": 30}, {5: 0.5, 10: 1.0, 100: 0.5}),
        (
            "rsqrt",
            {"warmup": 0, "timescale": 100, "cooldown": 0.5},
            {50: 1 / 1.5**0.5, 75: 0.5 / 1.75**0.5, 100: 0},
        ),
        ("constant", {}, {0: 1.0, 100: 1.0}),
        ("constant", {"warmup": 4}, {2: 0.5, 50: 1.0}),
    ],
)
def test_schedules_pass_through_their_points(name, options, points):
    schedule = SCHEDULES[name](lr=1.0, steps=100, **options)
    for step, value in points.items():
        np.testing.assert_allclose(schedule(jnp.int32(step)), value, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "adam", "lr": 1},
            "unknown optimizer 'adam', choose one of .*adamw.*did you mean",
        ),
        (
            {"name": "adamw", "lr": 1, "beta2": 0.9},
            "unknown key .'beta2'. for optimizer 'adamw'.*b2",
        ),
        ({"name": "sgd", "lr": 1, "schedule": {"name": "cos"}}, "unknown schedule 'cos'"),
        ({"name": "sgd", "lr": 1, "freeze": ("imag/.*",)}, "optimizer.freeze must match"),
        ({"name": "sgd", "lr": 1, "freeze": (".*",)}, "must leave something to train"),
    ],
)
def test_wrong_settings_name_the_choices(spec, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(spec, steps=10, paths=PATHS)
