# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer against a float64 oracle, in the dialects of ViT, SigLIP and CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.models.variants import VARIANTS
from flax_vlm.models.vit import VisionTransformer, ViTClassifier, build_vit
from flax_vlm.nn.positions import sincos2d
from flax_vlm.nn.resampler import PerceiverResampler
from tests.nn import oracle

SIZE = dict(width=12, depth=2, mlp_dim=20, num_heads=3, patch_size=(4, 2), image_size=(8, 6))
IMAGE = np.random.default_rng(0).standard_normal((2, 8, 6, 3)).astype(np.float32)
P = 6  # 2 x 3 patches

DIALECTS = {
    "vit": dict(pool="cls"),
    "big_vision": dict(pool="cls", class_position=False),
    "gap": dict(pool="gap", activation="gelu_erf"),
    "gap beside a class token": dict(pool="gap", class_token=True),
    "sincos": dict(pool="cls", position_embedding="sincos2d"),
    "siglip": dict(pool="map", norm_eps=0.1),
    "siglip with projection": dict(pool="map", embed_dim=5),
    "clip": dict(
        pool="cls",
        pre_norm=True,
        patch_bias=False,
        activation="quick_gelu",
        norm_eps=0.1,
        embed_dim=5,
        head_bias=False,
        init_scheme="clip_image",
    ),
}


def reference(model, p, image):
    x = oracle.patch_tokens(p["patches"], image)
    with_class = model.class_token and model.class_position
    if model.position_embedding == "sincos2d":
        patch_positions, class_position = sincos2d((2, 3), 12), 0.0
    elif with_class:
        patch_positions, class_position = p["positions"][1:], p["positions"][0]
    else:
        patch_positions, class_position = p["positions"], 0.0
    x = x + patch_positions
    if model.class_token:
        cls = np.broadcast_to(p["cls"] + class_position, (x.shape[0], 1, x.shape[2]))
        x = np.concatenate([cls, x], axis=1)
    if model.pre_norm:
        x = oracle.layer_norm(p["ln_pre"], x, model.norm_eps)
    tokens = oracle.encoder(p["encoder"], x, model.activation, model.norm_eps)
    if model.pooling == "map":
        pooled = oracle.map_head(p["pool"], tokens, model.activation, model.norm_eps)
    elif model.pooling == "gap":
        pooled = tokens[:, -P:].mean(1)
    else:
        pooled = tokens[:, 0]
    if "head" in p:
        pooled = pooled @ p["head"]["kernel"] + p["head"].get("bias", 0.0)
    return tokens, pooled


@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_every_dialect_equals_the_float64_oracle(dialect):
    model = build_vit(**SIZE, **DIALECTS[dialect])
    params = oracle.random_params(model, IMAGE, scale=0.4)
    tokens, pooled = reference(model, oracle.f64(params), IMAGE.astype(np.float64))
    out = oracle.apply(model, params, IMAGE)
    oracle.assert_close(out.tokens, tokens)
    oracle.assert_close(out.pooled, pooled)


def test_a_resampler_pools_to_the_mean_of_its_latents():
    resampler = {"num_latents": 3, "depth": 1, "num_heads": 2, "head_dim": 5}
    model = build_vit(**SIZE, pool="resampler", resampler=resampler, embed_dim=5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: np.float32(rng.normal(size=s.shape, scale=0.5)), shapes)
    output = model.apply({"params": params}, IMAGE)
    latents = PerceiverResampler(**resampler).apply({"params": params["pool"]}, output.tokens)
    expected = np.asarray(latents).mean(1) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(output.pooled, expected, atol=2e-5 * abs(expected).max())
    for fields in ({"pool": "resampler"}, {"pool": "gap", "resampler": resampler}):
        with pytest.raises(ValueError, match='pooling "resampler" and the field resampler go'):
            build_vit(**SIZE, **fields)


def test_the_classifier_adds_a_zero_head_to_the_same_encoder():
    model = build_vit(**SIZE, num_classes=7)
    head = jax.jit(lambda key: model.init(key, IMAGE)["params"]["head"])(jax.random.key(0))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(head))
    params = oracle.random_params(model, IMAGE, scale=0.4)
    tokens, logits = reference(model, oracle.f64(params), IMAGE.astype(np.float64))
    oracle.assert_close(oracle.apply(model, params, IMAGE), logits)
    encoded = oracle.apply(model, params, IMAGE, method="encode")
    oracle.assert_close(encoded.tokens, tokens)
    oracle.assert_close(encoded.pooled, tokens[:, 0])


