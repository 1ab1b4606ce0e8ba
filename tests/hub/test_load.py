# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder becomes the same LoadedModel that a workdir becomes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import flax_vlm
from flax_vlm import trees
from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.models.attention_maps import pooling_attention
from flax_vlm.nn.positions import resize_positions
from flax_vlm.training.sharding import make_mesh
from tests.hub.folders import CLASSES, SPECS, TOKENIZER, random_params, write_folder

RNG = np.random.default_rng(0)
SHAPES = [(8, 8), (40, 20, 3), (33, 31, 3)]
IMAGES = [RNG.integers(0, 256, shape, dtype=np.uint8) for shape in SHAPES]
NAMES = list(SPECS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {name: write_folder(root / name, name)[0] for name in NAMES}


@pytest.fixture(scope="module")
def params():
    return {name: jax.tree.map(np.asarray, random_params(SPECS[name])) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_family_gives_embeddings_tokens_and_attention(name, folders, params):
    vlm = flax_vlm.load(folders[name], batch_size=2)
    assert not trees.differences(jax.device_get(vlm.params), params[name])
    embedded = vlm.embed_image(IMAGES)
    width = 14 if name == "clip" else 24
    assert embedded.shape == (3, width) and embedded.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1.0, rtol=1e-5)
    # rows do not depend on what they are computed with
    np.testing.assert_allclose(vlm.embed_image(IMAGES[1:2])[0], embedded[1], atol=2e-6)
    prefix = {"vit": 1, "clip": 1, "dinov2_with_registers": 5}.get(name, 0)
    tokens, patches = vlm.image_tokens(IMAGES), vlm.patch_tokens(IMAGES)
    assert tokens.shape == (3, prefix + 9, 24)
    maps = vlm.attention(IMAGES)
    # NaFlex has 9 patches at most: 40 x 20 pixels are 4 x 2 of them
    grids = [(3, 3), (4, 2), (3, 3)] if name == "siglip2" else [(3, 3)] * 3
    for grid, row, patch, weights in zip(grids, tokens, patches, maps, strict=True):
        assert patch.shape == (*grid, 24) and weights.shape == (6, *grid)
        end = prefix + grid[0] * grid[1]
        np.testing.assert_array_equal(patch.reshape(-1, 24), row[prefix:end])
        total = weights.sum((1, 2))
        assert (total < 1 - 1e-4).all() if prefix else np.allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "siglip2", "clip"])
def test_two_towers_classify_and_embed_texts(name, folders):
    vlm = flax_vlm.load(folders[name])
    names, texts = ["cat", "dog"], ["a photo of a cat.", "a photo of a dog."]
    embedded = vlm.embed_text(texts)
    assert vlm.processor.texts(texts)["text"].shape == (2, 32), "the tokenizer's length"
    logits = vlm.embed_image(IMAGES) @ embedded.T * np.exp(vlm.params["logit_scale"])
    expected = jax.nn.softmax(logits, axis=1)
    np.testing.assert_allclose(vlm.classify(IMAGES, names), expected, atol=1e-5)
    several = vlm.classify(IMAGES, names, templates="short")
    np.testing.assert_allclose(several.sum(1), 1, rtol=1e-5)
    assert np.abs(several - expected).max() > 1e-5
    with pytest.raises(ValueError, match="needs class_names"):
        vlm.classify(IMAGES)


def test_a_classifier_has_classes_of_its_own(folders):
    vlm = flax_vlm.load(folders["vit"])
    assert vlm.class_names == CLASSES
    logits = vlm.predict("logits", vlm.processor.image_batch(IMAGES))
    np.testing.assert_allclose(vlm.classify(IMAGES), jax.nn.softmax(logits, axis=1), atol=1e-6)
    some = vlm.classify(IMAGES, ["cat", "zero"])
    np.testing.assert_allclose(some, jax.nn.softmax(logits[:, [2, 0]], axis=1), atol=1e-6)
    with pytest.raises(ValueError, match=r"this classifier knows \['zero', 'one', 'cat', "):
        vlm.classify(IMAGES, ["dog"])


