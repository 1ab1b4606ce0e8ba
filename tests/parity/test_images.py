# SPDX-License-Identifier: Apache-2.0
"""Pixels equal those of transformers' image processors, on photographs of several sizes and modes.

Exact against its Pillow classes; within 1/255 against those of torchvision, which resample with
other integer arithmetic (at the 99.9th percentile of the pixels).
"""

import json

import numpy as np
import pytest
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

from flax_vlm.data.decode import decode_image
from flax_vlm.data.hf_images import ImageRecipe, load_image_recipe
from flax_vlm.data.naflex import NaflexRecipe

CHINA, FLOWER = (Image.fromarray(image) for image in load_sample_images().images)


def transparent():
    image = FLOWER.resize((200, 90)).convert("RGBA")
    image.putalpha(Image.fromarray((np.arange(90 * 200) % 256).astype(np.uint8).reshape(90, 200)))
    return image


PICTURES = {
    "landscape": CHINA,
    "portrait": FLOWER.crop((100, 0, 400, 427)).resize((301, 500)),
    "square": CHINA.crop((0, 0, 240, 240)),
    "tiny": FLOWER.resize((13, 9)),
    "long": CHINA.resize((640, 37)),
    "grey": FLOWER.convert("L").resize((223, 225)),
    "transparent": transparent(),
    "palette": CHINA.resize((150, 200)).quantize(64),
}

CLIP, SIGLIP = transformers.CLIPImageProcessorPil, transformers.SiglipImageProcessorPil
VIT, BIT = transformers.ViTImageProcessorPil, transformers.BitImageProcessorPil
LLAVA = transformers.models.llava.image_processing_pil_llava.LlavaImageProcessorPil
DINO = {
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 56, "width": 56},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
CASES = {
    "vit": (VIT, {"do_convert_rgb": True}),
    "vit, odd sides, without normalisation": (
        VIT,
        {"do_convert_rgb": True, "size": {"height": 33, "width": 71}, "do_normalize": False},
    ),
    "clip": (CLIP, {}),
    "clip, edge 57, crop 48": (CLIP, {"size": {"shortest_edge": 57}, "crop_size": 48}),
    "clip, crop only": (CLIP, {"do_resize": False, "crop_size": {"height": 40, "width": 81}}),
    "clip, crop larger than the edge": (CLIP, {"size": {"shortest_edge": 31}, "crop_size": 45}),
    "siglip": (SIGLIP, {}),
    "siglip, lanczos": (SIGLIP, {"size": {"height": 84, "width": 84}, "resample": 1}),
    "siglip, other rescale": (
        SIGLIP,
        {"rescale_factor": 1 / 127.5, "size": {"height": 32, "width": 48}},
    ),
    "siglip, raw pixels": (SIGLIP, {"do_rescale": False, "do_normalize": False}),
    "dinov2": (BIT, DINO),
    "llava": (LLAVA, {"size": {"shortest_edge": 48}, "crop_size": 48}),
    "llava, padded as in training": (
        LLAVA,
        {"do_pad": True, "size": {"shortest_edge": 51}, "crop_size": 51},
    ),
    "blip": (transformers.BlipImageProcessorPil, {"size": {"height": 97, "width": 97}}),
}


def pixels(recipe, picture):
    """Returns [H, W, 3] float64 as the model sees it."""
    image = decode_image(picture)
    for op in recipe.build_ops():
        image = op(image, np.random.default_rng(0))
    assert image.shape == (*recipe.image_size, 3) and image.dtype == np.uint8
    return (image / 255 - recipe.mean) / recipe.std


def assert_close(ours, theirs, std, exact):
    """In units of x / 255."""
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs) * std
    if exact:
        assert difference.max() < 1e-5
    else:
        assert np.quantile(difference, 0.999) <= 1.001 / 255


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_the_pillow_processors(case, tmp_path):
    kind, options = CASES[case]
    processor = kind(**options)
    processor.save_pretrained(tmp_path)
    recipe = load_image_recipe(tmp_path)
    for picture in PICTURES.values():
        theirs = processor(picture)["pixel_values"][0].transpose(1, 2, 0)
        assert_close(pixels(recipe, picture), theirs, np.array(recipe.std), exact=True)


