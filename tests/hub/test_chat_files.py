# SPDX-License-Identifier: Apache-2.0
"""What an exported language model has for talking; that transformers agrees: tests/integration."""

import dataclasses
import json

import numpy as np
import pytest

import flax_vlm
from flax_vlm.build import build
from flax_vlm.data.jinja_templates import load_template
from flax_vlm.hub.chat_files import NAMES, chat_files
from flax_vlm.models import MODELS
from tests.data.test_jinja_templates import LLAVA as TEMPLATE
from tests.hub.folders import write_folder
from tests.hub.test_generate import DECODER, IMAGES, LLAVA, TOKENIZER, write

PROMPTS = ["What?", "And <image> here?"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return flax_vlm.load(write(tmp_path_factory.mktemp("llava"), LLAVA, "llava"))


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_an_exported_model_answers_as_before_in_its_own_template(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    again = flax_vlm.load(tmp_path)
    data = again.config["data"]
    assert (data["chat"]["template"], data["text"]["tokenizer"]) == ("checkpoint", "chat")
    wanted = llava.generate(IMAGES, PROMPTS, max_new_tokens=6)
    assert again.generate(IMAGES, PROMPTS, max_new_tokens=6) == wanted and any(wanted)
    again.save_pretrained(tmp_path / "twice")
    for name in NAMES:
        assert (tmp_path / name).read_text() == (tmp_path / "twice" / name).read_text()


def test_the_processor_counts_visual_tokens_as_the_model_does(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    found = read(tmp_path, "processor_config.json")
    assert found["vision_feature_select_strategy"] == "default"
    # 2 x 2 patches of 14, and the class token that "default" takes off again
    assert (found["patch_size"], found["num_additional_image_tokens"]) == (14, 1)


def test_all_tokens_that_end_an_answer_are_stated(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    stops = [TOKENIZER.eos_id, TOKENIZER.id_of("<|im_end|>")]
    assert read(tmp_path, "generation_config.json") == {
        "bos_token_id": TOKENIZER.bos_id, "eos_token_id": stops, "pad_token_id": TOKENIZER.pad_id,
    }  # fmt: skip


def test_a_checkpoints_own_template_stays_its_own(tmp_path):
    folder = write(tmp_path, LLAVA, "llava")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    flax_vlm.load(folder).save_pretrained(tmp_path / "out")
    # its tokenizer wrote the begin token, ours leaves it to the template
    assert load_template(tmp_path / "out").source == "{{ bos_token }}" + TEMPLATE


def test_a_language_model_alone_is_exported_and_leaves_nothing_of_a_llava(llava, tmp_path):
    llava.save_pretrained(tmp_path / "out")
    folder = write(tmp_path, {"name": "language_model", **DECODER}, "llama")
    alone = flax_vlm.load(folder)
    assert alone.save_pretrained(tmp_path / "out") == "llama"
    assert not {"processor_config.json", "preprocessor_config.json"} & {
        p.name for p in (tmp_path / "out").iterdir()
    }
    again = flax_vlm.load(tmp_path / "out")
    asked = ["Hello", "a b c"]
    answers = alone.generate(None, asked, max_new_tokens=5)
    assert again.generate(None, asked, max_new_tokens=5) == answers
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "AutoTokenizer" in card
    assert "Its language model has width 32, 2 layers" in card and "It sees" not in card


def test_the_card_of_a_model_that_sees_shows_how_to_ask_it(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoModelForImageTextToText" in card
    assert "It sees images of 28 x 28 pixels in patches of 14 x 14" in card


def test_the_processors_of_other_formats_are_left_to_their_class(llava):
    config = {"vision_feature_select_strategy": "default"}
    found = {kind: chat_files(llava, kind, config) for kind in ("llava_next", "llava_onevision")}
    assert '"LlavaNextProcessor"' in found["llava_next"]["processor_config.json"]
    assert "processor_config.json" not in found["llava_onevision"]


def test_patches_that_are_not_square_are_refused(llava):
    image = {**LLAVA["image"], "patch_size": (14, 7)}
    model = build(MODELS, {**LLAVA, "image": image}, "model")
    changed = dataclasses.replace(
        llava, objective=dataclasses.replace(llava.objective, model=model)
    )
    with pytest.raises(ValueError, match="LlavaProcessor needs square patches, got 14 x 7"):
        chat_files(changed, "llava", {})


def test_an_encoder_has_no_chat_files(tmp_path):
    vlm = flax_vlm.load(write_folder(tmp_path / "in", "siglip")[0])
    assert chat_files(vlm, "siglip", {}) == {}
    vlm.save_pretrained(tmp_path / "out")
    assert not set(NAMES) & {p.name for p in (tmp_path / "out").iterdir()}
    assert np.isfinite(flax_vlm.load(tmp_path / "out").embed_text(["a cat"])).all()
