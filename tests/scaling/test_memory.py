# SPDX-License-Identifier: Apache-2.0
"""Parameter counts against every published model, activations against what jax.vjp keeps."""

import jax
import jax.numpy as jnp
import pytest

from flax_vlm.models import MODELS, build_siglip, build_vit
from flax_vlm.models.published import PUBLISHED, count_parameters
from flax_vlm.models.text_encoder import build_text_encoder
from flax_vlm.models.two_towers import IMAGE_ENCODERS
from flax_vlm.nn.norms import LayerNorm
from flax_vlm.scaling.memory import activation_bytes, parameter_counts

VIT = dict(width=48, depth=5, mlp_dim=136, num_heads=3, patch_size=8, image_size=56)
TEXT = dict(width=40, depth=4, mlp_dim=120, num_heads=5, length=33, vocab_size=70, embed_dim=24)


@pytest.mark.parametrize("name", ["CLIP B/32", "SigLIP So400m/14", "ViT-G/14", "ViT-B/16 GAP"])
def test_parameters_equal_those_that_are_created(name):
    entry = PUBLISHED[name]
    model = MODELS[entry.model](**entry.arguments)
    assert sum(parameter_counts(model).values()) == count_parameters(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_equal_those_that_are_created_for_every_published_model(name):
    test_parameters_equal_those_that_are_created(name)


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_registers=4, mask_token=True, layer_scale=1e-5, gated_mlp=True),
        dict(sub_norm=True, qkv_bias="qv", gated_mlp=True, rotary_grid=(7, 7)),
        dict(class_position=False, pre_norm=True, patch_bias=False, num_classes=11),
        dict(name="naflex_vit", pool="map", norm_eps=1e-5),
        dict(position_embedding="sincos2d", pool="map", embed_dim=30, head_bias=False),
    ],
    ids=["registers, scale", "EVA-02", "CLIP, classes", "NaFlex", "MAP, sincos"],
)
def test_parameters_of_every_field_are_counted(fields):
    builder = IMAGE_ENCODERS[fields.get("name", "vit")]
    model = builder(**VIT, **{key: value for key, value in fields.items() if key != "name"})
    assert parameter_counts(model) == {"encoder": count_parameters(model)}


def kept_bytes(model, example):
    """Bytes of the residuals of one example, parameters left out."""
    batch = jax.ShapeDtypeStruct((2, *example.shape), example.dtype)
    params = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]

    def residuals(params):
        data = jnp.zeros(batch.shape, batch.dtype)
        return jax.vjp(lambda p: model.apply({"params": p}, data).pooled, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
    return sum(x.size * x.dtype.itemsize for x in leaves if 2 in x.shape[:3]) / 2


IMAGE, WORDS = jnp.zeros((56, 56, 3)), jnp.zeros(33, jnp.int32)
MODES = [
    ("full", "float32"),
    ("full", "bfloat16"),
    ("dots_no_batch", "float32"),
    ("dots", "bfloat16"),
    ("none", "float32"),
    ("none", "bfloat16"),
]


@pytest.mark.parametrize(("remat", "dtype"), MODES)
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(pool="map", gated_mlp=True, activation="silu"),
        dict(sub_norm=True, activation="gelu_erf", pre_norm=True),
    ],
    ids=["plain", "MAP, gated", "sub-norm"],
)
def test_activations_of_an_image_encoder_are_what_the_backward_pass_is_given(fields, remat, dtype):
    model = build_vit(**VIT, **fields, remat=remat, dtype=dtype)
    ours = activation_bytes(model)["encoder"]
    slack = 0.15 if remat == "none" else 0.04  # see the docstring of memory.py
    assert 0.96 <= ours / kept_bytes(model, IMAGE) <= 1 + slack


@pytest.mark.parametrize(("remat", "dtype"), MODES)
def test_activations_of_a_text_encoder_are_what_the_backward_pass_is_given(remat, dtype):
    model = build_text_encoder(**TEXT, remat=remat, dtype=dtype)
    ours = activation_bytes(model)["encoder"]
    slack = 0.15 if remat == "none" else 0.04
    assert 0.96 <= ours / kept_bytes(model, WORDS) <= 1 + slack


def test_activations_follow_sizes_towers_and_kernels():
    model = build_siglip("B/16")
    both = activation_bytes(model)
    assert both.keys() == {"image", "text"}
    assert activation_bytes(model, image_size=448)["text"] == both["text"]
    assert activation_bytes(model, image_size=448)["image"] > 4 * both["image"]
    assert activation_bytes(model, text_length=16)["text"] < both["text"] / 3
    # scores of float32 and their softmax: 12 blocks, 12 heads, 196 tokens
    flash = activation_bytes(model, scores=False)["image"]
    assert both["image"] - flash == 12 * 12 * (8 * 196**2 + 8 * 196)


def test_models_without_a_formula_are_errors():
    with pytest.raises(ValueError, match="got LayerNorm"):
        parameter_counts(LayerNorm(1e-6))