def test_patch_dropout_keeps_the_class_token_and_a_fixed_number_of_patches_in_training_alone():
    # depth 0 blocks do not exist: one block of zeros passes its input on
    model = build_vit(**{**SIZE, "depth": 1}, patch_dropout=0.5)
    params = oracle.random_params(model, IMAGE)
    params["encoder"]["blocks"] = jax.tree.map(np.zeros_like, params["encoder"]["blocks"])
    full = np.asarray(oracle.apply(model, params, IMAGE).tokens)
    run = lambda seed: np.asarray(  # noqa: E731
        oracle.apply(
            model, params, IMAGE, train=True, rngs={"patch_dropout": jax.random.key(seed)}
        ).tokens
    )
    kept = run(0)
    assert full.shape == (2, 1 + P, 12) and kept.shape == (2, 1 + P // 2, 12)
    np.testing.assert_array_equal(kept[:, 0], full[:, 0])
    for row, tokens in zip(kept, full, strict=True):
        assert all((tokens[1:] == token).all(-1).any() for token in row[1:])
    assert any(not np.array_equal(kept, run(seed)) for seed in (1, 2, 3))


def test_every_patch_reaches_the_logits_and_rows_do_not_mix():
    model = build_vit(**SIZE, num_classes=3)
    params = oracle.random_params(model, IMAGE)
    logits = lambda image: oracle.apply(model, params, image)[0, 1]  # noqa: E731
    gradient = np.asarray(jax.grad(logits)(jnp.asarray(IMAGE)))
    assert (np.abs(gradient[0]) > 0).all() and (gradient[1] == 0).all()


def test_bfloat16_keeps_parameters_logits_and_embeddings_float32():
    for fields in (dict(num_classes=3), dict(pool="map", embed_dim=5)):
        model = build_vit(**SIZE, **fields, dtype="bfloat16")
        params = oracle.random_params(model, IMAGE)
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        out = oracle.apply(model, params, IMAGE)
        assert (out if "num_classes" in fields else out.pooled).dtype == jnp.float32
        if "num_classes" not in fields:
            assert out.tokens.dtype == jnp.bfloat16


def test_attention_maps_of_every_layer_and_of_the_map_head_can_be_asked_for():
    model = build_vit(**SIZE, pool="map")
    params = oracle.random_params(model, IMAGE)
    _, state = oracle.apply(model, params, IMAGE, mutable=["intermediates"])
    maps = state["intermediates"]
    assert maps["encoder"]["blocks"]["attention"]["attention_weights"][0].shape == (2, 2, 3, P, P)
    assert maps["pool"]["attention"]["attention_weights"][0].shape == (2, 3, 1, P)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_full_size_variants_have_their_output_shapes_without_any_memory(variant):
    model = build_vit(f"{variant}/16", num_classes=10, pool="gap")
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    logits, params = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    width, depth = VARIANTS[variant]["width"], VARIANTS[variant]["depth"]
    assert logits.shape == (2, 10)
    kernel = params["params"]["encoder"]["blocks"]["attention"]["q"]["kernel"]
    heads = VARIANTS[variant]["num_heads"]
    assert kernel.shape == (depth, width, heads, width // heads)


def test_so400m_at_384_sees_27_by_27_patches_when_the_border_is_dropped():
    model = build_vit("So400m/14", image_size=384, pool="map", drop_remainder=True)
    assert model.grid == (27, 27)
    with pytest.raises(ValueError, match="patch_size 14 must divide the image, got 384 x 384"):
        build_vit("So400m/14", image_size=384, pool="map")


def test_wrong_configs_are_errors_when_the_model_is_built():
    wrong = [
        (dict(variant="B/16", image_size=(225, 224)), "must divide the image, got 225 x 224"),
        (dict(variant="XXL/16"), "unknown variant 'XXL', choose one of"),
        (dict(variant="B/x"), "such as \"B/16\", got 'B/x'"),
        (dict(variant="B/16", widht=3), r"unknown key \['widht'\] for model 'vit'"),
        (dict(variant="B/16", pool="mean"), "unknown pooling 'mean', choose one of"),
        (dict(variant="B/16", class_token=False), 'pooling "cls" needs class_token=True'),
        (dict(variant="B/16", position_embedding="rope"), "unknown position_embedding 'rope'"),
        (dict(variant="B/16", patch_dropout=1.5), "patch_dropout must be in"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            build_vit(**fields)


def test_an_image_of_another_size_is_an_error_that_names_both():
    model = build_vit(**SIZE)
    with pytest.raises(ValueError, match=r"images \[B, 8, 6, C\], got \(2, 6, 8, 3\)"):
        model.init(jax.random.key(0), IMAGE.transpose(0, 2, 1, 3))
    with pytest.raises(ValueError, match="must be normalised floats, got uint8"):
        model.init(jax.random.key(0), IMAGE.astype(np.uint8))


def test_the_table_builds_a_classifier_or_an_encoder_from_a_plain_dict():
    spec = {"name": "vit", "variant": "mu/8", "image_size": [16, 24], "dtype": "bfloat16"}
    encoder = build(MODELS, spec, "model")
    assert type(encoder) is VisionTransformer and encoder.grid == (2, 3) and hash(encoder)
    assert type(build(MODELS, {**spec, "num_classes": 10}, "model")) is ViTClassifier
