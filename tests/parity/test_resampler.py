# SPDX-License-Identifier: Apache-2.0
"""The Perceiver Resampler against IDEFICS, and pixel shuffle against Idefics3, in transformers."""

import jax
import numpy as np
import pytest
import torch

from flax_vlm.nn.connectors import pixel_shuffle
from flax_vlm.nn.resampler import PerceiverResampler

D, HEADS, HEAD_DIM, LATENTS, DEPTH = 24, 3, 10, 7, 2


def reference(qk_norm):
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(
        vision_config={"embed_dim": D},
        perceiver_config={"qk_layer_norms_perceiver": qk_norm},
    )
    model = IdeficsPerceiverResampler(config, D, DEPTH, HEADS, HEAD_DIM, LATENTS).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def ours(model, qk_norm):
    """(module, parameters) of the reference's tensors."""
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def kernel(name):
        return tensors[f"{name}.weight"].T

    def heads(name):
        return {"kernel": kernel(name).reshape(D, HEADS, HEAD_DIM)}

    blocks = []
    for layer in range(DEPTH):
        a, f = f"blocks.{layer}.0", f"blocks.{layer}.1"
        attention = {
            "context_norm": norm(f"{a}.context_layer_norm"),
            "latents_norm": norm(f"{a}.latents_layer_norm"),
            **{name: heads(f"{a}.{name}_proj") for name in "qkv"},
            "o": {"kernel": kernel(f"{a}.output_proj").reshape(HEADS, HEAD_DIM, D)},
        }
        if qk_norm:
            attention |= {f"{n}_norm": norm(f"{a}.{n}_layer_norm") for n in "qk"}
        blocks.append(
            {
                "attention": attention,
                "mlp_norm": norm(f"{f}.ln"),
                "mlp": {
                    "fc1": {"kernel": kernel(f"{f}.fc")},
                    "fc2": {"kernel": kernel(f"{f}.c_proj")},
                },
            }
        )
    params = {
        "latents": tensors["latents"],
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "norm": norm("layer_norm"),
    }
    module = PerceiverResampler(
        num_latents=LATENTS, depth=DEPTH, num_heads=HEADS, head_dim=HEAD_DIM,
        activation="relu", qk_norm=qk_norm,
    )  # fmt: skip
    return module, params


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_resampler_is_idefics(qk_norm):
    model = reference(qk_norm)
    module, params = ours(model, qk_norm)
    for tokens in (1, 6, 13):
        x = np.random.default_rng(tokens).normal(size=(3, tokens, D)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.tensor(x)).numpy()
        found = module.apply({"params": params}, x)
        np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, abs(expected).max()))


@pytest.mark.parametrize("change", [{"activation": "gelu_erf"}, {"norm_eps": 1e-1}])
def test_another_activation_or_epsilon_is_seen(change):
    model = reference(False)
    module, params = ours(model, False)
    x = np.random.default_rng(0).normal(size=(3, 6, D)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(x)).numpy()
    found = module.clone(**change).apply({"params": params}, x)
    assert abs(found - expected).max() > 1e-3


def test_the_resamplers_gradient_is_that_of_idefics():
    model = reference(True)
    module, params = ours(model, True)
    x = np.random.default_rng(0).normal(size=(3, 6, D)).astype(np.float32)
    (model(torch.tensor(x)) ** 3).sum().backward()
    grads = jax.grad(lambda p: (module.apply({"params": p}, x) ** 3).sum())(params)
    expected = model.latents.grad.numpy()
    limit = 2e-5 * max(1, abs(expected).max())
    np.testing.assert_allclose(grads["latents"], expected, atol=limit)


@pytest.mark.parametrize("scale", [2, 3])
def test_pixel_shuffle_is_that_of_idefics3(scale):
    from transformers import Idefics3Config
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    config = Idefics3Config(scale_factor=scale, vision_config={"hidden_size": D})
    x = np.random.default_rng(0).normal(size=(2, 36, D)).astype(np.float32)
    expected = Idefics3Connector(config).pixel_shuffle(torch.tensor(x), scale).numpy()
    np.testing.assert_array_equal(pixel_shuffle(x, scale), expected)
