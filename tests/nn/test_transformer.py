# SPDX-License-Identifier: Apache-2.0
"""The scanned encoder equals the float64 oracle; remat and unroll change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.nn.mlp import ACTIVATIONS
from flax_vlm.nn.transformer import Encoder
from tests.nn import oracle

B, S, D, DEPTH = 2, 5, 12, 2
SIZE = dict(depth=DEPTH, num_heads=3, mlp_dim=20)


def inputs(seed=0, batch=B, length=S, width=D):
    return np.random.default_rng(seed).standard_normal((batch, length, width)).astype(np.float32)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_encoder_equals_the_float64_oracle(activation, is_causal):
    x = inputs()
    mask = np.ones((B, 1, S, S), bool)
    mask[1, :, :, 3] = False
    # eps 0.1: a wrong epsilon would not be seen at its real size
    module = Encoder(**SIZE, activation=activation, norm_eps=0.1, is_causal=is_causal)
    params = oracle.random_params(module, x, scale=0.4)
    expected = oracle.encoder(oracle.f64(params), x, activation, 0.1, mask, is_causal)
    oracle.assert_close(oracle.apply(module, params, x, mask), expected)


def value_and_gradients(module, params, x):
    def loss(params):
        return jnp.square(oracle.apply(module, params, x)).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain():
    x = inputs()
    module = Encoder(**SIZE)
    params = oracle.random_params(module, x, scale=0.4)
    return x, params, value_and_gradients(module, params, x)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("dots", 1), ("full", 1), ("dots_no_batch", DEPTH)],
)
def test_remat_and_unroll_change_neither_values_nor_gradients(plain, remat, unroll):
    x, params, expected = plain
    module = Encoder(**SIZE, remat=remat, unroll=unroll)
    jax.tree.map(oracle.assert_close, value_and_gradients(module, params, x), expected)


def test_full_remat_needs_less_memory_than_none():
    x = inputs(batch=4, length=64, width=32)

    def temp_bytes(remat):
        module = Encoder(depth=4, num_heads=2, mlp_dim=128, remat=remat)
        params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        loss = lambda p: jnp.square(module.apply({"params": p}, x)).mean()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes("full") < 0.7 * temp_bytes("none")


def test_attention_weights_of_all_layers_are_stacked_on_a_layer_axis():
    x = inputs()
    module = Encoder(**SIZE, remat="full")
    params = oracle.random_params(module, x, scale=0.4)
    out, state = oracle.apply(module, params, x, mutable=["intermediates"])
    (weights,) = state["intermediates"]["blocks"]["attention"]["attention_weights"]
    assert weights.shape == (DEPTH, B, 3, S, S)
    oracle.assert_close(weights.sum(-1), np.ones((DEPTH, B, 3, S)))
    p = oracle.f64(params)
    hidden, first = np.asarray(x, np.float64), oracle.layer(p["blocks"], 0)
    y = oracle.layer_norm(first["ln1"], hidden, 1e-6)
    q, k = (
        np.einsum("btd,dnk->btnk", y, first["attention"][n]["kernel"])
        + first["attention"][n]["bias"]
        for n in "qk"
    )
    expected, _ = oracle.softmax_attention(q, k, k)
    oracle.assert_close(weights[0], expected)
    oracle.assert_close(out, oracle.encoder(p, x))


def test_dropout_acts_in_training_alone_and_differs_between_layers():
    x = inputs()
    module = Encoder(**SIZE, dropout=0.5)
    params = oracle.random_params(module, x, scale=0.4)
    train = jax.jit(
        lambda key: oracle.apply(module, params, x, deterministic=False, rngs={"dropout": key})
    )
    run = lambda seed: train(jax.random.key(seed))  # noqa: E731
    quiet = oracle.apply(module, params, x)
    oracle.assert_close(quiet, oracle.encoder(oracle.f64(params), x))
    assert np.abs(run(0) - quiet).max() > 0.1
    assert np.abs(run(0) - run(1)).max() > 0.1
    np.testing.assert_array_equal(run(2), run(2))


def test_bfloat16_compute_keeps_parameters_float32_and_stays_near_the_float32_result():
    x = inputs()
    module = Encoder(**SIZE, dtype="bfloat16")
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = oracle.randomize(shapes, scale=0.3)
    out = oracle.apply(module, params, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = oracle.encoder(oracle.f64(params), x)
    assert 1e-4 < np.abs(np.asarray(out, np.float32) - exact).max() < 0.1


def test_unknown_names_list_the_choices():
    x = inputs()
    for wrong, choices in (
        (dict(remat="everything"), "dots_no_batch"),
        (dict(activation="gelu"), "gelu_erf.*gelu_tanh.*quick_gelu"),
        (dict(init_scheme="torch"), "clip_image.*clip_text.*vit"),
        (dict(attention_implementation="flash"), "cudnn"),
    ):
        with pytest.raises(ValueError, match=f"unknown .*choose one of .*{choices}"):
            jax.eval_shape(Encoder(**SIZE, **wrong).init, jax.random.key(0), x)


def test_every_layer_starts_from_its_own_random_numbers():
    params = jax.jit(Encoder(**SIZE).init)(jax.random.key(0), inputs())["params"]
    kernel = params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (DEPTH, D, 20)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
