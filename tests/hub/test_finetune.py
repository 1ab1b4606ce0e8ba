# SPDX-License-Identifier: Apache-2.0
"""Training that starts from a checkpoint of transformers, and ends as one."""

import json
import re

import jax
import numpy as np
import pytest

import flax_vlm
from configs import llava_finetune, siglip_finetune
from flax_vlm import trees
from flax_vlm.convert import loading
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.experiment import Experiment
from flax_vlm.nn.positions import resize_positions
from flax_vlm.program import Program
from flax_vlm.start.sources import open_source
from tests.data.test_jinja_templates import LLAVA as TEMPLATE
from tests.hub import test_generate
from tests.hub.folders import IMAGE, SPECS, TOKENIZER, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: (folder, parameters)}."""
    root = tmp_path_factory.mktemp("folders")
    return {name: write_folder(root / name, name) for name in ("siglip", "clip")}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("digits"))


def recipe(folder, **values):
    config = siglip_finetune.get_config(str(folder))
    config.unlock()
    config.steps, config.batch_size, config.log_every = 2, 16, 1
    config.update(values)
    return config


def test_the_recipe_fine_tunes_a_checkpoint_and_exports_it_again(folders, data_dir, tmp_path):
    folder, before = folders["siglip"]
    config = recipe(folder)
    config.data.dir = data_dir
    config.optimizer.schedule = {"name": "constant"}
    config.evals.zero_shot.every = 2
    run = Experiment.from_config(config)
    assert run.tokenizer == TOKENIZER and run.config["data"]["text"]["length"] == 32
    state, done = run.train(tmp_path / "run", show_progress=False)
    assert done
    vlm = flax_vlm.load(tmp_path / "run")
    after = jax.device_get(vlm.params)
    assert vlm.model.image.grid == (4, 4)
    assert not trees.differences(after["text"], before["text"]), "frozen"
    moved = {
        path: np.abs(x - trees.named_leaves(before)[path]).max()
        for path, x in trees.named_leaves(after).items()
        if path.startswith("image/") and path != "image/positions"
    }
    assert all(moved.values()), "the image tower learns"
    # Adam's steps are of the size of the rate: 1e-4 in the head, a tenth and less before it
    head, first = moved["image/pool/mlp/fc1/bias"], moved["image/patches/kernel"]
    assert 1e-4 < head < 3e-4 and 0 < first < 0.1 * head
    vlm.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"derive from `{folder.name}`" in card and "| zero_shot/accuracy |" in card
    again = flax_vlm.load(tmp_path / "out")
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_allclose(again.embed_image([image]), vlm.embed_image([image]), atol=1e-6)


CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


def test_a_llava_is_fine_tuned_in_its_own_template_and_exported_again(data_dir, tmp_path):
    (tmp_path / "hf").mkdir()
    folder = test_generate.write(tmp_path / "hf", test_generate.LLAVA, "llava")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    # as language models have it: nothing is put around a text
    TextRecipe(test_generate.TOKENIZER, 400, uses_mask=True, chat=True).save(folder)
    padded = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **CROP}
    (folder / "preprocessor_config.json").write_text(json.dumps(padded))
    config = llava_finetune.get_config(str(folder))
    config.unlock()
    config.steps, config.batch_size, config.checkpoint.every = 2, 8, 2
    config.optimizer.schedule = {"name": "constant"}
    config.data.dir, config.evals.test.data.options.test_size = data_dir, 8
    config.evals.test.update({"batch_size": 8, "num_pictures": 0})  # its letters have no glyphs
    config.objective.max_new_tokens, config.data.text.length = 4, 200
    config.data.options.turns = 1
    run = Experiment.from_config(config)
    row = run.train_data.preprocess(run.train_data.source[0], np.random.default_rng(0))
    text = run.tokenizer._chat.decode(row["text"][row["text_mask"]], skip_special_tokens=False)
    assert text.startswith("USER: " + "<image>" * 4 + "\n") and "ASSISTANT: " in text
    stops = [run.tokenizer.eos_id, run.tokenizer.id_of("<|im_end|>")]
    assert list(run.config["objective"]["stop_ids"]) == stops
    run.train(tmp_path / "run", show_progress=False)
    tuned, before = flax_vlm.load(tmp_path / "run"), flax_vlm.load(folder)
    old = trees.named_leaves(jax.device_get(before.params))
    for path, leaf in trees.named_leaves(jax.device_get(tuned.params)).items():
        learns = re.fullmatch("connector/.*|language_model/.*/attention/[qkvo]/kernel", path)
        assert np.array_equal(leaf, old[path]) != bool(learns), path
    assert tuned.origin.results["test/examples"] == 8
    tuned.save_pretrained(tmp_path / "out")
    again = flax_vlm.load(tmp_path / "out")
    assert again.processor.image_recipe == before.processor.image_recipe, "padded to squares"
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    asked = [image], ["What?"], 5
    assert again.generate(*asked) == tuned.generate(*asked)


def test_positions_are_resampled_and_all_else_is_the_checkpoint(folders):
    folder, before = folders["clip"]
    run = Program.from_config(recipe(folder, mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    start = jax.device_get(run.init_state().params)
    table = start["image"].pop("positions")
    wanted = {**before, "image": {k: v for k, v in before["image"].items() if k != "positions"}}
    assert not trees.differences(start, wanted)
    expected = resize_positions(
        before["image"]["positions"], (3, 3), (4, 4), method="bicubic_torch", num_prefix=1
    )
    np.testing.assert_array_equal(table, expected)


def test_a_tower_of_a_checkpoint_becomes_a_classifier_with_adapters(folders):
    folder, before = folders["siglip"]
    config = recipe(folder)
    config.init = {"subtrees": (("image", ""),), "fresh": ("head/.*",)}
    config.model = {"name": "vit", "pool": "map", "num_classes": 10, **IMAGE}
    config.data.image_size = 30
    config.objective = {"name": "classification"}
    config.optimizer = {"name": "sgd", "lr": 0.1}
    rules = (("encoder/.*/(q|v)/kernel", 2),)
    config.lora = {"rules": rules, "alpha": 4.0, "train": ("head/.*",)}
    run = Program.from_config(config)
    params = jax.device_get(run.init_state().params)
    assert params.pop("head")["kernel"].shape == (24, 10) and params.pop("adapters")
    assert not trees.differences(params, before["image"])


def test_only_the_leaves_that_are_wanted_are_read(folders, monkeypatch):
    read = []
    real = loading.read_tensor
    monkeypatch.setattr(
        loading, "read_tensor", lambda t, *a, **k: read.append(t.shape) or real(t, *a, **k)
    )
    source = open_source(str(folders["siglip"][0]))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    loaded = source.load({"image/pool/probe": place})
    assert loaded.keys() == {"image/pool/probe"} and read == [(1, 1, 24)]
    assert loaded["image/pool/probe"].devices() == {jax.devices()[3]}


def test_a_misfit_with_the_checkpoint_is_listed(folders):
    config = recipe(folders["siglip"][0])
    config.model = {**SPECS["siglip"], "image": {**SPECS["siglip"]["image"], "width": 12}}
    config.data.image_size = 30
    config.optimizer = {"name": "sgd", "lr": 0.1}
    with pytest.raises(ValueError, match="does not fit the model:\n.*image/encoder") as error:
        Program.from_config(config).init_state()
    assert "image/patches/kernel: (10, 10, 3, 12) here, (10, 10, 3, 24)" in str(error.value)


def test_the_recipe_says_how_to_run_it_and_what_it_was_not():
    assert "python train.py --config" in siglip_finetune.__doc__
    assert "Not trained" in siglip_finetune.__doc__
