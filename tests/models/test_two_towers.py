# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP: towers from config, unit float32 embeddings, parameter paths, presets."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from flax_vlm.build import build
from flax_vlm.models import MODELS, clip, siglip
from flax_vlm.models.clip import build_clip
from flax_vlm.models.siglip import build_siglip
from flax_vlm.trees import named_leaves
from tests.nn import oracle

IMAGE = np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)
TEXT = jnp.array([[5, 9, 4, 2, 1], [8, 3, 2, 1, 1]], jnp.int32)
IMAGE_SPEC = dict(name="vit", variant="mu/4", image_size=(8, 12), depth=2)
TEXT_SPEC = dict(name="text_encoder", variant="mu", vocab_size=11, length=5, width=48, num_heads=3)
BUILDERS = {"siglip": build_siglip, "clip": build_clip}


def tiny(name, **fields):
    text = {**TEXT_SPEC, **({"eos_id": 2} if name == "clip" else {})}
    return BUILDERS[name](**{"image": IMAGE_SPEC, "text": text, "embed_dim": 20, **fields})


@pytest.mark.parametrize("name", list(BUILDERS))
def test_embeddings_are_the_normalised_outputs_of_the_towers(name):
    model = tiny(name)
    params = oracle.random_params(model, IMAGE, TEXT, scale=0.3)

    @jax.jit  # one program for all of them: XLA merges what they share
    def run(params):
        one = lambda method, *x: model.apply({"params": params}, *x, method=method)  # noqa: E731
        return (
            model.image.apply({"params": params["image"]}, IMAGE),
            model.text.apply({"params": params["text"]}, TEXT),
            one("__call__", IMAGE, TEXT),
            one("encode_image", IMAGE),
            one("encode_text", TEXT),
            one("image_tokens", IMAGE),
            one("logit_parameters"),
        )

    image, text, out, image_embedding, text_embedding, tokens, (scale, bias) = run(params)
    oracle.assert_close(out.image_embedding, oracle.unit(np.asarray(image.pooled, np.float64)))
    oracle.assert_close(out.text_embedding, oracle.unit(np.asarray(text.pooled, np.float64)))
    assert out.image_embedding.shape == out.text_embedding.shape == (2, 20)
    oracle.assert_close(image_embedding, out.image_embedding)
    oracle.assert_close(text_embedding, out.text_embedding)
    oracle.assert_close(tokens, image.tokens)
    oracle.assert_close(out.logit_scale, np.exp(np.float64(params["logit_scale"])))
    assert scale == out.logit_scale and bias == out.logit_bias
    assert (bias is None) == (name == "clip")


@pytest.mark.parametrize("name", list(BUILDERS))
def test_scale_and_bias_start_where_the_paper_starts_them(name):
    def start(**fields):
        # setup alone: no tower is initialised
        return tiny(name, **fields).init_with_output(jax.random.key(0), method="logit_parameters")

    (scale, bias), params = start()
    assert scale.shape == () and scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, {"siglip": 10.0, "clip": 1 / 0.07}[name], rtol=1e-6)
    assert bias == {"siglip": -10.0, "clip": None}[name]
    assert ("logit_bias" in params["params"]) == (name == "siglip")
    (scale, bias), _ = start(init_scale=3.0, **({"init_bias": -2.5} if name == "siglip" else {}))
    np.testing.assert_allclose(scale, 3.0, rtol=1e-6)
    assert bias == {"siglip": -2.5, "clip": None}[name]


def test_bfloat16_towers_give_float32_unit_embeddings_near_the_float32_ones():
    low = dict(dtype="bfloat16")
    model = tiny("siglip", image={**IMAGE_SPEC, **low}, text={**TEXT_SPEC, **low})
    params = oracle.random_params(model, IMAGE, TEXT, scale=0.1)
    out, exact = (oracle.apply(m, params, IMAGE, TEXT) for m in (model, tiny("siglip")))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE, TEXT)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("float32")}
    for name in ("image_embedding", "text_embedding"):
        value, reference = np.asarray(getattr(out, name)), np.asarray(getattr(exact, name))
        oracle.assert_close(np.linalg.norm(value, axis=-1), np.ones(2))
        assert 1e-4 < np.abs(value - reference).max() < 0.05