@pytest.mark.torchvision
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_near_those_of_the_torchvision_processors(case, tmp_path):
    kind, options = CASES[case]
    processor = getattr(transformers, kind.__name__.removesuffix("Pil"))(**options)
    processor.save_pretrained(tmp_path)
    recipe = load_image_recipe(tmp_path)
    for name, picture in PICTURES.items():
        if case.startswith("clip, crop") and name in ("tiny", "long"):
            continue  # torchvision pads an odd margin on the other side
        theirs = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert_close(pixels(recipe, picture), theirs, np.array(recipe.std), exact=False)


NAFLEX = {
    "default": {},
    "small patches": {"patch_size": 8, "max_num_patches": 77, "resample": 3},
    "one patch": {"max_num_patches": 1},
    "other statistics": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
}


@pytest.mark.parametrize("backend", ["Pil", pytest.param("", marks=pytest.mark.torchvision)])
@pytest.mark.parametrize("case", NAFLEX)
def test_packed_patches_are_those_of_transformers(case, backend, tmp_path):
    processor = getattr(transformers, f"Siglip2ImageProcessor{backend}")(
        **NAFLEX[case], do_convert_rgb=True
    )
    processor.save_pretrained(tmp_path)
    recipe = load_image_recipe(tmp_path)
    for picture in PICTURES.values():
        theirs = {k: np.asarray(v[0]) for k, v in processor(picture).items()}
        ours = recipe(decode_image(picture))
        np.testing.assert_array_equal(ours["spatial_shape"], theirs["spatial_shapes"])
        np.testing.assert_array_equal(ours["patch_mask"], theirs["pixel_attention_mask"])
        seen = ours["patch_mask"]
        std = np.tile(recipe.std, recipe.patch_size**2)
        normal = recipe.normalize(ours["patches"])
        assert normal.dtype == np.float32
        assert_close(normal[seen], theirs["pixel_values"][seen], std, exact=bool(backend))


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_write(case, tmp_path):
    kind, options = CASES[case]
    kind(**options).save_pretrained(tmp_path)
    recipe = load_image_recipe(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe.to_config()))
    assert load_image_recipe(tmp_path) == recipe
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for picture in (PICTURES["portrait"], PICTURES["grey"]):
        theirs = processor(picture)["pixel_values"][0].transpose(1, 2, 0)
        assert_close(pixels(recipe, picture), theirs, np.array(recipe.std), exact=True)


def test_transformers_reads_a_naflex_recipe_that_we_write(tmp_path):
    recipe = NaflexRecipe(patch_size=14, max_num_patches=60, kind="bicubic", std=(0.5, 0.4, 0.3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe.to_config()))
    assert load_image_recipe(tmp_path) == recipe
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = processor(CHINA)
    ours = recipe(np.asarray(CHINA))
    seen = ours["patch_mask"]
    std = np.tile(recipe.std, 14 * 14)
    assert_close(
        recipe.normalize(ours["patches"])[seen], theirs["pixel_values"][0][seen], std, exact=True
    )


def test_missing_keys_have_the_defaults_of_the_class_in_transformers(tmp_path):
    for name, kind in (
        ("CLIPImageProcessor", CLIP),
        ("SiglipImageProcessorFast", SIGLIP),
        ("ViTFeatureExtractor", VIT),
        ("BitImageProcessor", BIT),
        ("BlipImageProcessor", transformers.BlipImageProcessorPil),
    ):
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({"feature_extractor_type": name})
        )
        found = load_image_recipe(tmp_path)
        theirs = kind(do_convert_rgb=True)(CHINA)["pixel_values"][0].transpose(1, 2, 0)
        assert isinstance(found, ImageRecipe)
        assert_close(pixels(found, CHINA), theirs, np.array(found.std), exact=True)
