# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flax_vlm.build import build
from flax_vlm.losses import LOSSES
from flax_vlm.losses.contrastive import HnNce, Teacher, softmax_contrastive_loss
from flax_vlm.losses.contrastive_sharded import (
    distillation_contrastive_loss_sharded,
    sigmoid_contrastive_loss_sharded,
    softmax_contrastive_loss_sharded,
)
from flax_vlm.losses.pairs import PairRules, Pairs
from flax_vlm.losses.ring import Ring
from tests.losses import oracle
from tests.losses.comparison import distance, make_pairs, value_and_gradients

SIGMOID = functools.partial(sigmoid_contrastive_loss_sharded, any_cotangent=True)
SOFTMAX = softmax_contrastive_loss_sharded


def mesh(devices, tensor=1):
    shape = (max(devices // 2, 1), min(devices, 2), tensor)
    return jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[: devices * tensor],
    )


def run(loss, case, cotangent, dtype=jnp.float32, **options):
    pairs = make_pairs(case)
    return value_and_gradients(
        lambda *arguments: loss(*arguments, pairs=pairs, **options), case, cotangent, dtype
    )


def ramp(case):
    return np.linspace(0.5, 2.0, len(case.image))


# 24 images, 38 texts: most last tiles are uneven, the 14 extra texts are padded on 4 and 8 devices
SETUPS = [
    pytest.param(Ring(5, mesh=mesh(1)), {"same_text": "negative"}, id="1"),
    pytest.param(Ring(1024, mesh=mesh(2, 2)), {"same_text": "positive"}, id="2 x 2 tensor"),
    pytest.param(Ring(4, mesh=mesh(4), bidirectional=True), {"ceiling": 0.4}, id="4 both ways"),
    pytest.param(Ring(2, mesh=mesh(8)), {}, id="8"),
]


@pytest.mark.parametrize(("ring", "rules"), SETUPS)
@pytest.mark.parametrize("loss", [SIGMOID, SOFTMAX], ids=["sigmoid", "softmax"])
def test_loss_and_gradients_equal_the_dense_oracle(loss, ring, rules):
    case = oracle.batch(m=38)
    truth = oracle.sigmoid_oracle if loss is SIGMOID else oracle.softmax_oracle
    expected = truth(case, ramp(case), *oracle.roles(case, **rules))
    if loss is SOFTMAX:
        expected[1]["bias"] = 0.0
    options = {"ring": ring, "rules": PairRules(**rules)}
    assert distance(run(loss, case, ramp(case), **options), expected) < 1e-6
    with jax.enable_x64(True):
        assert distance(run(loss, case, ramp(case), jnp.float64, **options), expected) < 1e-12


def test_without_its_columns_the_softmax_loss_is_infonce_of_every_image():
    case = oracle.batch(m=38)
    rules = {"same_text": "positive"}
    expected = oracle.softmax_oracle(
        case, ramp(case), *oracle.roles(case, **rules), alpha=0.7, beta=0.5, symmetric=False
    )
    expected[1]["bias"] = 0.0
    options = {"rules": PairRules(**rules), "weighting": HnNce(0.7, 0.5), "symmetric": False}
    with jax.enable_x64(True):
        found = run(SOFTMAX, case, ramp(case), jnp.float64, ring=Ring(2, mesh=mesh(8)), **options)
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("through", [True, False])
def test_hn_nce_equals_its_definition_with_explicit_weights(through):
    case, rules = oracle.batch(m=38), {"same_text": "positive"}
    expected = oracle.softmax_oracle(
        case, ramp(case), *oracle.roles(case, **rules), alpha=0.7, beta=0.5, through=through
    )
    expected[1]["bias"] = 0.0
    with jax.enable_x64(True):
        found = run(
            SOFTMAX,
            case,
            ramp(case),
            jnp.float64,
            ring=Ring(4, mesh=mesh(4)),
            rules=PairRules(**rules),
            weighting=HnNce(0.7, 0.5, through),
        )
    assert distance(found, expected) < 1e-12


def test_distillation_equals_the_dense_oracle():
    case, taught = oracle.batch(m=38), oracle.batch(m=38, e=9, scale=5.0, seed=3)
    expected = oracle.distillation_oracle(case, taught, ramp(case))
    expected[1]["bias"] = 0.0
    for dtype, limit in ((jnp.float32, 1e-6), (jnp.float64, 1e-12)):
        with jax.enable_x64(dtype == jnp.float64):
            teacher = Teacher(*(jnp.asarray(x, dtype) for x in (taught.image, taught.text, 5.0)))
            found = run(
                distillation_contrastive_loss_sharded,
                case,
                ramp(case),
                dtype,
                teacher=teacher,
                ring=Ring(4, mesh=mesh(4)),
            )
        assert distance(found, expected) < limit


def test_sigmoid_gradients_of_the_forward_pass_equal_the_oracle_for_a_mean_over_kept_rows():
    case = oracle.batch(m=38)
    mean = case.example_mask / case.example_mask.sum()
    expected = oracle.sigmoid_oracle(case, mean, *oracle.roles(case))
    ring = Ring(2, mesh=mesh(8))
    found = run(sigmoid_contrastive_loss_sharded, case, mean, ring=ring)
    assert distance(found, expected) < 1e-6
    with jax.enable_x64(True):
        found = run(sigmoid_contrastive_loss_sharded, case, mean, jnp.float64, ring=ring)
    assert distance(found, expected) < 1e-12


def test_rows_weighted_after_the_fact_give_nan_rather_than_wrong_sigmoid_gradients():
    case = oracle.batch()
    each, gradients = run(sigmoid_contrastive_loss_sharded, case, ramp(case), ring=Ring(7))
    assert np.isfinite(each).all()
    assert all(np.isnan(gradients[name]).all() for name in ("image", "text", "scale", "bias"))


@pytest.mark.parametrize("loss", [sigmoid_contrastive_loss_sharded, SOFTMAX])
def test_a_batch_of_padding_alone_has_zero_loss_and_gradients(loss):
    case = dataclasses.replace(oracle.batch(b=8, m=16), example_mask=np.zeros(8, bool))
    each, gradients = run(loss, case, np.ones(8), ring=Ring(3, mesh=mesh(2)))
    assert not any(np.any(x) for x in (each, *gradients.values()))


@pytest.mark.parametrize("rules", [PairRules("positive"), PairRules(ceiling=-0.99)])
def test_rows_without_any_negative_stay_finite(rules):
    case = dataclasses.replace(oracle.batch(b=8, m=16), text_id=np.zeros(16, np.int32))
    each, gradients = run(SOFTMAX, case, np.ones(8), ring=Ring(3, mesh=mesh(2)), rules=rules)
    assert all(np.isfinite(x).all() for x in (each, *gradients.values()))


def test_the_softmax_loss_is_accurate_at_scale_100_and_a_tiny_loss():
    case, ones = oracle.easy_batch(seed=3), np.ones(256)
    true, slope = oracle.softmax_oracle(case, ones, *oracle.roles(case))
    assert 5e-4 < true.mean() < 2e-3
    found, gradients = run(SOFTMAX, case, ones, ring=Ring(48, mesh=mesh(4)))
    assert abs(found.mean() / true.mean() - 1) < 1e-6
    assert abs(gradients["scale"] / slope["scale"] - 1) < 2e-6
    for name in ("image", "text"):
        error = np.linalg.norm(gradients[name] - slope[name]) / np.linalg.norm(slope[name])
        assert error < 1e-5


@pytest.mark.parametrize("loss", [SIGMOID, SOFTMAX], ids=["sigmoid", "softmax"])
def test_identical_pairs_at_scale_100_stay_finite(loss):
    one = np.tile(oracle.unit(np.ones((1, 5))), (8, 1))
    each, gradients = run(
        loss, oracle.Case(one, one, 100.0, -10.0), np.ones(8), ring=Ring(3, mesh=mesh(2))
    )
    assert all(np.isfinite(x).all() for x in (each, *gradients.values()))
    np.testing.assert_allclose(each, 7 * 90.0 if loss is SIGMOID else np.log(8), rtol=1e-6)


@pytest.mark.parametrize(("batch", "expected"), [(256, 10.012), (32768, 11.488)])
def test_the_published_initialisation_has_the_published_loss(batch, expected):
    image, text = jnp.eye(1, 4).repeat(8, 0), jnp.eye(1, 4, 1).repeat(batch, 0)  # cosine 0
    loss = jax.jit(functools.partial(sigmoid_contrastive_loss_sharded, ring=Ring(mesh=mesh(8))))
    each = loss(image, text, 10.0, -10.0)
    np.testing.assert_allclose(each, expected, atol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_config_picks_the_form_and_nothing_else_changes(name):
    case = oracle.batch()
    common = {"name": name, "hard_negatives": 6, "random_share": 0.5, "ceiling": 0.9}
    arguments = [jnp.float32(x) for x in (case.image, case.text, case.scale, case.bias)]
    options = {"pairs": make_pairs(case), "rng": jax.random.key(1)}
    dense = jax.jit(build(LOSSES, common, "loss"))(*arguments, **options)
    sharded = build(LOSSES, {**common, "form": "sharded", "tile": 5}, "loss")
    with jax.set_mesh(mesh(4)):  # the mesh of the training step, not named in the call
        np.testing.assert_allclose(jax.jit(sharded)(*arguments, **options), dense, rtol=2e-6)


def test_unknown_settings_are_refused_when_the_loss_is_built():
    with pytest.raises(ValueError, match="form must be one of"):
        build(LOSSES, {"name": "softmax", "form": "ring"}, "loss")
    with pytest.raises(ValueError, match=r"unknown key \['beta'\] for loss 'sigmoid'"):
        build(LOSSES, {"name": "sigmoid", "beta": 0.5}, "loss")
    with pytest.raises(ValueError, match="tile must be at least 1"):
        build(LOSSES, {"name": "sigmoid", "tile": 0}, "loss")
    with pytest.raises(ValueError, match="random_share in 0..1"):
        build(LOSSES, {"name": "sigmoid", "random_share": 2.0}, "loss")


def test_a_batch_that_does_not_divide_over_the_ring_is_refused():
    image = jnp.zeros((6, 3))
    with pytest.raises(ValueError, match=r"over the 4 devices of \('data', 'fsdp'\), got 6 rows"):
        SOFTMAX(image, image, 1.0, ring=Ring(mesh=mesh(4)))


def test_bfloat16_embeddings_are_multiplied_as_such_and_summed_in_float32():
    case = oracle.batch(b=16, m=24, e=32)
    arguments = [jnp.bfloat16(case.image), jnp.bfloat16(case.text), jnp.float32(9), jnp.float32(-3)]

    def total(loss, image, text, scale, bias):
        return loss(image, text, scale, bias, pairs=make_pairs(case)).sum()

    ring = Ring(3, mesh=mesh(4))
    run_both = jax.jit(jax.value_and_grad(total, (1, 2, 3)), static_argnums=0)
    found = run_both(functools.partial(SOFTMAX, ring=ring), *arguments)
    true = run_both(softmax_contrastive_loss, *arguments)
    np.testing.assert_allclose(found[0], true[0], rtol=1e-5)
    for ours, dense in zip(found[1], true[1], strict=True):
        assert ours.dtype == dense.dtype
        error = np.linalg.norm(jnp.float32(ours) - jnp.float32(dense))
        assert error < 1e-2 * np.linalg.norm(jnp.float32(dense))


def test_the_positive_index_says_which_text_matches():
    case = oracle.batch(b=8, m=8, masks=False)
    order = np.random.default_rng(2).permutation(8)
    shuffled = dataclasses.replace(case, text=case.text[np.argsort(order)])
    ring = Ring(3, mesh=mesh(2))
    plain = run(SOFTMAX, case, np.ones(8), ring=ring)
    arguments = [jnp.float32(x) for x in (shuffled.image, shuffled.text, case.scale)]
    pairs = Pairs(positive=jnp.asarray(order, jnp.int32))
    found = jax.jit(functools.partial(SOFTMAX, pairs=pairs, ring=ring))(*arguments)
    np.testing.assert_allclose(found, plain[0], rtol=1e-6)
