# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.losses.classification import sigmoid_classification_loss, softmax_classification_loss


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 7)) * 4, np.array([2, 0, 6, 3, 3], np.int32)


def targets(label, smoothing):
    return (1 - smoothing) * np.eye(7)[label] + smoothing / 7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_softmax_form_equals_the_oracle(examples, smoothing):
    logits, label = examples
    q, log_p = targets(label, smoothing), logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = softmax_classification_loss(jnp.float32(logits), label, label_smoothing=smoothing)
    np.testing.assert_allclose(found, -(q * log_p).sum(1), rtol=2e-5)
    gradient = jax.grad(
        lambda x: softmax_classification_loss(x, label, label_smoothing=smoothing).sum()
    )(jnp.float32(logits))
    np.testing.assert_allclose(gradient, np.exp(log_p) - q, atol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sigmoid_form_equals_the_oracle(examples, smoothing):
    logits, label = examples
    q = targets(label, smoothing)
    found = sigmoid_classification_loss(jnp.float32(logits), label, label_smoothing=smoothing)
    np.testing.assert_allclose(found, (np.logaddexp(0, logits) - q * logits).sum(1), rtol=2e-5)


@pytest.mark.parametrize("loss", [softmax_classification_loss, sigmoid_classification_loss])
def test_examples_without_a_label_cost_nothing(examples, loss):
    logits, label = examples
    label = label * 1
    label[2] = -1
    found = loss(jnp.float32(logits), label, label_smoothing=0.1)
    assert found.dtype == jnp.float32 and found[2] == 0 and (np.delete(found, 2) > 0).all()


@pytest.mark.parametrize("loss", [softmax_classification_loss, sigmoid_classification_loss])
def test_bfloat16_logits_are_summed_in_float32(examples, loss):
    logits, label = jnp.bfloat16(examples[0]), examples[1]
    found = loss(logits, label)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, loss(jnp.float32(logits), label))


def test_a_smoothing_of_one_is_refused(examples):
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.0"):
        softmax_classification_loss(*map(jnp.asarray, examples), label_smoothing=1.0)