def test_encoders_say_what_they_cannot_do(folders):
    vlm = flax_vlm.load(folders["dinov2_with_registers"])
    for wrong, message in (
        (lambda: vlm.embed_text(["a"]), "texts need a tokenizer, and there is none"),
        (lambda: vlm.classify(IMAGES, ["a"]), "texts need a tokenizer"),
        (lambda: vlm.class_names, "a VisionTransformer has no classes of its own"),
        (lambda: vlm.predict("logits", {}), "unknown prediction 'logits', choose one of"),
        (lambda: vlm.embed_image([]), "at least one, got an empty one"),
        (lambda: vlm.embed_image([IMAGES[0], b"x"]), "image 1 could not be read"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_attention_is_that_of_the_pooled_vector(folders, params):
    model, weights = build(MODELS, SPECS["siglip"], "model"), params["siglip"]
    image = RNG.standard_normal((2, 30, 30, 3)).astype(np.float32)
    seen = pooling_attention(model, weights, image)  # [B, N, P]
    tokens = model.apply({"params": weights}, image, method="image_tokens")
    pool = weights["image"]["pool"]["attention"]
    q = np.einsum("d,dnk->nk", weights["image"]["pool"]["probe"][0, 0], pool["q"]["kernel"])
    q = q + pool["q"]["bias"]
    k = np.einsum("btd,dnk->btnk", tokens, pool["k"]["kernel"]) + pool["k"]["bias"]
    scores = np.einsum("nk,btnk->bnt", q, k) / np.sqrt(4)
    np.testing.assert_allclose(seen, jax.nn.softmax(scores, axis=-1), atol=1e-5)
    mean = build(MODELS, {**SPECS["vit"], "pool": "gap"}, "model")
    with pytest.raises(ValueError, match='got pooling "gap"'):
        pooling_attention(mean, params["vit"], image)


def test_the_sizes_of_the_preprocessor_win_and_positions_follow(tmp_path, params):
    crop = {"height": 20, "width": 40}
    config = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 44},
        "crop_size": crop,
        "image_mean": [0.4, 0.5, 0.6],
    }
    name = "dinov2_with_registers"
    folder, _ = write_folder(tmp_path, name, preprocessor=config)
    for mesh in (None, make_mesh(2, 4, 1)):
        vlm = flax_vlm.load(folder, mesh=mesh)
        assert vlm.model.grid == (2, 4) and vlm.image_tokens(IMAGES).shape == (3, 5 + 8, 24)
        table = params[name]["positions"]
        expected = resize_positions(table, (3, 3), (2, 4), method="bicubic_antialias", num_prefix=1)
        np.testing.assert_array_equal(vlm.params["positions"], expected)
        assert vlm.objective.image_mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("name", ["siglip2", "clip"])
def test_a_mesh_holds_the_parameters_in_parts_and_changes_no_number(name, folders):
    mesh = make_mesh(2, 2, 2)
    rules = ((".*/fc1/kernel", ("fsdp", "tensor")),)
    spread = flax_vlm.load(folders[name], mesh=mesh, rules=rules)
    alone = flax_vlm.load(folders[name])
    kernel = spread.params["image"]["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 12, 48)
    assert {x.sharding.mesh.size for x in jax.tree.leaves(spread.params)} == {8}
    assert not trees.differences(*(jax.device_get(v.params) for v in (spread, alone)))
    for call in ("embed_image", "image_tokens"):
        found, wanted = (getattr(v, call)(IMAGES) for v in (spread, alone))
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    np.testing.assert_allclose(spread.embed_text(["a cat"]), alone.embed_text(["a cat"]), atol=2e-5)


def test_bfloat16_halves_the_parameters_and_keeps_the_scale(folders):
    whole, half = (flax_vlm.load(folders["siglip"], dtype=d) for d in (None, "bfloat16"))
    kinds = {str(x.dtype) for x in jax.tree.leaves(half.params) if x.ndim}
    assert kinds == {"bfloat16"} and half.model.image.dtype == half.model.text.dtype == "bfloat16"
    assert half.params["logit_scale"] == whole.params["logit_scale"]
    gap = np.abs(half.embed_image(IMAGES) - whole.embed_image(IMAGES)).max()
    assert 1e-5 < gap < 0.03


@pytest.mark.parametrize(
    ("family", "tokens", "size"),
    [("timm", 1 + 24, (24, 16)), ("blip_2_vision_model", 10, (30, 30))],
)
def test_folders_without_a_preprocessor_are_prepared_at_the_size_of_the_model(
    family, tokens, size, tmp_path
):
    folder, _ = write_folder(tmp_path / "in", family)
    vlm = flax_vlm.load(folder)
    assert vlm.image_tokens(IMAGES).shape == (3, tokens, 16)
    assert vlm.processor.image_recipe.image_size == size
    np.testing.assert_allclose(vlm.objective.image_mean, [0.48145466, 0.4578275, 0.40821073])
    assert vlm.save_pretrained(tmp_path / "out") == family
    again = flax_vlm.load(tmp_path / "out")
    np.testing.assert_array_equal(again.embed_image(IMAGES), vlm.embed_image(IMAGES))
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("transformers" in card) == (family != "timm")


def test_naflex_takes_images_of_one_size_too(folders):
    vlm = flax_vlm.load(folders["siglip2"])
    image = Image.fromarray(RNG.integers(0, 256, (20, 40, 3), dtype=np.uint8))
    seen = vlm.processor.images([image])
    assert [x.shape for x in seen] == [(20, 40, 3)]
    np.testing.assert_array_equal(seen[0], np.asarray(image))
    whole = vlm.predict("image_embedding", {"image": seen[0][None]})
    np.testing.assert_allclose(vlm.embed_image([image]), whole, atol=2e-6)


def test_without_a_tokenizer_only_texts_fail(tmp_path):
    folder, _ = write_folder(tmp_path, "siglip", tokenizer=False)
    vlm = flax_vlm.load(folder)
    ids = TOKENIZER.encode(["a cat", "a dog"], 36)[0]
    rows = vlm.processor.image_batch(IMAGES[:2])
    assert vlm.predict("logits", {**rows, "text": ids}).shape == (2, 2)
    with pytest.raises(ValueError, match="its folder has no tokenizer files"):
        vlm.embed_text(["a cat"])


def test_folders_that_are_neither_are_named(tmp_path):
    with pytest.raises(ValueError, match="must hold config.json"):
        flax_vlm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"of the family 'bert', supported are \['big_vision"):
        flax_vlm.load(tmp_path)
    with pytest.raises(ValueError, match='is a folder or a hub id "org/name"'):
        flax_vlm.load(tmp_path / "absent" / "run")
