# SPDX-License-Identifier: Apache-2.0
"""LayerNorm, L2 normalisation, activations and the initialisers' spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.nn.initializers import INITS
from flax_vlm.nn.mlp import ACTIVATIONS, Mlp
from flax_vlm.nn.norms import LayerNorm, RMSNorm, l2_normalize
from tests.nn import oracle


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_layer_norm_equals_the_oracle_with_its_epsilon(eps):
    x = np.random.default_rng(0).standard_normal((2, 3, 7)).astype(np.float32)
    module = LayerNorm(eps)
    params = oracle.random_params(module, x)
    expected = oracle.layer_norm(oracle.f64(params), x.astype(np.float64), eps)
    oracle.assert_close(oracle.apply(module, params, x), expected)


def test_layer_norm_keeps_its_digits_when_the_mean_is_large():
    x = (1000 + np.random.default_rng(0).standard_normal((4, 64))).astype(np.float32)
    module = LayerNorm(1e-6)
    params = module.init(jax.random.key(0), x)["params"]
    expected = oracle.layer_norm(oracle.f64(params), x.astype(np.float64), 1e-6)
    oracle.assert_close(oracle.apply(module, params, x), expected, tolerance=2e-4)


def test_layer_norm_of_bfloat16_uses_float32_statistics():
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal((2, 256)), jnp.bfloat16)
    module = LayerNorm(1e-6)
    params = module.init(jax.random.key(0), x)["params"]
    out = oracle.apply(module, params, x)
    assert out.dtype == jnp.bfloat16
    expected = oracle.layer_norm(oracle.f64(params), np.asarray(x, np.float64), 1e-6)
    assert np.abs(np.asarray(out, np.float64) - expected).max() < 0.02  # one rounding of the result


def test_l2_normalize_gives_unit_float32_vectors_and_survives_zero():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.bfloat16)
    out = l2_normalize(x)
    assert out.dtype == jnp.float32
    oracle.assert_close(out, oracle.unit(np.asarray(x, np.float64)))
    oracle.assert_close(l2_normalize(jnp.full((1, 4), 1e-8)), np.full((1, 4), 1 / 3))  # + epsilon
    zero = jnp.zeros((1, 4))
    assert (l2_normalize(zero) == 0).all()
    assert np.isfinite(jax.grad(lambda z: l2_normalize(z)[0, 0])(zero)).all()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_each_activation_is_the_function_that_its_name_says(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = oracle.ACTIVATIONS[name](x.astype(np.float64))
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, atol=2e-6)


def test_the_mlp_equals_the_oracle_and_drops_in_training_alone():
    x = np.random.default_rng(0).standard_normal((2, 3, 7)).astype(np.float32)
    module = Mlp(11, activation="gelu_erf", dropout=0.5)
    params = oracle.random_params(module, x)
    expected = oracle.mlp(oracle.f64(params), x.astype(np.float64), "gelu_erf")
    oracle.assert_close(oracle.apply(module, params, x), expected)
    rngs = {"dropout": jax.random.key(1)}
    dropped = oracle.apply(module, params, x, deterministic=False, rngs=rngs)
    assert np.abs(dropped - expected).max() > 0.1


# standard deviations that the papers' code gives, width 256, depth 8
@pytest.mark.parametrize(
    ("scheme", "part", "shape", "std"),
    [
        ("vit", "attention_in", (256, 256), (2 / 512) ** 0.5),
        ("vit", "mlp_in", (256, 1024), (2 / 1280) ** 0.5),
        ("vit", "mlp_bias", (4096,), 1e-6),
        ("vit", "patches", (16, 16, 3, 256), (1 / 768) ** 0.5),
        ("vit", "positions", (196, 256), 256**-0.5),
        ("vit_small", "positions", (196, 256), 2.0),
        ("vit_small", "mlp_in", (256, 1024), (2 / 1280) ** 0.5),
        ("vit", "class_token", (1, 256), 0.0),
        ("vit", "embedding", (1000, 256), 256**-0.5),
        ("clip_text", "attention_in", (256, 256), 256**-0.5),
        ("clip_text", "attention_out", (256, 256), 256**-0.5 / 4),
        ("clip_text", "mlp_in", (256, 1024), 512**-0.5),
        ("clip_text", "mlp_out", (1024, 256), 256**-0.5 / 4),
        ("clip_text", "positions", (77, 256), 0.01),
        ("clip_text", "embedding", (1000, 256), 0.02),
        ("clip_text", "head", (256, 256), 256**-0.5),
        ("clip_image", "attention_in", (256, 256), (2 / 1024) ** 0.5),
        ("clip_image", "attention_out", (256, 256), (1 / 768) ** 0.5),
        ("clip_image", "mlp_out", (1024, 256), (1 / 3072) ** 0.5),
        ("clip_image", "class_token", (64, 256), 256**-0.5),
        ("clip_image", "mlp_bias", (1024,), 0.0),
    ],
)
def test_initialisers_have_the_spread_of_the_papers_code(scheme, part, shape, std):
    value = getattr(INITS[scheme](256, 8), part)(jax.random.key(0), shape, jnp.float32)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(np.std(value), std, rtol=0.05)


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_equals_the_oracle_in_float32_for_large_and_for_half_precision_inputs(plus_one):
    x = 300 + np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    module = RMSNorm(0.1, plus_one=plus_one)
    params = oracle.random_params(module, x)
    scale = np.asarray(params["scale"], np.float64) + plus_one
    oracle.assert_close(
        oracle.apply(module, params, x), oracle.rms_norm(scale, x.astype(np.float64), 0.1)
    )
    half = jnp.asarray(x / 100, jnp.bfloat16)
    expected = oracle.rms_norm(scale, np.asarray(half, np.float64), 0.1)
    out = oracle.apply(module, params, half)
    assert out.dtype == jnp.bfloat16
    oracle.assert_close(out, expected, 2**-8)  # rounded once, at the end
    initial = module.init(jax.random.key(0), x)["params"]["scale"]
    assert (np.asarray(initial) + plus_one == 1).all()


def test_a_gated_mlp_without_biases_has_three_kernels_alone():
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    module = Mlp(7, activation="silu", gated=True, use_bias=False)
    params = oracle.random_params(module, x)
    assert {k: set(v) for k, v in params.items()} == {
        name: {"kernel"} for name in ("fc1", "gate", "fc2")
    }
    p = oracle.f64(params)
    gate = oracle.ACTIVATIONS["silu"](x @ p["gate"]["kernel"])
    expected = (gate * (x @ p["fc1"]["kernel"])) @ p["fc2"]["kernel"]
    oracle.assert_close(oracle.apply(module, params, x), expected)
