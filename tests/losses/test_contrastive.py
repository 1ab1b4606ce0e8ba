# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.losses.contrastive import (
    HnNce,
    Teacher,
    distillation_contrastive_loss,
    sigmoid_contrastive_loss,
    softmax_contrastive_loss,
)
from flax_vlm.losses.pairs import PairRules, Pairs
from tests.losses import oracle
from tests.losses.comparison import distance, make_pairs, value_and_gradients

RULES = [{}, {"same_text": "positive"}, {"same_text": "negative"}, {"ceiling": 0.4}]


def uneven_cotangent(case):
    return np.linspace(0.5, 2.0, len(case.image))


def run(loss, case, cotangent=None, dtype=jnp.float32, pairs=None, **options):
    pairs = pairs or make_pairs(case)
    return value_and_gradients(
        lambda i, t, s, b: loss(i, t, s, b, pairs=pairs, **options),
        case,
        uneven_cotangent(case) if cotangent is None else cotangent,
        dtype,
    )


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_sigmoid_loss_and_its_gradients_equal_the_oracle(rules):
    case = oracle.batch()
    expected = oracle.sigmoid_oracle(case, uneven_cotangent(case), *oracle.roles(case, **rules))
    found = run(sigmoid_contrastive_loss, case, rules=PairRules(**rules))
    assert distance(found, expected) < 1e-6
    with jax.enable_x64(True):
        found = run(sigmoid_contrastive_loss, case, dtype=jnp.float64, rules=PairRules(**rules))
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_softmax_loss_and_its_gradients_equal_the_oracle(rules):
    case = oracle.batch()
    expected = oracle.softmax_oracle(case, uneven_cotangent(case), *oracle.roles(case, **rules))
    expected[1]["bias"] = 0.0
    found = run(softmax_contrastive_loss, case, rules=PairRules(**rules))
    assert distance(found, expected) < 1e-6
    with jax.enable_x64(True):
        found = run(softmax_contrastive_loss, case, dtype=jnp.float64, rules=PairRules(**rules))
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("through", [True, False])
def test_hn_nce_equals_its_definition_with_explicit_weights(through):
    case = oracle.batch()
    weighting = HnNce(alpha=0.7, beta=0.5, differentiate_weights=through)
    expected = oracle.softmax_oracle(
        case, uneven_cotangent(case), *oracle.roles(case), alpha=0.7, beta=0.5, through=through
    )
    expected[1]["bias"] = 0.0
    with jax.enable_x64(True):
        found = run(softmax_contrastive_loss, case, dtype=jnp.float64, weighting=weighting)
    assert distance(found, expected) < 1e-12
    assert distance(run(softmax_contrastive_loss, case, weighting=weighting), expected) < 2e-6


def test_without_its_columns_the_softmax_loss_is_infonce_of_every_image():
    case = oracle.batch(m=38)
    rules = {"same_text": "positive"}
    expected = oracle.softmax_oracle(
        case,
        uneven_cotangent(case),
        *oracle.roles(case, **rules),
        alpha=0.7,
        beta=0.5,
        symmetric=False,
    )
    expected[1]["bias"] = 0.0
    options = {"rules": PairRules(**rules), "weighting": HnNce(0.7, 0.5), "symmetric": False}
    with jax.enable_x64(True):
        found = run(softmax_contrastive_loss, case, dtype=jnp.float64, **options)
    assert distance(found, expected) < 1e-12


