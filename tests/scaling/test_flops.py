# SPDX-License-Identifier: Apache-2.0
"""FLOPs in closed form against XLA's own count and against published figures."""

import jax
import jax.numpy as jnp
import pytest

from flax_vlm import trees
from flax_vlm.models import build_clip, build_siglip, build_vit
from flax_vlm.models.text_encoder import build_text_encoder
from flax_vlm.nn.norms import LayerNorm
from flax_vlm.scaling.flops import (
    map_head_flops,
    text_flops,
    train_flops_per_example,
    vision_flops,
)
from flax_vlm.scaling.memory import vision_bytes, vision_parameters
from tests.losses.cost import matmul_flops

# open_clip docs/model_profile.csv: GFLOP per sample of the whole model, the image tower, the text
# tower
PROFILE = {
    ("siglip", "B/16"): (46.44, 35.42, 11.02),
    ("siglip", "B/16-512"): (227.26, 216.24, 11.02),
    ("siglip", "L/16"): (201.62, 162.56, 39.06),
    ("siglip", "So400m/14"): (233.54, 220.35, 13.19),
    ("siglip", "So400m/14-384"): (723.48, 670.35, 53.13),
    ("clip", "B/32"): (14.78, 8.82, 5.96),
    ("clip", "B/16"): (41.09, 35.13, 5.96),
    ("clip", "L/14"): (175.33, 162.03, 13.3),
    ("clip", "H/14"): (381.68, 334.59, 47.09),
    ("clip", "G/14"): (1065.36, 967.5, 97.86),
    ("clip", "e/14"): (2091.45, 1981.35, 110.1),
}


@pytest.mark.parametrize(("name", "variant"), list(PROFILE))
def test_forward_flops_equal_the_published_profile_within_half_a_percent(name, variant):
    model = {"siglip": build_siglip, "clip": build_clip}[name](variant)
    total, image, text = PROFILE[name, variant]
    assert train_flops_per_example(model) / 3e9 == pytest.approx(total, rel=5e-3)
    assert vision_flops(model.image) / 1e9 == pytest.approx(image, rel=5e-3)
    assert text_flops(model.text) / 1e9 == pytest.approx(text, rel=5e-3)


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


SIZE = dict(width=128, depth=2, mlp_dim=512, num_heads=2, unroll=2)
PATCHES = 2 * 64 * (16 * 16 * 3) * 128  # forward FLOPs of the patch embedding


@pytest.fixture(params=[build_siglip, build_clip], ids=["siglip, MAP head", "clip, class token"])
def two_towers(request):
    """(model, its parameters' shapes and a batch's, a loss of them), unrolled."""
    image = dict(SIZE, name="vit", patch_size=16, image_size=128)
    text = dict(SIZE, name="text_encoder", vocab_size=50, length=32)
    model = request.param(image=image, text=text, embed_dim=96)
    batch = (
        jax.ShapeDtypeStruct((4, 128, 128, 3), jnp.float32),
        jax.ShapeDtypeStruct((4, 32), jnp.int32),
    )
    params = jax.eval_shape(model.init, jax.random.key(0), *batch)["params"]

    def loss(params, image, text):
        out = model.apply({"params": params}, image, text)
        return (out.image_embedding * out.text_embedding).sum()

    return model, (params, *batch), loss


def test_flops_equal_what_xla_counts_forward_and_backward_on_an_unrolled_model(two_towers):
    model, inputs, loss = two_towers
    ours = train_flops_per_example(model)
    forward, step = (xla_flops(f, *inputs) / 4 for f in (loss, jax.grad(loss)))
    # XLA also counts softmax, norms and GELU; nobody asks for the image's gradient
    assert 1.0 <= forward / (ours / 3) < 1.03
    assert 1.0 <= (step + PATCHES) / ours < 1.03
    # else a forgotten MAP head would pass
    assert map_head_flops(128, 512, tokens=64) > 0.03 * ours / 3


def test_flops_are_exactly_those_of_the_matrix_products_that_are_traced(two_towers):
    model, inputs, loss = two_towers
    ours = 4 * train_flops_per_example(model)
    assert matmul_flops(jax.make_jaxpr(loss)(*inputs).jaxpr) == ours / 3
    assert matmul_flops(jax.make_jaxpr(jax.grad(loss))(*inputs).jaxpr) == ours - 4 * PATCHES


def test_frozen_towers_count_once():
    model = build_siglip("B/16")
    image, text = vision_flops(model.image), text_flops(model.text)
    assert train_flops_per_example(model, frozen=("image",)) == image + 3 * text
    assert train_flops_per_example(model, frozen=["text", "image"]) == image + text


def test_given_sizes_win_over_the_models_and_dropped_patches_are_free():
    model = build_siglip("B/16")
    larger = train_flops_per_example(model, image_size=448, text_length=16)
    assert larger == 3 * (vision_flops(model.image, (448, 448)) + text_flops(model.text, 16))
    whole, half = build_vit("B/16", pool="gap"), build_vit("B/16", pool="gap", patch_dropout=0.5)
    assert 0.45 < train_flops_per_example(half) / train_flops_per_example(whole) < 0.5
    patches = 2 * 196 * 768 * 768
    assert vision_flops(half) - patches == 12 * (98 * 2 * 12 * 768**2 + 4 * 98 * 98 * 768)


def test_classes_and_projections_are_counted():
    classes = build_vit("B/16", num_classes=1000)
    assert vision_flops(classes) - vision_flops(build_vit("B/16")) == 2 * 768 * 1000
    head, bare = (build_text_encoder("B", vocab_size=9, length=4, embed_dim=e) for e in (10, None))
    assert train_flops_per_example(head) - train_flops_per_example(bare) == 3 * 2 * 768 * 10


def test_unknown_models_and_towers_are_errors():
    with pytest.raises(ValueError, match="got LayerNorm"):
        train_flops_per_example(LayerNorm(1e-6))
    with pytest.raises(ValueError, match=r"frozen names parts of a SigLIP.*got \['vision'\]"):
        train_flops_per_example(build_siglip("B/16"), frozen=("vision",))
    with pytest.raises(ValueError, match="frozen names parts"):
        train_flops_per_example(build_vit("B/16"), frozen=("image",))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_resampler_is_counted_to_the_last_product_and_parameter(qk_norm):
    resampler = dict(num_latents=5, depth=3, num_heads=2, head_dim=24, qk_norm=qk_norm)
    size = dict(width=32, depth=2, mlp_dim=48, num_heads=2, patch_size=8, image_size=24)
    model = build_vit(**size, pool="resampler", resampler=resampler, embed_dim=7)
    image = jax.ShapeDtypeStruct((4, 24, 24, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    traced = jax.make_jaxpr(lambda p, x: model.apply({"params": p}, x).pooled)(params, image)
    assert matmul_flops(traced.jaxpr) == 4 * vision_flops(model)
    assert trees.num_parameters(params) == vision_parameters(model)
    with pytest.raises(ValueError, match="no formula for the activations of a resampler"):
        vision_bytes(model)