def test_parameter_paths_are_what_the_rules_speak_about():
    model = tiny("siglip", embed_dim=48)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE, TEXT)["params"]
    paths = {path: leaf.shape for path, leaf in named_leaves(shapes).items()}
    expected = {
        "image/patches/kernel": (4, 4, 3, 32),
        "image/positions": (6, 32),
        "image/encoder/blocks/attention/q/kernel": (2, 32, 2, 16),
        "image/encoder/blocks/attention/o/kernel": (2, 2, 16, 32),
        "image/encoder/blocks/mlp/fc1/kernel": (2, 32, 128),
        "image/encoder/blocks/ln1/scale": (2, 32),
        "image/encoder/norm/bias": (32,),
        "image/pool/probe": (1, 1, 32),
        "image/pool/attention/v/bias": (2, 16),
        "image/pool/mlp/fc2/kernel": (128, 32),
        "image/head/kernel": (32, 48),
        "text/embedding/embedding": (11, 48),
        "text/positions": (5, 48),
        "text/encoder/blocks/attention/k/kernel": (1, 48, 3, 16),
        "text/head/bias": (48,),
        "logit_scale": (),
        "logit_bias": (),
    }
    assert expected.items() <= paths.items()
    tops = {path.split("/")[0] for path in paths}
    assert tops == {"image", "text", "logit_scale", "logit_bias"}


def test_clip_has_a_class_token_a_norm_before_the_blocks_and_no_bias_in_patches_and_heads():
    shapes = jax.eval_shape(tiny("clip").init, jax.random.key(0), IMAGE, TEXT)["params"]
    paths = {path: leaf.shape for path, leaf in named_leaves(shapes).items()}
    assert paths["image/cls"] == (1, 32) and paths["image/positions"] == (7, 32)
    assert paths["image/ln_pre/scale"] == (32,)
    for absent in ("image/patches/bias", "image/head/bias", "text/head/bias", "logit_bias"):
        assert absent not in paths


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_image_embedding_does_not_depend_on_the_other_images_of_the_batch(name):
    model = tiny(name)
    params = oracle.random_params(model, IMAGE, TEXT, scale=0.3)
    encode = lambda x: oracle.apply(model, params, x, method="encode_image")  # noqa: E731
    oracle.assert_close(encode(IMAGE[1:]), encode(IMAGE)[1:])


def test_the_image_tower_has_a_projection_only_where_the_widths_differ():
    assert build_siglip("B/16").image.embed_dim is None
    assert build_siglip("g-opt/16-v2").image.embed_dim is None
    assert build_siglip("g-opt/16-v2").text.embed_dim == 1536
    assert tiny("siglip").image.embed_dim == 20
    assert build_clip("B/32").image.embed_dim == build_clip("B/32").text.embed_dim == 512


def test_presets_hold_the_published_contexts_vocabularies_and_activations():
    so400m = build_siglip("So400m/14")
    assert (so400m.text.length, so400m.text.mlp_dim, so400m.text.vocab_size) == (16, 4304, 32_000)
    assert build_siglip("So400m/14-384").text.length == 64
    assert build_siglip("So400m/14-384").image.grid == (27, 27)
    assert build_siglip("B/16-v2").text.vocab_size == 256_000
    assert {build_siglip(v).image.activation for v in siglip.PRESETS} == {"gelu_tanh"}
    quick = [v for v in clip.PRESETS if build_clip(v).text.activation == "quick_gelu"]
    assert quick == ["B/32", "B/16", "L/14", "L/14-336"]
    for variant in clip.PRESETS:
        model = build_clip(variant)
        assert (model.text.length, model.text.vocab_size) == (77, 49_408)
        assert model.image.activation == model.text.activation
        assert model.image.norm_eps == model.text.norm_eps == 1e-5
        assert model.text.is_causal and model.text.pooling == "eos"


def test_a_preset_can_be_changed_field_by_field():
    model = build_siglip(
        "B/16", image={"image_size": 256, "dtype": "bfloat16"}, text={"vocab_size": 100}
    )
    assert (model.image.image_size, model.image.width, model.image.dtype) == (256, 768, "bfloat16")
    assert (model.text.vocab_size, model.text.length) == (100, 64)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_config_node_and_a_plain_dict_build_the_same_model(name):
    spec = dict(name=name, image=IMAGE_SPEC, text=TEXT_SPEC, embed_dim=20)
    from_config = build(MODELS, ml_collections.ConfigDict(spec), "model")
    from_json = build(MODELS, {**spec, "image": {**IMAGE_SPEC, "image_size": [8, 12]}}, "model")
    assert from_config == from_json == build(MODELS, spec, "model")
    assert hash(from_config) == hash(from_json)


def test_wrong_configs_name_the_choices():
    wrong = [
        (dict(variant="B/17"), "unknown SigLIP variant 'B/17', choose one of"),
        (dict(image={**IMAGE_SPEC, "name": "resnet"}, text=TEXT_SPEC), "unknown image encoder"),
        (dict(image=IMAGE_SPEC, text={**TEXT_SPEC, "name": "t5"}), "unknown text encoder 't5'"),
        (dict(image={**IMAGE_SPEC, "depht": 2}, text=TEXT_SPEC), "unknown key"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            build_siglip(**fields)
    model = tiny("siglip")
    model = model.clone(text=model.text.clone(embed_dim=21))
    with pytest.raises(ValueError, match=r"same width, got 20 \(image\) and 21 \(text\)"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGE, TEXT)
