# SPDX-License-Identifier: Apache-2.0
"""preprocessor_config.json: every way it has been written, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from flax_vlm.data.hf_images import ImageRecipe, image_recipe, load_image_recipe
from flax_vlm.data.naflex import NaflexRecipe, naflex_size
from flax_vlm.data.pipeline import Preprocess
from flax_vlm.data.text import byte_level

CLIP_OPS = (
    {"name": "resize_small", "size": 224, "kind": "bicubic", "floor": True},
    {"name": "center_crop", "size": (224, 224), "fill": 0},
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE = np.random.default_rng(5).integers(0, 256, (40, 66, 3), dtype=np.uint8)


def folder_with(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def run(recipe, image=IMAGE):
    for op in recipe.build_ops():
        image = op(image, np.random.default_rng(0))
    return image


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "CLIPImageProcessor"},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
        {
            "image_processor_type": "CLIPImageProcessorFast",
            "size": {"shortest_edge": 224, "longest_edge": None},
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
            "do_convert_rgb": None,
            "image_mean": None,
            "do_center_crop": None,
            "data_format": "channels_first",
        },
    ],
)
def test_old_and_new_spellings_of_clip_are_one_recipe(config, tmp_path):
    recipe = load_image_recipe(folder_with(tmp_path, preprocessor_config=config))
    assert recipe.ops == CLIP_OPS
    assert (recipe.processor, recipe.image_size) == ("CLIPImageProcessor", (224, 224))
    assert recipe.mean == CLIP_MEAN  # to the last bit: 255 / 255 is 1
    assert run(recipe).shape == (224, 224, 3)


@pytest.mark.parametrize(
    "family, kind, size",
    [
        ("vit", "bilinear", (224, 224)),
        ("siglip_vision_model", "bicubic", (224, 224)),
        ("blip-2", "bicubic", (384, 384)),
    ],
)
def test_a_folder_without_a_preprocessor_has_its_familys(family, kind, size, tmp_path):
    recipe = load_image_recipe(folder_with(tmp_path, config={"model_type": family}))
    assert recipe.ops == ({"name": "resize", "size": size, "kind": kind},)


@pytest.mark.parametrize("family", ["clip_vision_model", "dinov2", "dinov2_with_registers"])
def test_clip_and_dinov2_crop(family, tmp_path):
    assert load_image_recipe(folder_with(tmp_path, config={"model_type": family})).ops == CLIP_OPS


def test_a_processor_config_of_transformers_5_comes_first(tmp_path):
    nested = {"image_processor": {"image_processor_type": "ViTImageProcessor", "size": 48}}
    old = {"image_processor_type": "SiglipImageProcessor"}
    folder = folder_with(tmp_path, processor_config=nested, preprocessor_config=old)
    assert load_image_recipe(folder).image_size == (48, 48)
    # and one that does not hold it changes nothing
    folder_with(tmp_path, processor_config={"processor_class": "SiglipProcessor"})
    assert load_image_recipe(folder).image_size == (224, 224)


def test_rescaling_and_normalising_become_one_mean_and_std():
    options = {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": 0.7,
        "rescale_factor": 1 / 127.5,
    }
    x = np.arange(256)[:, None]
    for rescale in (True, False):
        for normalise in (True, False):
            switches = {"do_rescale": rescale, "do_normalize": normalise}
            recipe = image_recipe({**options, **switches})
            wanted = x / 127.5 if rescale else x
            if normalise:
                wanted = (wanted - np.array([0.1, 0.2, 0.3])) / 0.7
            found = (x / 255 - recipe.mean) / recipe.std
            np.testing.assert_allclose(found, np.broadcast_to(wanted, (256, 3)), atol=1e-9)


def test_a_recipe_serves_the_pipeline():
    recipe = image_recipe({"image_processor_type": "ViTImageProcessor", "size": [24, 36]})
    preprocess = Preprocess(recipe.build_ops(), recipe.image_size, byte_level(), 8)
    row = preprocess({"image": IMAGE, "caption": "x"}, np.random.default_rng(0))
    wanted = np.asarray(Image.fromarray(IMAGE).resize((36, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(row["image"], wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "CLIPImageProcessor", "size": 30, "crop_size": [20, 24]},
        {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": 20},
        {"image_processor_type": "ViTImageProcessor", "size": [24, 36], "resample": 1},
        {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 14, "image_mean": 0.2},
    ],
)
def test_writing_and_reading_again_changes_nothing(config):
    recipe = image_recipe(config)
    written = json.loads(json.dumps(recipe.to_config()))
    assert image_recipe(written) == recipe


def test_what_transformers_cannot_do_is_not_exported():
    def recipe(*ops):
        return ImageRecipe("ViTImageProcessor", ops, (8, 8), (0.5,) * 3, (0.5,) * 3)

    small, crop = {"name": "resize_small", "size": 8}, {"name": "center_crop", "size": 8}
    with pytest.raises(ValueError, match="set floor=True"):
        recipe(small, crop).to_config()
    with pytest.raises(ValueError, match="always antialiases"):
        recipe({"name": "resize", "size": 8, "antialias": False}).to_config()
    with pytest.raises(ValueError, match=r"got \['resize', 'flip'\]"):
        recipe({"name": "resize", "size": 8}, {"name": "flip"}).to_config()
    config = recipe({"name": "resize", "size": 8, "kind": "bicubic"}).to_config()
    assert (config["size"], config["resample"]) == ({"height": 8, "width": 8}, 3)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"image_processor_type": "Idefics2ImageProcessor"},
            "unknown image processor.*choose one of",
        ),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad must be false"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 5}, "resample.*got 5"),
        ({"image_processor_type": "ViTImageProcessor", "resample": "3"}, "resample.*got '3'"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [0.5, 0.5, 0]}, "positive"),
        ({"image_processor_type": "ViTImageProcessor", "rescale_factor": "1/255"}, "positive"),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "images of one size"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "of one size"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "the size in"),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 0}},
            "positive int",
        ),
        ({"image_processor_type": "ViTImageProcessor", "size": -3}, "positive int"),
        ({"image_processor_type": "Siglip2ImageProcessor", "patch_size": 0}, "at least 1"),
        ({"image_processor_type": "Siglip2ImageProcessor", "do_resize": False}, "whole patches"),
        ({"do_resize": True}, "must have a preprocessor_config.json that names"),
    ],
)
def test_what_we_cannot_do_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_image_recipe(folder_with(tmp_path, preprocessor_config=config))


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(ValueError, match="preprocessor_config.json must hold a JSON object"):
        load_image_recipe(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="got a list"):
        load_image_recipe(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    folder_with(tmp_path, config={"model_type": "bert"})
    with pytest.raises(ValueError, match="unknown model_type for images 'bert'"):
        load_image_recipe(tmp_path)


@pytest.mark.parametrize(
    "height, width, patches", [(40, 66, 20), (66, 40, 20), (9, 500, 12), (7, 7, 9), (1, 999, 1)]
)
def test_naflex_takes_the_largest_grid_that_fits(height, width, patches):
    rows, columns = (side // 8 for side in naflex_size(height, width, 8, patches))
    assert rows * columns <= patches
    # every scale that gives another grid within the budget gives a smaller one
    scales = np.geomspace(1e-3, 50, 20_000)[:, None]
    grids = np.maximum(1, np.ceil(np.array([[height, width]]) * scales / 8)).prod(1)
    assert rows * columns == grids[grids <= patches].max()


def test_packed_patches_are_cut_in_rows_and_padded():
    recipe = NaflexRecipe(patch_size=8, max_num_patches=17, mean=(0.1, 0.2, 0.3), std=(0.5,) * 3)
    row = recipe(IMAGE)
    rows, columns = row["spatial_shape"]
    assert (rows, columns) == (3, 5)
    assert row["patches"].shape == (17, 192) and row["patches"].dtype == np.uint8
    assert row["patch_mask"].tolist() == [True] * 15 + [False] * 2
    assert not row["patches"][15:].any()
    small = np.asarray(Image.fromarray(IMAGE).resize((40, 24), Image.Resampling.BILINEAR))
    patch = small[8:16, 24:32]  # second row, fourth column
    np.testing.assert_array_equal(row["patches"][5 + 3], patch.reshape(-1))
    normal = recipe.normalize(row["patches"])[8].reshape(8, 8, 3)
    np.testing.assert_allclose(normal, (patch / 255 - recipe.mean) / recipe.std, atol=1e-6)
