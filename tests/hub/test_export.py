# SPDX-License-Identifier: Apache-2.0
"""An export holds the whole model and its card, replaces earlier ones, and touches nothing else."""

import json

import jax
import numpy as np
import pytest

import flax_vlm
from flax_vlm import trees
from flax_vlm.hub.loaded_model import Origin
from tests.hub.folders import CLASSES, SPECS, write_folder

IMAGES = [np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: flax_vlm.load(write_folder(root / name, name)[0]) for name in SPECS}


@pytest.mark.parametrize("name", list(SPECS))
def test_what_is_saved_is_what_was_loaded(name, models, tmp_path):
    vlm, out = models[name], tmp_path / "deep" / "out"
    assert flax_vlm.save_pretrained(vlm, out, max_shard_bytes=60_000) == name
    assert (out / "model.safetensors.index.json").is_file()
    again = flax_vlm.load(out)
    assert not trees.differences(*(jax.device_get(v.params) for v in (vlm, again)))
    assert again.processor == vlm.processor and again.config["model"] == vlm.config["model"]
    assert again.origin.class_names == vlm.origin.class_names
    if name != "vit" and "text" in SPECS[name]:
        np.testing.assert_array_equal(again.embed_text(["A cat"]), vlm.embed_text(["A cat"]))


def test_a_smaller_dtype_and_a_mesh_are_saved_too(models, tmp_path):
    models["siglip"].save_pretrained(tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    half = flax_vlm.load(tmp_path).params["image"]["patches"]["kernel"]
    whole = np.asarray(models["siglip"].params["image"]["patches"]["kernel"])
    np.testing.assert_array_equal(half, whole.astype("bfloat16").astype("float32"))
    assert (half != whole).any()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_with_something_else_is_refused_and_left_alone(models, tmp_path):
    (tmp_path / "config.json").write_text('{"objective": {}}')
    (tmp_path / "README.md").write_text("# mine\n- flax_vlm\n")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=r"empty folder or an earlier export, .* holds \['README.md"
    ):
        models["clip"].save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="config.json is a file"):
        models["clip"].save_pretrained(tmp_path / "config.json")


def test_an_earlier_export_is_replaced_without_leftovers_and_without_following_links(
    models, tmp_path
):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    models["siglip"].save_pretrained(out, max_shard_bytes=60_000)
    elsewhere.mkdir()
    for file in list(out.iterdir()):  # as a hub cache has it
        file.rename(elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)
    (out / "notes.txt").write_text("mine")
    before = contents(elsewhere)
    models["vit"].save_pretrained(out)
    assert sorted(contents(out)) == [
        "README.md", "config.json", "model.safetensors", "notes.txt", "preprocessor_config.json",
    ]  # fmt: skip
    assert not [p for p in out.iterdir() if p.is_symlink()]
    assert contents(elsewhere) == before
    assert flax_vlm.load(out).class_names == CLASSES


def test_an_interrupted_export_can_be_repeated(models, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flax_vlm.hub.export.save_weights", full)
        with pytest.raises(OSError, match="no space"):
            models["clip"].save_pretrained(tmp_path)
    models["clip"].save_pretrained(tmp_path)
    assert flax_vlm.load(tmp_path).embed_image(IMAGES).shape == (1, 14)


def test_a_model_that_no_format_holds_is_refused_before_anything_is_written(models, tmp_path):
    for model_type, message in (("clip", r"it is for \['CLIP'\]"), ("bert", "unknown model_type")):
        with pytest.raises(ValueError, match=message):
            models["siglip"].save_pretrained(tmp_path / "out", model_type=model_type)
        assert not (tmp_path / "out").exists()


def test_the_card_keeps_the_licence_and_tells_the_source(models, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nlicense: no\n")
    write_folder(tmp_path, "siglip2")
    vlm = flax_vlm.load(tmp_path)
    out = tmp_path / "out"
    vlm.save_pretrained(out)
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "\nlicense: apache-2.0\n" in front and "zero-shot-image-classification" in front
    assert "images of any aspect ratio" in card and f"`{tmp_path.name}`" in card
    assert str(tmp_path.parent) not in card, "paths of this machine concern nobody"
    assert flax_vlm.load(out).origin.license == "apache-2.0"
    vlm.save_pretrained(out, license="mit")
    assert "\nlicense: mit\n" in (out / "README.md").read_text()
    models["vit"].save_pretrained(tmp_path / "vit")
    card = (tmp_path / "vit" / "README.md").read_text()
    assert "license:" not in card and "None stated" in card and "image-classification" in card
    assert models["vit"].origin == Origin(models["vit"].origin.name, "vit", None, CLASSES, {})


def test_the_eos_id_2_of_old_clip_configs_is_not_the_tokenizers(tmp_path):
    folder, _ = write_folder(tmp_path / "in", "clip")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # the largest id is pooled
    (folder / "config.json").write_text(json.dumps(config))
    vlm = flax_vlm.load(folder)
    vlm.save_pretrained(tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["eos_token_id"] == 2 and text["pad_token_id"] == 0
    assert flax_vlm.load(tmp_path / "out").model.text.eos_id is None