def test_distillation_equals_the_oracle_and_sends_no_gradient_to_the_teacher():
    case, taught = oracle.batch(), oracle.batch(e=9, scale=5.0, seed=3)

    def loss(image, text, scale, bias, teacher_image=taught.image):
        teacher = Teacher(*(jnp.asarray(x, image.dtype) for x in (teacher_image, taught.text, 5.0)))
        return distillation_contrastive_loss(
            image, text, scale, bias, teacher=teacher, pairs=make_pairs(case)
        )

    expected = oracle.distillation_oracle(case, taught, uneven_cotangent(case))
    expected[1]["bias"] = 0.0
    assert distance(value_and_gradients(loss, case, uneven_cotangent(case)), expected) < 1e-6
    with jax.enable_x64(True):
        found = value_and_gradients(loss, case, uneven_cotangent(case), jnp.float64)
    assert distance(found, expected) < 1e-12
    student = [jnp.float32(x) for x in (case.image, case.text, case.scale, case.bias)]
    to_teacher = jax.grad(lambda t: loss(*student, t).sum())(jnp.float32(taught.image))
    assert not np.any(to_teacher)


@pytest.mark.parametrize("loss", [sigmoid_contrastive_loss, softmax_contrastive_loss])
def test_padding_rows_and_padding_texts_change_nothing(loss):
    case = oracle.batch(b=8, m=8, masks=False)
    plain = run(loss, case, np.ones(8))
    rng = np.random.default_rng(5)
    junk = [oracle.unit(rng.normal(size=(n, 6))) for n in (3, 3, 2)]
    padded = dataclasses.replace(
        case,
        image=np.concatenate([case.image, junk[0]]),
        text=np.concatenate([case.text, junk[1], junk[2]]),
        example_mask=np.arange(11) < 8,
        extra_mask=np.zeros(2, bool),
    )
    found, gradients = run(loss, padded, np.ones(11))
    np.testing.assert_allclose(found[:8], plain[0], rtol=2e-6)
    assert not found[8:].any()
    for name in ("image", "text"):
        np.testing.assert_allclose(gradients[name][:8], plain[1][name], rtol=1e-6, atol=2e-6)
        assert not gradients[name][8:].any()
    np.testing.assert_allclose(gradients["scale"], plain[1]["scale"], rtol=1e-5)


@pytest.mark.parametrize("loss", [sigmoid_contrastive_loss, softmax_contrastive_loss])
def test_the_positive_index_says_which_text_matches(loss):
    case = oracle.batch(b=8, m=13)
    order = np.random.default_rng(2).permutation(13)
    place = np.argsort(order)
    place[8:] = np.sort(place[8:])  # extra texts keep their order, so that extra_mask stays theirs
    shuffled_text, shuffled_id = np.empty_like(case.text), np.empty_like(case.text_id)
    shuffled_text[place], shuffled_id[place] = case.text, case.text_id
    shuffled = dataclasses.replace(case, text=shuffled_text, text_id=shuffled_id)
    pairs = make_pairs(shuffled, positive=jnp.asarray(place[:8], jnp.int32))
    plain, found = run(loss, case), run(loss, shuffled, pairs=pairs)
    found[1]["text"] = found[1]["text"][place]
    assert distance(found, plain) < 1e-6
    wrong = run(loss, shuffled)
    assert distance((wrong[0], found[1]), plain) > 1e-2


@pytest.mark.parametrize("loss", [sigmoid_contrastive_loss, softmax_contrastive_loss])
def test_equal_captions_are_not_pushed_apart(loss):
    case = oracle.batch(b=4, m=4, masks=False)
    pairs = Pairs(text_id=jnp.asarray([7, 7, 1, 2], jnp.int32))

    def text_gradient(rules):
        def first(text):
            return loss(
                jnp.float32(case.image), text, 9.0, -3.0, pairs=pairs, rules=PairRules(rules)
            )[0]

        return jax.grad(first)(jnp.float32(case.text))[1]

    # image 0 does not see text 1 by default; as a negative it pushes, as a positive it pulls
    towards_image = {
        k: text_gradient(k) @ jnp.float32(case.image[0]) for k in ("negative", "positive")
    }
    assert towards_image["negative"] > 1e-3 > 0 > -1e-3 > towards_image["positive"]
    if loss is sigmoid_contrastive_loss:
        assert not np.any(text_gradient("ignore"))


