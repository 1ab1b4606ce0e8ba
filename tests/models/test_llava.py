# SPDX-License-Identifier: Apache-2.0
"""Llava: where visual tokens go, what is left alone, and what its text looks at. Parity with
transformers is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.models.attention_maps import text_attention
from flax_vlm.models.llava import gather_tokens

IMAGE = 90
SPEC = {
    "name": "llava",
    "image": {
        "name": "vit",
        "width": 16,
        "depth": 3,
        "mlp_dim": 32,
        "num_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "connector": {"name": "mlp"},
    "language_model": {
        "vocab_size": 96,
        "width": 24,
        "depth": 2,
        "mlp_dim": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "image_token_id": IMAGE,
    "newline": True,
}
TEXT = jnp.array([[1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6], [1, 2, 3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def model():
    return build(MODELS, SPEC, "model")


@pytest.fixture(scope="module")
def params(model):
    inputs = [jnp.zeros(x.shape, x.dtype) for x in model.example_inputs()]
    params = model.init(jax.random.key(0), *inputs)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(2), (2, 1, 16, 16, 3))


def test_placeholders_take_the_visual_tokens_in_their_order(model, params, images):
    variables = {"params": params}
    x = model.apply(variables, TEXT, images, method="embed")
    visual = model.apply(variables, images, method="visual_tokens")
    words = model.apply(variables, TEXT, method="embed")
    np.testing.assert_array_equal(x[0, 1:5], visual[0, :4])
    np.testing.assert_array_equal(x[0, 5:], words[0, 5:])
    np.testing.assert_array_equal(x[1], words[1])


def test_a_text_without_placeholders_does_not_see_its_image(model, params, images):
    logits = [model.apply({"params": params}, TEXT, x).logits for x in (images, 2 * images)]
    change = np.abs(logits[0] - logits[1]).max(axis=(1, 2))
    assert change[0] > 1e-3 and change[1] == 0


def test_an_index_puts_any_visual_token_anywhere(model, params, images):
    index = jnp.zeros(TEXT.shape, jnp.int32).at[0, 1:5].set(jnp.array([3, 4, 0, 3]))  # 4: newline
    variables = {"params": params}
    x = model.apply(variables, TEXT, images, visual_index=index, method="embed")
    visual = model.apply(variables, images, method="visual_tokens")
    np.testing.assert_array_equal(x[0, 1:5], visual[0, jnp.array([3, 4, 0, 3])])
    np.testing.assert_array_equal(visual[0, 4], params["newline"])


@pytest.mark.parametrize(
    ("compression", "tokens"),
    [
        ({"name": "average_pool"}, 1),
        ({"name": "pixel_shuffle"}, 1),
        ({"name": "token_merging", "tokens": 3}, 3),
    ],
)
def test_compressed_features_reach_the_connector_and_are_counted(
    model, params, images, compression, tokens
):
    small = build(MODELS, SPEC | {"compression": compression}, "model")
    assert small.tokens_per_image == tokens and model.tokens_per_image == 4
    features = model.image.apply({"params": params["image"]}, images[:, 0], method="features")
    expected = small.compression(features[:, model.image.num_prefix :])[0]
    variables = {"params": params}
    if compression["name"] == "pixel_shuffle":  # the connector is wider
        wider = small.init(jax.random.key(0), TEXT, images)["params"]["connector"]
        variables = {"params": params | {"connector": wider}}
    expected = small.connector.apply({"params": variables["params"]["connector"]}, expected)[0]
    found = small.apply(variables, images, method="visual_tokens")
    np.testing.assert_allclose(found[:, :-1], expected, atol=1e-6)  # the last is the newline
    assert found.shape[1] == tokens + 1


def test_weights_sum_visual_tokens():
    rng = np.random.default_rng(0)
    tokens, weight = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4, 2))
    index = rng.integers(5, size=(2, 4, 2))
    expected = np.stack([np.einsum("ljd,lj->ld", tokens[b][index[b]], weight[b]) for b in (0, 1)])
    found = gather_tokens(*map(jnp.asarray, (tokens, index, weight)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_features_of_a_layer_do_not_depend_on_later_ones(model, params, images, layer):
    def features(tower):
        return model.image.apply({"params": tower}, images[:, 0], layer, method="features")

    def shifted(block):
        tower = params["image"]
        blocks = jax.tree.map(lambda x: x.at[block].add(1.0), tower["encoder"]["blocks"])
        return tower | {"encoder": tower["encoder"] | {"blocks": blocks}}

    reference = features(params["image"])
    np.testing.assert_array_equal(reference, features(shifted(layer)))
    if layer:
        assert np.abs(reference - features(shifted(layer - 1))).max() > 1e-3


def test_features_of_the_last_layer_are_the_output_before_its_norm(model, params, images):
    tower = {"params": params["image"]}
    raw = model.image.apply(tower, images[:, 0], 3, method="features")
    out = model.image.apply(tower, images[:, 0], method="features")
    norm = params["image"]["encoder"]["norm"]
    mean, std = raw.mean(-1, keepdims=True), raw.std(-1, keepdims=True)
    normed = (raw - mean) / std * norm["scale"][None, None] + norm["bias"][None, None]
    np.testing.assert_allclose(out, normed, rtol=1e-3, atol=1e-4)


def test_a_layer_that_is_not_there_is_refused(model, params, images):
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.3, got 4"):
        model.image.apply({"params": params["image"]}, images[:, 0], 4, method="features")


def test_attention_of_a_text_sums_to_one_and_looks_back(model, params, images):
    weights = np.asarray(text_attention(model, params, TEXT, images))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert np.all(weights[:, np.triu_indices(7, 1)[0], np.triu_indices(7, 1)[1]] == 0)
