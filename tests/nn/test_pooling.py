# SPDX-License-Identifier: Apache-2.0
"""Class token, mean, MAP head, last token and end-of-text token."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.nn import pooling
from flax_vlm.nn.initializers import init_vit
from flax_vlm.nn.mlp import ACTIVATIONS
from tests.nn import oracle

TOKENS = np.random.default_rng(0).standard_normal((3, 5, 12)).astype(np.float32)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_map_head_equals_the_oracle(activation):
    module = pooling.MAPHead(3, 20, init_vit(12, 1), activation=activation, norm_eps=0.1)
    params = oracle.random_params(module, TOKENS)
    assert params["probe"].shape == (1, 1, 12)
    expected = oracle.map_head(oracle.f64(params), TOKENS.astype(np.float64), activation, 0.1)
    oracle.assert_close(oracle.apply(module, params, TOKENS), expected)


def test_the_mean_leaves_the_prefix_out():
    oracle.assert_close(pooling.pool_mean(TOKENS), TOKENS.astype(np.float64).mean(1))
    expected = TOKENS[:, 2:].astype(np.float64).mean(1)
    oracle.assert_close(pooling.pool_mean(TOKENS, num_prefix=2), expected)
    np.testing.assert_array_equal(pooling.pool_class_token(TOKENS), TOKENS[:, 0])


def test_the_last_token_is_padding_too_unless_a_mask_says_which_are_real():
    keep = jnp.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(pooling.pool_last(TOKENS), TOKENS[:, 4])
    np.testing.assert_array_equal(pooling.pool_last(TOKENS, keep), TOKENS[np.arange(3), [1, 4, 2]])


def test_the_end_of_text_is_the_first_end_token_or_the_largest_id():
    text = jnp.array([[5, 9, 2, 2, 2], [2, 5, 9, 9, 1], [7, 5, 4, 2, 9]], jnp.int32)
    rows = np.arange(3)
    first_two = pooling.pool_end_of_text(TOKENS, text, eos_id=2)
    np.testing.assert_array_equal(first_two, TOKENS[rows, [2, 0, 3]])
    largest = pooling.pool_end_of_text(TOKENS, text, eos_id=None)
    np.testing.assert_array_equal(largest, TOKENS[rows, [1, 2, 4]])
    absent = pooling.pool_end_of_text(TOKENS, text, eos_id=8)
    np.testing.assert_array_equal(absent, TOKENS[:, 0])
