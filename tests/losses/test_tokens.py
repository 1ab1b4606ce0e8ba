# SPDX-License-Identifier: Apache-2.0
"""The loss of the next token against a NumPy float64 oracle."""

import jax.numpy as jnp
import numpy as np

from flax_vlm.losses.tokens import next_token_targets, token_loss


def test_the_loss_is_the_negative_log_probability_of_the_target():
    rng = np.random.default_rng(0)
    logits, target = 30 * rng.normal(size=(2, 5, 11)), rng.integers(11, size=(2, 5))
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    expected = log_sum - np.take_along_axis(logits, target[..., None], -1)[..., 0]
    found = token_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(target))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 1, 4096), jnp.bfloat16)
    np.testing.assert_allclose(token_loss(logits, jnp.zeros((1, 1), int)), np.log(4096), rtol=1e-6)


def test_a_position_predicts_the_token_after_it_if_that_is_supervised():
    text = jnp.array([[3, 4, 5, 6]])
    target, counted = next_token_targets(text, jnp.array([[True, False, True, True]]))
    np.testing.assert_array_equal(target[:, :3], [[4, 5, 6]])
    np.testing.assert_array_equal(counted, [[False, True, True, False]])


def test_no_text_predicts_the_first_token_of_the_next_in_its_row():
    text, segments = jnp.array([[3, 4, 5, 6]]), jnp.array([[1, 1, 2, 2]])
    _, counted = next_token_targets(text, jnp.ones((1, 4), bool), segments)
    np.testing.assert_array_equal(counted, [[True, False, True, False]])
