# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.training.optimizers import build_optimizer
from flax_vlm.training.state import evaluation_params, make_init
from flax_vlm.training.step import make_train_step
from tests.training.toy import ToyRegression, toy_batch

SGD = {"name": "sgd", "lr": 0.1}


def make(objective=None, optimizer=SGD, ema=0.0, **kwargs):
    objective = objective or ToyRegression()
    optimizer = build_optimizer(optimizer, steps=10)
    state = make_init(objective, optimizer, ema=ema > 0)(jax.random.key(1), toy_batch(0))
    step = jax.jit(make_train_step(objective, optimizer, seed=3, ema_decay=ema, **kwargs))
    return state, step, optimizer


def test_the_step_is_gradient_descent_on_the_masked_mean():
    state, step, _ = make()
    batch = toy_batch(1)
    new, metrics = step(state, batch)

    def mean_loss(params):
        x = batch["image"].reshape(8, -1) / np.float32(255)
        value = (jnp.tanh(x @ params["encoder"]["fc1"]["kernel"]) @ params["head"]["kernel"])[:, 0]
        error = value + params["head"]["bias"][0] - batch["label"]
        return (error**2)[batch["example_mask"]].mean()

    grads = jax.grad(mean_loss)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    for path, leaf in trees.named_leaves(expected).items():
        np.testing.assert_allclose(trees.named_leaves(new.params)[path], leaf, atol=2e-6)
    np.testing.assert_allclose(metrics["loss"].value(), mean_loss(state.params), rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_give_the_update_of_the_whole_batch(micro_batches):
    state, step, _ = make()
    _, micro_step, _ = make(micro_batches=micro_batches)
    whole, whole_metrics = step(state, toy_batch(2))
    cut, cut_metrics = micro_step(state, toy_batch(2))
    for path, leaf in trees.named_leaves(whole.params).items():
        np.testing.assert_allclose(trees.named_leaves(cut.params)[path], leaf, atol=1e-6)
    assert cut_metrics["loss"].weight == whole_metrics["loss"].weight == 6
    assert cut.extras["seen"] == whole.extras["seen"] == 6, "stats are summed, extras change once"


def test_micro_batches_are_refused_where_the_loss_is_not_additive():
    with pytest.raises(ValueError, match="needs an additive objective"):
        make(ToyRegression(additive=False), micro_batches=2)


def test_micro_batches_must_divide_the_batch():
    state, step, _ = make(micro_batches=3)
    with pytest.raises(ValueError, match="must divide batch_size, got 3 and 8"):
        step(state, toy_batch(0))


def test_dropout_depends_on_the_step_and_the_seed_alone():
    state, step, _ = make(ToyRegression(dropout=0.5))
    first, again = step(state, toy_batch(1))[1], step(state, toy_batch(1))[1]
    later = step(
        jax.tree.map(lambda x: x, state).__class__(**{**vars(state), "step": state.step + 1}),
        toy_batch(1),
    )[1]
    assert first["loss"].total == again["loss"].total
    assert first["loss"].total != later["loss"].total


def test_frozen_parameters_do_not_move_and_have_no_optimizer_slots():
    spec = {"name": "adamw", "lr": 0.1, "weight_decay": 0.1, "freeze": ("encoder/.*",)}
    state, step, _ = make(optimizer=spec)
    new = state
    for i in range(3):
        new, _ = step(new, toy_batch(i))
    assert not trees.differences(new.params["encoder"], state.params["encoder"])
    assert trees.differences(new.params["head"], state.params["head"])
    assert not [path for path in trees.named_leaves(new.opt_state) if "encoder" in path]


def test_a_nonfinite_step_leaves_everything_but_the_counter_bit_identical():
    state, step, _ = make(optimizer={"name": "adamw", "lr": 0.1}, ema=0.9)
    good, metrics = step(state, toy_batch(0))
    assert not any(metrics["nonfinite"].values())
    poisoned = {**toy_batch(1), "label": np.array([np.nan] * 8, np.float32)}
    bad, metrics = step(good, poisoned)
    assert bad.step == 2
    for part in ("params", "opt_state", "extras", "ema"):
        assert not trees.differences(getattr(bad, part), getattr(good, part)), part
    flags = metrics["nonfinite"]
    assert flags["loss"] and flags["encoder/fc1"] and flags["head/kernel"]


def test_the_moving_average_follows_the_parameters_slowly():
    state, step, optimizer = make(ema=0.99)
    new = state
    for i in range(4):
        new, _ = step(new, toy_batch(i))
    start, now = state.params["head"]["bias"], new.params["head"]["bias"]
    averaged = evaluation_params(new, optimizer)["head"]["bias"]
    assert abs(averaged - start) > 0 and abs(now - averaged) > 0
    assert min(start, now) < averaged < max(start, now)


def test_metrics_report_norms_and_the_learning_rate_of_the_step():
    state, step, _ = make()
    _, metrics = step(state, toy_batch(0))
    assert metrics["learning_rate"] == np.float32(0.1)
    np.testing.assert_allclose(metrics["update_norm"], 0.1 * metrics["grad_norm"], rtol=1e-5)
    assert metrics["param_norm"] > 0 and metrics["absolute"].weight == 6
