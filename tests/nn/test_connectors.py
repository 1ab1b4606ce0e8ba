# SPDX-License-Identifier: Apache-2.0
"""Connectors against NumPy, and how many tokens come out."""

import jax
import numpy as np
import pytest
from scipy.special import erf

from flax_vlm.nn.connectors import build_connector, pixel_shuffle
from flax_vlm.nn.resampler import PerceiverResampler

B, P, D, W = 3, 16, 6, 10
RESAMPLER = {"num_latents": 5, "depth": 1, "num_heads": 2, "head_dim": 4}
SPECS = {
    "linear": {"name": "linear"},
    "linear without bias": {"name": "linear", "use_bias": False},
    "mlp": {"name": "mlp"},
    "pixel_shuffle": {"name": "pixel_shuffle", "scale": 2},
    "resampler": {"name": "resampler", "resampler": RESAMPLER},
}


def start(spec, x, mask=None):
    connector = build_connector(spec, W)
    shapes = jax.eval_shape(connector.init, jax.random.key(0), x, mask)["params"]
    rng = np.random.default_rng(0)
    return connector, jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape)), shapes)


def tokens(*shape):
    return np.float32(np.random.default_rng(1).normal(size=shape))


def dense(x, p):
    return np.float64(x) @ p["kernel"] + p.get("bias", 0.0)


def shuffled(x):
    """Two by two patches of a 4 x 4 grid, written out."""
    grid = x.reshape(B, 4, 4, D)
    rows = []
    for i in (0, 2):
        for j in (0, 2):
            four = [grid[:, i, j], grid[:, i, j + 1], grid[:, i + 1, j], grid[:, i + 1, j + 1]]
            rows.append(np.concatenate(four, -1))
    return np.stack(rows, 1)


def oracle(name, x, params):
    if name.startswith("linear"):
        return dense(x, params["fc1"])
    if name == "mlp":
        h = dense(x, params["fc1"])
        return dense(h * (1 + erf(h / np.sqrt(2))) / 2, params["fc2"])
    if name == "pixel_shuffle":
        return dense(shuffled(x), params["fc1"])
    resampled = PerceiverResampler(**RESAMPLER).apply({"params": params["resampler"]}, x)
    return dense(resampled, params["fc1"])


@pytest.mark.parametrize("name", SPECS)
def test_a_connector_is_its_formula_and_says_how_many_tokens_come_out(name):
    x = tokens(B, P, D)
    connector, params = start(SPECS[name], x)
    found, mask = connector.apply({"params": params}, x)
    expected = oracle(name, x, params)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, abs(expected).max()))
    assert found.shape == (B, connector.num_tokens(P), W) and mask is None
    assert ("bias" in params["fc1"]) == (name not in ("linear without bias", "pixel_shuffle"))


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_token_by_token_connectors_hand_the_mask_on(name):
    x, mask = tokens(B, P, D), np.arange(P)[None] < np.array([3, 16, 9])[:, None]
    connector, params = start(SPECS[name], x, mask)
    np.testing.assert_array_equal(connector.apply({"params": params}, x, mask)[1], mask)


def test_a_masked_token_does_not_reach_the_resamplers_output():
    x, mask = tokens(B, P, D), np.arange(P)[None] < np.array([3, 16, 9])[:, None]
    connector, params = start(SPECS["resampler"], x, mask)
    found, left = connector.apply({"params": params}, x, mask)
    other, _ = connector.apply({"params": params}, np.where(mask[..., None], x, 7.0), mask)
    np.testing.assert_allclose(found, other, atol=1e-5)
    assert left is None
    unmasked, _ = connector.apply({"params": params}, x)
    assert abs(unmasked - found).max() > 1e-2


@pytest.mark.parametrize(("patches", "scale"), [(12, 2), (9, 2), (16, 3)])
def test_a_grid_that_cannot_be_shuffled_is_refused(patches, scale):
    with pytest.raises(ValueError, match=f"whose side {scale} divides, got {patches} patches"):
        pixel_shuffle(tokens(B, patches, D), scale)


def test_pixel_shuffle_takes_no_mask_and_unknown_connectors_are_named():
    with pytest.raises(ValueError, match="takes no mask"):
        start(SPECS["pixel_shuffle"], tokens(B, P, D), np.ones((B, P), bool))
    with pytest.raises(ValueError, match="unknown connector 'mlp2x'.*did you mean 'mlp'"):
        build_connector({"name": "mlp2x"}, W)
