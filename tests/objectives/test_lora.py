# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.objectives import build_objective
from flax_vlm.objectives.lora import (
    frozen_patterns,
    init_adapters,
    merge,
    split_adapters,
    with_lora,
)
from flax_vlm.training import sharding
from flax_vlm.training.optimizers import build_optimizer
from flax_vlm.training.state import evaluation_params, make_init, state_shardings
from flax_vlm.training.step import make_train_step

MODEL = {
    "name": "vit", "image_size": 8, "patch_size": 4, "width": 12, "depth": 3, "mlp_dim": 20,
    "num_heads": 2, "pool": "map", "num_classes": 5,
}  # fmt: skip
# every layout: q [L, D, N, K], o [L, N, K, D], fc1 [L, D, M], patches [h, w, C, D], k [D, N, K]
SPEC = {
    "rules": [[".*blocks/attention/(q|o)/kernel", 2], [".*fc1/kernel|patches/kernel|.*/k/.*l", 3]],
    "alpha": 6.0,
    "train": ["head/.*"],
}


def batch(size=6):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "label": np.arange(size, dtype=np.int32) % 5}


def objective(spec=SPEC):
    return build_objective(MODEL, {"name": "classification"}, spec)


def randomised(params):
    leaves = trees.named_leaves(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    pairs = zip(leaves.items(), keys, strict=True)
    return trees.unflatten({p: 0.3 * jax.random.normal(k, x.shape) for (p, x), k in pairs})


def as_matrices(a, b):
    """A [L, in, r] and B [L, r, out] in float64, L = 1 where there is no layer axis."""
    layers = a.shape[0] if a.shape[0] == b.shape[0] == 3 else 1
    rank = a.shape[-1]
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)


def test_the_start_is_the_base_model_bit_for_bit():
    params, _ = objective().init(jax.random.key(3), batch())
    base, _ = objective({}).init(jax.random.key(3), batch())
    assert not trees.differences(merge(params, SPEC["alpha"]), base)
    _, adapters = split_adapters(params)
    pairs = trees.named_leaves(adapters)
    assert all(np.any(x) == path.endswith("/a") for path, x in pairs.items())
    logits = [
        jax.jit(o.predictions["logits"])(p, {}, batch())
        for o, p in ((objective(), params), (objective({}), base))
    ]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("path", "a", "b"),
    [
        ("encoder/blocks/attention/q/kernel", (3, 12, 2), (3, 2, 2, 6)),
        ("encoder/blocks/attention/o/kernel", (3, 2, 6, 2), (3, 2, 12)),
        ("encoder/blocks/mlp/fc1/kernel", (3, 12, 3), (3, 3, 20)),
        ("patches/kernel", (4, 4, 3, 3), (3, 12)),
        ("pool/attention/k/kernel", (12, 3), (3, 2, 6)),
    ],
)
def test_adapters_factor_every_layer_on_its_own(path, a, b):
    params, _ = objective().init(jax.random.key(0), batch())
    params = randomised(params)
    pairs = trees.named_leaves(params)
    left, right = pairs[f"adapters/{path}/a"], pairs[f"adapters/{path}/b"]
    assert (left.shape, right.shape) == (a, b)
    rank = a[-1]
    matrices = as_matrices(left, right)
    expected = pairs[path] + 6.0 / rank * np.matmul(*matrices).reshape(pairs[path].shape)
    merged = trees.named_leaves(merge(params, 6.0))[path]
    np.testing.assert_allclose(merged, expected, atol=2e-6)


def test_gradients_of_adapters_are_projections_of_that_of_the_kernel():
    adapted, plain = objective(), objective({})
    params = randomised(adapted.init(jax.random.key(0), batch())[0])

    def loss(o):
        return lambda p: o.loss(p, {}, batch(), jax.random.key(0), train=False)[0].total

    found = trees.named_leaves(jax.grad(loss(adapted))(params))
    dense = trees.named_leaves(jax.grad(loss(plain))(merge(params, 6.0)))
    values = trees.named_leaves(params)
    for path in (p.removesuffix("/a") for p in found if p.endswith("/a")):
        base = path.removeprefix("adapters/")
        a, b = as_matrices(values[f"{path}/a"], values[f"{path}/b"])
        slope = np.asarray(dense[base], np.float64).reshape(len(a), a.shape[1], b.shape[2])
        scale = 6.0 / a.shape[-1]
        for side, expected in (
            ("a", scale * slope @ b.swapaxes(1, 2)),
            ("b", scale * a.swapaxes(1, 2) @ slope),
        ):
            got = np.asarray(found[f"{path}/{side}"]).reshape(expected.shape)
            largest = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(got, expected, atol=2e-5 * largest, err_msg=path)


def training(optimizer, mesh=None, ema=0.0):
    adapted = objective()
    optimizer = build_optimizer({**optimizer, "freeze": frozen_patterns(SPEC)}, steps=10)
    init = make_init(adapted, optimizer, ema=ema > 0)
    state = jax.jit(lambda key: init(key, batch()))(jax.random.key(1))
    step = jax.jit(make_train_step(adapted, optimizer, seed=0, ema_decay=ema))
    if mesh is not None:
        state = jax.device_put(state, state_shardings(state, mesh))
    return state, step, optimizer


