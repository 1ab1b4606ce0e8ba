# SPDX-License-Identifier: Apache-2.0
"""The momentum queue: its loss against an oracle, what it holds after some steps, resume, mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm import trees
from flax_vlm.objectives.contrastive import Contrastive
from flax_vlm.objectives.momentum_contrast import MomentumContrast, enqueue
from flax_vlm.training import sharding
from flax_vlm.training.checkpoints import Checkpoints, load_params
from flax_vlm.training.optimizers import build_optimizer
from flax_vlm.training.state import abstract_state, make_init, state_shardings
from flax_vlm.training.step import make_train_step
from tests.losses import oracle
from tests.objectives.towers import make_batch, randomised, toy_model

B, K, E = 16, 21, 5  # K is not a multiple of B
RNG = jax.random.key(0)
STILL = {"dropout": 0.0, "patch_dropout": 0.0}
LOSS = {
    "sigmoid": {"name": "sigmoid"},
    "softmax": {"name": "softmax"},
    "positive": {"name": "softmax", "same_text": "positive"},
    "sharded sigmoid": {"name": "sigmoid", "form": "sharded", "tile": 5},
    "sharded softmax": {"name": "softmax", "form": "sharded", "tile": 5},
}


def make(loss="sigmoid", size=K, momentum=0.7, micro_batches=1, **model):
    queue = {"queue_size": size, "momentum": momentum}
    return MomentumContrast(toy_model(**model), LOSS[loss], micro_batches=micro_batches, **queue)


def start(objective, batch, filled=K - 4):
    """Random parameters, key encoders that differ from them, a queue that holds `filled` keys."""
    params, extras = randomised(objective, batch)
    rng = np.random.default_rng(3)
    keys = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32),
        {k: params[k] for k in extras["key_encoders"]},
    )
    size = objective.queue_size
    queue = {
        **{k: np.float32(oracle.unit(rng.normal(size=(size, E)))) for k in ("image", "text")},
        "text_id": np.int32(2000 + rng.permutation(size)),
        "filled": np.arange(size) >= size - filled,
    }
    queue["text_id"][-2] = batch["text_id"][1]  # an entry that says what text 1 says
    return params, {"key_encoders": keys, "queue": jax.tree.map(jnp.asarray, queue)}


PROGRAMS = {}


def loss_of(objective, params, extras, batch):
    """((total, Aux), gradients by parameters, by key encoders)."""

    def total(params, keys, queue, batch):
        joined = {"key_encoders": keys, "queue": queue}
        value, aux = objective.loss(params, joined, batch, RNG, train=True)
        return value.total, aux

    # an objective holds dicts: its text stands for it
    new = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    run = PROGRAMS.setdefault(repr(objective), new)
    found, grads = run(params, extras["key_encoders"], extras["queue"], batch)
    return found, *grads


@functools.partial(jax.jit, static_argnums=0)
def embed(model, params, batch):
    """Image and text embeddings by the model itself."""
    image = jnp.float32(batch["image"]) / 127.5 - 1.0
    out = model.apply({"params": params}, image, batch["text"], batch["text_mask"])
    return out.image_embedding, out.text_embedding


@pytest.mark.parametrize("loss", LOSS)
def test_loss_and_gradients_equal_the_oracle(loss):
    objective, batch = make(loss, **STILL), make_batch(B)
    params, extras = start(objective, batch)
    (total, _), grads, _ = loss_of(objective, params, extras, batch)
    queue = jax.tree.map(np.asarray, extras["queue"])
    key_image, key_text = embed(objective.model, params | extras["key_encoders"], batch)
    scale, bias = np.exp(float(params["logit_scale"])), float(params["logit_bias"])
    queries, back = jax.vjp(lambda p: embed(objective.model, p, batch), params)
    expected, slopes, scalars = 0.0, [], np.zeros(2)
    for query, key, other in zip(queries, (key_text, key_image), ("text", "image"), strict=True):
        case = oracle.Case(
            np.float64(query), np.float64(np.concatenate([key, queue[other]])), scale, bias,
            np.concatenate([batch["text_id"], queue["text_id"]]),
            batch["example_mask"], queue["filled"],
        )  # fmt: skip
        roles = oracle.roles(case, LOSS[loss].get("same_text", "ignore"))
        half = np.full(B, 0.5)
        if LOSS[loss]["name"] == "sigmoid":
            values, gradient = oracle.sigmoid_oracle(case, half, *roles)
            values = values * batch["example_mask"]
        else:
            values, gradient = oracle.softmax_oracle(case, half, *roles, symmetric=False)
            gradient["bias"] = 0.0
        expected += values.sum() / 2
        slopes.append(jnp.float32(gradient["image"]))
        scalars += gradient["scale"] * scale, gradient["bias"]
    (expected_grads,) = back(tuple(slopes))
    expected_grads["logit_scale"], expected_grads["logit_bias"] = np.float32(scalars)
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    for path, leaf in trees.named_leaves(expected_grads).items():
        found = trees.named_leaves(grads)[path]
        np.testing.assert_allclose(
            found, leaf, rtol=0, atol=2e-5 * max(1.0, abs(leaf).max()), err_msg=path
        )


def test_keys_get_no_gradient_and_no_dropout_with_and_without_gradient_cache():
    objective, batch = make(), make_batch(B)
    cached = dataclasses.replace(objective, micro_batches=4)
    params, extras = start(objective, batch)
    (_, aux), _, _ = loss_of(objective, params, extras, batch)
    (_, cached_aux), grads, by_keys = loss_of(cached, params, extras, batch)
    assert not any(np.any(x) for x in jax.tree.leaves(by_keys))
    assert all(np.any(x) for x in jax.tree.leaves(grads["image"]))
    keys = embed(objective.model, params | extras["key_encoders"], batch)
    for name, expected in zip(("image", "text"), keys, strict=True):
        np.testing.assert_allclose(aux.stats["queue"][name], expected, atol=1e-6)
        np.testing.assert_allclose(cached_aux.stats["queue"][name], expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_rows_that_are_not_filled_change_nothing(loss):
    batch = make_batch(B)
    empty, without = make(loss, **STILL), make(loss, size=1, momentum=0.0, **STILL)
    params, extras = start(empty, batch, filled=0)
    bare = extras | {"queue": jax.tree.map(lambda x: x[:1], extras["queue"])}
    found, expected = (loss_of(o, params, e, batch) for o, e in ((empty, extras), (without, bare)))
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-6)
    for path, leaf in trees.named_leaves(expected[1]).items():
        np.testing.assert_allclose(
            trees.named_leaves(found[1])[path], leaf, atol=1e-6 * max(1.0, abs(leaf).max())
        )
    assert found[0][1].metrics["queue_filled"].total == 0


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_with_an_empty_queue_and_no_momentum_the_value_is_that_of_the_plain_loss(loss):
    batch = make_batch(B)
    objective = make(loss, size=1, momentum=0.0, **STILL)
    plain = Contrastive(objective.model, LOSS[loss])
    params, extras = randomised(objective, batch)
    extras = extras | {"key_encoders": {k: params[k] for k in ("image", "text")}}
    (total, _), grads, _ = loss_of(objective, params, extras, batch)

    def plain_total(params):
        return plain.loss(params, {}, batch, RNG, train=True)[0].total

    expected, plain_grads = jax.jit(jax.value_and_grad(plain_total))(params)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for name in ("logit_scale", "logit_bias"):
        np.testing.assert_allclose(grads[name], plain_grads[name], rtol=1e-5, atol=1e-5)
    if loss == "sigmoid":
        # every pair is counted twice by half, each time with one side that is not trained
        for path, leaf in trees.named_leaves(plain_grads["image"]).items():
            found = trees.named_leaves(grads["image"])[path]
            np.testing.assert_allclose(found, leaf / 2, atol=2e-5 * max(1.0, abs(leaf).max()))
    after = objective.after_update(params, extras, {"queue": extras["queue"]}, 0)
    assert not trees.differences(after["key_encoders"], extras["key_encoders"])


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_a_queue_entry_with_the_same_caption_is_no_negative(loss):
    batch = make_batch(B)
    objective = make(loss, **STILL)
    params, extras = start(objective, batch, filled=5)
    image, text = embed(objective.model, params, batch)

    def total(objective, text_id, filled):
        """With an entry that looks just like example 1."""
        queue = dict(extras["queue"])
        queue["image"] = queue["image"].at[2].set(image[1])
        queue["text"] = queue["text"].at[2].set(text[1])
        queue["text_id"] = queue["text_id"].at[2].set(text_id)
        queue["filled"] = queue["filled"].at[2].set(filled)
        return float(loss_of(objective, params, extras | {"queue": queue}, batch)[0][0])

    own, foreign = batch["text_id"][1], 999_999
    negative = dataclasses.replace(objective, pair_loss=LOSS[loss] | {"same_text": "negative"})
    assert total(negative, own, True) == total(negative, foreign, True)
    # the entry still is a negative of the other examples
    ignored = total(objective, own, True)
    assert total(objective, own, False) < ignored < total(objective, foreign, True) - 0.1


@functools.cache
def trainer(loss, micro_batches, axes=None):
    """(fresh state, step, what a checkpoint is restored into); axes None: on one device."""
    objective = make(loss, micro_batches=micro_batches)
    optimizer = build_optimizer({"name": "sgd", "lr": 0.5, "momentum": 0.9}, steps=10)
    init = make_init(objective, optimizer, ema=False)
    mesh = sharding.make_mesh(*axes or (1, 1, 1), devices=jax.devices()[: 8 if axes else 1])
    shapes = jax.eval_shape(init, RNG, make_batch(B))
    shardings = state_shardings(shapes, mesh)
    rows = sharding.batch_sharding(mesh)
    state = jax.jit(init, out_shardings=shardings)(RNG, make_batch(B))
    step = make_train_step(objective, optimizer, seed=0)
    step = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, None))

    def run(state, batch):
        with jax.set_mesh(mesh):
            return step(state, sharding.put_batch(batch, rows))

    return state, run, abstract_state(shapes, shardings)


def test_the_queue_holds_the_last_keys_in_order_and_no_padding():
    objective = make()
    state, step, _ = trainer("sigmoid", 1)
    images, texts, ids = [], [], []
    for seed in range(4):
        batch = make_batch(B, seed)
        batch["example_mask"][:seed] = False  # another number of examples each time
        variables = state.params | state.extras["key_encoders"]
        image, text = jax.device_get(embed(objective.model, variables, batch))
        keep = batch["example_mask"]
        state, metrics = step(state, batch)
        assert metrics["queue_filled"].total == min(K, len(np.concatenate([*ids, []])))
        for seen, new in ((images, image), (texts, text), (ids, batch["text_id"])):
            seen.append(new[keep])
        queue = jax.device_get(state.extras["queue"])
        expected = np.concatenate(ids)[-K:]
        count = len(expected)
        assert count == (15, K, K, K)[seed] and queue["filled"].sum() == count
        np.testing.assert_array_equal(queue["text_id"][K - count :], expected)
        for name, seen in (("image", images), ("text", texts)):
            np.testing.assert_allclose(
                queue[name][K - count :], np.concatenate(seen)[-K:], atol=1e-6
            )
            assert not queue[name][: K - count].any()


def test_a_batch_longer_than_the_queue_leaves_its_last_keys():
    queue = {"key": jnp.zeros((2, 1)), "filled": jnp.zeros(2, bool)}
    mask = jnp.array([True, True, True, False, True])
    new = {"key": jnp.arange(1.0, 6.0)[:, None], "filled": mask}
    assert enqueue(queue, new)["key"][:, 0].tolist() == [3, 5]
    assert enqueue(enqueue(queue, new), jax.tree.map(lambda x: x[:1], new))["key"].tolist() == [
        [5], [1],
    ]  # fmt: skip


def test_key_encoders_are_the_moving_average_of_the_encoders():
    state, step, _ = trainer("sigmoid", 1)
    keys = trees.named_leaves(jax.device_get(state.extras["key_encoders"]))
    assert not trees.differences(
        keys, trees.named_leaves({k: state.params[k] for k in ("image", "text")})
    )
    expected = {path: np.float64(x) for path, x in keys.items()}
    for seed in range(4):
        state, _ = step(state, make_batch(B, seed))
        params = trees.named_leaves(jax.device_get(state.params))
        expected = {path: 0.7 * x + 0.3 * params[path] for path, x in expected.items()}
    found = trees.named_leaves(jax.device_get(state.extras["key_encoders"]))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, rtol=0, atol=1e-6, err_msg=path)
        assert abs(x - np.float64(params[path])).max() > 1e-4, "the encoders have moved on"


def test_a_step_that_is_not_finite_leaves_queue_and_key_encoders_alone():
    state, step, _ = trainer("sigmoid", 1)
    state, _ = step(state, make_batch(B))
    bad = make_batch(B, 1)
    bad["image"] = np.full(bad["image"].shape, np.nan, np.float32)
    after, metrics = step(state, bad)
    assert any(jax.device_get(metrics["nonfinite"]).values()) and after.step == state.step + 1
    assert not trees.differences(after.extras, state.extras)
    good, _ = step(after, make_batch(B, 1))
    np.testing.assert_array_equal(
        good.extras["queue"]["text_id"],
        np.concatenate([make_batch(B, s)["text_id"][np.arange(B) != B - 2] for s in (0, 1)])[-K:],
    )


def test_a_run_that_is_saved_and_restored_goes_on_bit_for_bit(tmp_path):
    state, step, target = trainer("sigmoid", 1)
    for seed in range(5):
        state, _ = step(state, make_batch(B, seed))
        if seed == 2:
            checkpoints = Checkpoints(tmp_path, every=1)
            checkpoints.save(3, state)
            checkpoints.wait()
            other = checkpoints.restore(target)
            checkpoints.close()
    for seed in (3, 4):
        other, _ = step(other, make_batch(B, seed))
    assert not trees.differences(jax.device_get(vars(other)), jax.device_get(vars(state)))


@pytest.mark.parametrize(("loss", "micro_batches"), [("sigmoid", 1), ("sharded softmax", 2)])
def test_eight_devices_equal_one(loss, micro_batches, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 8)  # so that tiny tensors are split too
    one, step, _ = trainer(loss, micro_batches)
    eight, sharded_step, _ = trainer(loss, micro_batches, axes=(2, 4, 1))
    placed = {p: x.sharding.spec for p, x in trees.named_leaves(eight.extras).items()}
    assert "fsdp" in placed["key_encoders/image/patches/kernel"]
    for seed in range(3):
        one, metrics = step(one, make_batch(B, seed))
        eight, sharded_metrics = sharded_step(eight, make_batch(B, seed))
        np.testing.assert_allclose(sharded_metrics["loss"].total, metrics["loss"].total, rtol=2e-5)
    for path, leaf in trees.named_leaves(jax.device_get(vars(one))).items():
        found = np.asarray(trees.named_leaves(vars(eight))[path])
        if leaf.dtype == np.float32:
            allowed = 2e-5 * max(1.0, abs(leaf).max())
            np.testing.assert_allclose(found, leaf, rtol=0, atol=allowed, err_msg=path)
        else:
            np.testing.assert_array_equal(found, leaf)


def test_a_checkpoint_is_evaluated_on_many_devices(monkeypatch, tmp_path):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 8)
    objective, batch = make(), make_batch(B)
    state, _, _ = trainer("sigmoid", 1)
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(1, state)
    checkpoints.close()
    mesh = sharding.make_mesh(2, 4, 1)
    params, extras, _ = load_params(tmp_path, sharding.parameter_shardings(state.params, mesh))
    wanted = sharding.follow_parameters(extras, params, mesh)
    assert all(
        x.sharding == s
        for x, s in zip(jax.tree.leaves(extras), jax.tree.leaves(wanted), strict=True)
    )
    rows = sharding.put_batch(batch, sharding.batch_sharding(mesh))
    found = jax.jit(objective.predictions["image_embedding"])(params, extras, rows)
    expected = objective.predictions["image_embedding"](state.params, {}, batch)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_wrong_settings_and_batches_without_text_id_are_refused():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        make(momentum=1.0)
    with pytest.raises(ValueError, match="queue_size must be at least 1, got 0"):
        make(size=0)
    objective, batch = make(), make_batch(B)
    params, extras = start(objective, batch)
    del batch["text_id"]
    with pytest.raises(ValueError, match="momentum_contrast needs text_id in the batch"):
        objective.loss(params, extras, batch, RNG, train=True)
