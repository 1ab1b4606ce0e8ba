# SPDX-License-Identifier: Apache-2.0
"""Folders of LLaVA-NeXT, OneVision and Idefics3: pictures of any size to answers, as transformers
does it with its own processors."""

import functools
import pathlib
import tempfile

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

import flax_vlm
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.data.text import byte_level
from flax_vlm.hub.answering import prompt_batch
from tests.parity.llava_models import clip, siglip, text
from tests.parity.reference import TOLERANCE, error, randomise

TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
SPECIAL = ("<image>", "<fake_token_around_image>", "<global-img>", *TILES)
TOKENIZER = byte_level(bos=True, special=SPECIAL, multiple=8)
MARKER = TOKENIZER.id_of("<image>")
GRIDS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 84]]
SIZES = [(30, 50), (61, 20), (90, 70), (9, 7), (28, 56), (83, 90), (33, 100), (57, 56)]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
PROMPT = "Q: <image>\nWhat? A:"


def decoder(config):
    return text(config, vocab_size=TOKENIZER.vocab_size, max_position_embeddings=2048)


def make_next():
    config = hf.LlavaNextConfig(
        vision_config=clip(),
        text_config=decoder(hf.LlamaConfig),
        image_token_index=MARKER,
        image_grid_pinpoints=GRIDS,
    )
    side = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images = LlavaNextImageProcessorPil(**side, image_grid_pinpoints=GRIDS)
    return hf.LlavaNextForConditionalGeneration(config), images


def make_onevision():
    # SigLIP's features of the last layer, and rows that are shrunk where there are many
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=decoder(hf.Qwen2Config),
        image_token_index=MARKER,
        image_grid_pinpoints=GRIDS,
        vision_aspect_ratio="anyres_max_4",
    )
    side = {"height": 28, "width": 28}
    images = LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=GRIDS)
    return hf.LlavaOnevisionForConditionalGeneration(config), images


def make_idefics3():
    tower = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    config = hf.Idefics3Config(
        vision_config={**tower, "image_size": 28, "patch_size": 7},
        text_config=decoder(hf.LlamaConfig),
        image_token_id=MARKER,
        scale_factor=2,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 84}, max_image_size={"longest_edge": 28}
    )
    return hf.Idefics3ForConditionalGeneration(config), images


MAKE = {"next": make_next, "onevision": make_onevision, "idefics3": make_idefics3}


@functools.cache
def case(name):
    """Returns (model of transformers, its image processor, ours, the folder)."""
    torch.manual_seed(0)
    model, images = MAKE[name]()
    randomise(model)
    folder = pathlib.Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    TextRecipe(TOKENIZER, length=2048, uses_mask=True).save(folder)
    return model, images, flax_vlm.load(folder), folder


def expanded(name, images, prepared, number):
    """Returns the prompts with transformers' own count of tokens per picture."""
    tokens = hf.PreTrainedTokenizerFast(tokenizer_file=str(case(name)[3] / "tokenizer.json"))
    tokens.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    if name == "idefics3":
        processor = hf.Idefics3Processor(images, tokens, image_seq_len=4)
    elif name == "next":
        processor = hf.LlavaNextProcessor(
            images,
            tokens,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    else:
        # made by hand: with its video processor it needs torchvision
        processor = object.__new__(hf.LlavaOnevisionProcessor)
        processor.image_processor, processor.image_token = images, "<image>"
        processor.num_image_tokens, processor.vision_aspect_ratio = 4, "anyres_max_4"
        processor.vision_feature_select_strategy = "full"
    return [processor.replace_image_token(prepared, n) for n in range(number)]


def theirs_and_ours(name, pictures):
    _, images, vlm, _ = case(name)
    nested = [[p] for p in pictures] if name == "idefics3" else pictures
    extra = {"return_row_col_info": True} if name == "idefics3" else {}
    prepared = images(nested, return_tensors="pt", **extra)
    texts = expanded(name, images, prepared, len(pictures))
    ids = [TOKENIZER.encode_chat(PROMPT.replace("<image>", t))[0] for t in texts]
    batch = prompt_batch(
        vlm.processor,
        pictures,
        ["What?"] * len(pictures),
        template="short",
        tokens_per_image=vlm.model.tokens_per_image,
    )
    return prepared, ids, batch


@pytest.mark.parametrize("name", list(MAKE))
def test_pixels_and_tokens_are_those_of_transformers(name):
    prepared, ids, batch = theirs_and_ours(name, PICTURES)
    recipe = case(name)[2].processor.image_recipe
    expected = np.asarray(prepared["pixel_values"]).transpose(0, 1, 3, 4, 2)
    for n, row in enumerate(ids):
        assert batch["text"][n][batch["text_mask"][n]].tolist() == row, SIZES[n]
        number = recipe.num_tiles(SIZES[n], True)
        found = (batch["images"][n, :number] / 255.0 - recipe.mean) / recipe.std
        np.testing.assert_allclose(found, expected[n, :number], atol=1e-5)
    counts = {recipe.num_tiles(size, True) for size in SIZES}
    assert len(counts) >= 3, counts


@pytest.mark.parametrize("name", list(MAKE))
def test_logits_and_answers_about_pictures_of_any_size_are_those_of_transformers(name):
    model, _, vlm, _ = case(name)
    pictures = PICTURES[:7]
    prepared, _, batch = theirs_and_ours(name, pictures)
    for drop in ("rows", "cols", "batch_num_images"):
        prepared.pop(drop, None)
    mask = torch.from_numpy(batch["text_mask"])
    given = {"input_ids": torch.from_numpy(batch["text"]).long(), "attention_mask": mask.long()}
    with torch.no_grad():
        expected = model(**given, **prepared).logits[mask]
        answers = model.generate(**given, **prepared, max_new_tokens=6, do_sample=False)
    found = vlm.predict("logits", batch)[batch["text_mask"]]
    assert error(found, expected) <= TOLERANCE
    written = vlm.generate(pictures, ["What?"] * 7, max_new_tokens=6, template="short")
    new = answers[:, batch["text"].shape[1] :].numpy()
    stop = TOKENIZER.eos_id
    for row, text_ in zip(new, written, strict=True):
        ends = np.flatnonzero(row == stop)
        assert text_ == TOKENIZER.decode(row[: ends[0]] if len(ends) else row).strip()


@pytest.mark.parametrize("name", list(MAKE))
def test_an_export_cuts_pictures_as_its_origin_did(name, tmp_path):
    _, _, vlm, folder = case(name)
    vlm.save_pretrained(tmp_path / "out")
    again = flax_vlm.load(tmp_path / "out")
    assert again.processor.image_recipe == vlm.processor.image_recipe
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    given = hf.AutoConfig.from_pretrained(folder)
    for key in ("image_grid_pinpoints", "vision_aspect_ratio"):
        assert getattr(config, key, None) == getattr(given, key, None)
    images = [PICTURES[5]]
    assert again.generate(images, ["What?"], 4) == vlm.generate(images, ["What?"], 4)


@pytest.mark.parametrize("name", list(MAKE))
def test_tiles_have_no_map_of_their_own(name):
    with pytest.raises(ValueError, match="needs an image of one tile, 2 x 2 visual tokens, got"):
        case(name)[2].word_attention(PICTURES[0], "What?", "two", template="short")