def test_adapters_and_the_listed_head_alone_are_trained_and_have_slots():
    state, step, optimizer = training({"name": "adamw", "lr": 0.1}, ema=0.5)
    new = state
    for _ in range(3):  # the head starts at zero and moves first, then B, then A
        new, _ = step(new, batch())
    before, after = trees.named_leaves(state.params), trees.named_leaves(new.params)
    moved = {path for path in after if np.any(after[path] != before[path])}
    expected = {p for p in after if p.startswith(("adapters/", "head/"))}
    assert moved == expected
    slots = trees.named_leaves(new.opt_state)
    assert {p.split("mu/", 1)[1] for p in slots if "/mu/" in p} == expected
    assert set(trees.named_leaves(new.ema)) == expected
    averaged = evaluation_params(new, optimizer)
    assert trees.differences(averaged, new.params)
    logits = [
        o.predictions["logits"](p, {}, batch())
        for o, p in ((objective(), averaged), (objective({}), merge(averaged, 6.0)))
    ]
    np.testing.assert_array_equal(*logits)


def test_adapters_are_split_like_what_they_adapt_and_train_alike_on_a_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    sgd = {"name": "sgd", "lr": 0.5}
    (here, step, _), (there, _, _) = training(sgd), training(sgd, mesh)
    specs = {p: x.sharding.spec for p, x in trees.named_leaves(there.params).items()}
    blocks = "adapters/encoder/blocks"
    assert specs[f"{blocks}/attention/q/kernel/b"][2] == "tensor"
    assert specs[f"{blocks}/attention/o/kernel/a"][1] == "tensor"
    assert specs[f"{blocks}/mlp/fc1/kernel/b"][2] == "tensor"
    assert not any(specs[f"{blocks}/attention/q/kernel/a"])
    for _ in range(3):
        here, _ = step(here, batch())
        there, _ = step(there, batch())
    for path, x in trees.named_leaves(here.params).items():
        other = trees.named_leaves(there.params)[path]
        # sums over devices are rounded in another order, three steps at rate 0.5
        np.testing.assert_allclose(other, x, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**SPEC, "rules": [[".*/quarry/kernel", 2]]}, "lora.rules must match a parameter path"),
        ({**SPEC, "rules": [[".*/q/.*", 2]]}, "must match kernels or embeddings, got .*q/bias"),
        ({**SPEC, "rules": [["head/kernel", 6]]}, r"head/kernel must lie in 1 ... 5, got 6"),
        ({**SPEC, "rules": [["head/kernel", 0]]}, r"must lie in 1 ... 5, got 0"),
        ({**SPEC, "train": ["heads/.*"]}, "lora.train must match a parameter path"),
        ({**SPEC, "rank": 4}, r"unknown key \['rank'\].*alpha"),
        ({"rules": SPEC["rules"]}, "lora needs rules and alpha"),
        ({"rules": [], "alpha": 1.0}, "lora needs rules and alpha"),
    ],
)
def test_wrong_settings_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(objective(spec).init, jax.random.key(0), batch())


def test_without_lora_the_objective_is_what_it_was():
    plain = objective({})
    assert with_lora(plain, {}) is plain
    params = {"q": {"kernel": jnp.ones((4, 2, 2))}}
    assert merge(params, 1.0) == params
    adapters = init_adapters(jax.random.key(0), params, [["q/kernel", 2]])
    assert adapters["q"]["kernel"]["a"].shape == (4, 2)


def test_the_random_side_keeps_the_scale_of_its_input():
    shapes = {
        "encoder/blocks/attention/q/kernel": (3, 64, 2, 8),
        "encoder/blocks/attention/o/kernel": (3, 8, 8, 20),
        "patches/kernel": (4, 4, 4, 30),
    }
    params = trees.unflatten({path: jnp.zeros(shape) for path, shape in shapes.items()})
    adapters = trees.named_leaves(init_adapters(jax.random.key(0), params, [[".*", 16]]))
    for path in shapes:  # all have 64 inputs
        np.testing.assert_allclose(np.std(adapters[f"{path}/a"]), 64**-0.5, rtol=0.06)


def test_the_first_rule_that_matches_gives_the_rank():
    params = trees.unflatten({f"a/{name}/kernel": jnp.zeros((8, 8)) for name in "mn"})
    rules = [["a/m/kernel", 2], ["a/.*", 5]]
    adapters = init_adapters(jax.random.key(0), params, rules)["a"]
    assert [adapters[name]["kernel"]["a"].shape[-1] for name in "mn"] == [2, 5]


def test_what_follows_the_parameters_follows_the_merged_ones():
    @dataclasses.dataclass(frozen=True)
    class Follows:
        """An objective with a teacher that is a copy of its parameters."""

        model: object = None

        def after_update(self, params, extras, stats, step):
            return params

    params, _ = objective().init(jax.random.key(3), batch())
    params = randomised(params)
    teacher = with_lora(Follows(), SPEC).after_update(params, {}, {}, jnp.int32(1))
    assert not trees.differences(teacher, merge(params, 6.0))
    assert trees.differences(teacher, split_adapters(params)[0])