@pytest.mark.parametrize("loss", [sigmoid_contrastive_loss, softmax_contrastive_loss])
@pytest.mark.parametrize("rules", [PairRules(), PairRules("positive"), PairRules(ceiling=-0.99)])
def test_rows_without_any_negative_stay_finite(loss, rules):
    case = oracle.batch(b=4, m=6)
    pairs = Pairs(
        text_id=jnp.zeros(6, jnp.int32),
        example_mask=jnp.asarray([True, False, False, True]),
        extra_mask=jnp.asarray([False, True]),
    )
    each, gradients = run(loss, case, pairs=pairs, rules=rules)
    nothing, none = run(
        loss, case, pairs=dataclasses.replace(pairs, example_mask=jnp.zeros(4, bool)), rules=rules
    )
    assert all(np.isfinite(x).all() for x in (each, *gradients.values()))
    assert not any(np.any(x) for x in (nothing, *none.values()))


def test_the_softmax_loss_is_accurate_at_scale_100_and_a_tiny_loss():
    case, ones = oracle.easy_batch(seed=3), np.ones(256)
    true, slope = oracle.softmax_oracle(case, ones, *oracle.roles(case))
    assert 5e-4 < true.mean() < 2e-3
    found, gradients = run(softmax_contrastive_loss, case, ones)
    assert abs(found.mean() / true.mean() - 1) < 1e-6
    assert abs(gradients["scale"] / slope["scale"] - 1) < 2e-6
    x = jnp.float32(100) * (jnp.float32(case.image) @ jnp.float32(case.text).T)
    usual = (jax.nn.logsumexp(x, 1) + jax.nn.logsumexp(x, 0)) / 2 - jnp.diagonal(x)
    # what the softplus form is for; row by row, since in the mean errors of rounding may cancel
    assert np.abs(found / true - 1).max() < 1e-4 < 1e-3 < np.abs(np.asarray(usual) / true - 1).max()


@pytest.mark.parametrize("loss", [sigmoid_contrastive_loss, softmax_contrastive_loss])
def test_identical_pairs_at_scale_100_stay_finite(loss):
    one = np.tile(oracle.unit(np.ones((1, 5))), (6, 1))
    each, gradients = run(loss, oracle.Case(one, one, 100.0, -10.0))
    assert all(np.isfinite(x).all() for x in (each, *gradients.values()))
    expected = 5 * 90.0 if loss is sigmoid_contrastive_loss else np.log(6)
    np.testing.assert_allclose(each, expected, rtol=1e-6)


def test_the_published_initialisation_has_the_published_loss():
    image, text = np.eye(1, 4, 0), np.eye(1, 4, 1)  # cosine 0
    each, _ = run(
        sigmoid_contrastive_loss,
        oracle.Case(image.repeat(256, 0), text.repeat(256, 0), 10.0, -10.0),
    )
    np.testing.assert_allclose(each, 10.012, atol=1e-3)


def test_shapes_and_settings_that_do_not_fit_are_refused():
    image, text = jnp.zeros((4, 3)), jnp.zeros((3, 3))
    with pytest.raises(ValueError, match="a text of its own, got 4 images and 3 texts"):
        sigmoid_contrastive_loss(image, text, 1.0, 0.0)
    with pytest.raises(ValueError, match="shapes must be 'B E; M E'"):
        softmax_contrastive_loss(image, jnp.zeros((4, 2)), 1.0)
    with pytest.raises(ValueError, match=r"pairs.text_id must be \[4\]"):
        softmax_contrastive_loss(image, image, 1.0, pairs=Pairs(text_id=jnp.zeros(3, jnp.int32)))
    with pytest.raises(ValueError, match="same_text must be one of"):
        PairRules("drop")
    with pytest.raises(ValueError, match="ceiling must be a cosine"):
        PairRules(ceiling=2.0)
    with pytest.raises(ValueError, match="alpha > 0"):
        HnNce(alpha=0.0)
