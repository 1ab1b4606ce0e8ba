# SPDX-License-Identifier: Apache-2.0
"""Which patches a word looked at: the rows and columns of text_attention that are taken."""

import dataclasses

import numpy as np
import pytest

import flax_vlm
from flax_vlm.batch import normalize_image
from flax_vlm.build import build
from flax_vlm.models import MODELS
from flax_vlm.models.attention_maps import text_attention
from tests.hub.folders import write_folder
from tests.hub.test_generate import IMAGES, LLAVA, TOKENIZER, write

MARKER = TOKENIZER.id_of("<image>")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    # two rows and three columns of patches: neither can stand for the other
    spec = {**LLAVA, "image": {**LLAVA["image"], "image_size": (28, 42)}}
    return flax_vlm.load(write(tmp_path_factory.mktemp("llava"), spec, "llava"))


def changed(vlm, **fields):
    model = build(MODELS, {**vlm.config["model"].to_dict(), **fields}, "model")
    return dataclasses.replace(vlm, objective=dataclasses.replace(vlm.objective, model=model))


def weights_of(vlm, text):
    """Returns the ids of a text, a token per byte, and its attention [L, L]."""
    ids, _ = TOKENIZER.encode_chat(text)
    number = vlm.model.tokens_per_image
    ids = [i for index in ids for i in ([index] * number if index == MARKER else [index])]
    pixels = vlm.processor.images(IMAGES[:1])[:, None]
    images = normalize_image(pixels, vlm.objective.image_mean, vlm.objective.image_std)
    seen = text_attention(vlm.model, vlm.params, np.array([ids], np.int32), images)
    return ids, np.asarray(seen)[0]


def test_a_word_of_the_question_looks_when_it_is_read(vlm):
    found = vlm.word_attention(IMAGES[0], "Big ox or ox?", "ox", template="short")
    ids, weights = weights_of(vlm, "Q: <image>\nBig ox or ox? A:")
    last = len(ids) - len("ox? A:")
    first = ids.index(MARKER)
    wanted = weights[last : last + 2, first : first + 6].mean(axis=0)
    assert found.shape == (2, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.reshape(2, 3), atol=1e-6)
    assert found.std() > 1e-4, "patches differ"


def test_a_word_of_the_answer_looks_when_it_is_chosen(vlm):
    found = vlm.word_attention(IMAGES[0], "An ox?", "ox", answer="One ox.", template="short")
    ids, weights = weights_of(vlm, "Q: <image>\nAn ox? A: One ox.")
    first, last = ids.index(MARKER), len(ids) - len("ox.")
    wanted = weights[last - 1 : last + 1, first : first + 6].mean(axis=0)
    np.testing.assert_allclose(found, wanted.reshape(2, 3), atol=1e-6)


def test_class_tokens_that_the_language_model_sees_are_no_patches(vlm):
    whole = changed(vlm, keep_prefix=True)
    found = whole.word_attention(IMAGES[0], "An ox?", "ox", template="short")
    ids, weights = weights_of(whole, "Q: <image>\nAn ox? A:")
    first, last = ids.index(MARKER), len(ids) - len("ox? A:")
    wanted = weights[last : last + 2, first + 1 : first + 7].mean(axis=0)
    np.testing.assert_allclose(found, wanted.reshape(2, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "word", "message"),
    [
        ("An ox?", "o", "the word must be one of the text .*got 'o'"),
        ("An ox?", " ", "the word must be one of the text"),
        ("An ox?", "image", "the word must be one of the text .*got 'image'"),
        ("An ox <image>?", "ox", "'ox' must stand behind the image"),
        ("<image> <image> ox?", "ox", "must have one <image> per image"),
    ],
)
def test_a_word_that_is_not_there_or_cannot_have_looked_is_an_error(vlm, prompt, word, message):
    with pytest.raises(ValueError, match=message):
        vlm.word_attention(IMAGES[0], prompt, word, template="short")


RESAMPLER = {"num_latents": 6, "depth": 1, "num_heads": 2, "head_dim": 4}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"connector": {"name": "resampler", "resampler": RESAMPLER}}, "ResamplerConnector"),
        ({"compression": {"name": "average_pool"}}, "got AveragePool"),
        ({"newline": True}, "tiles with newlines"),
    ],
)
def test_visual_tokens_that_are_no_patches_are_refused(vlm, changes, found):
    with pytest.raises(ValueError, match=f"one visual token per patch.*{found}"):
        changed(vlm, **changes).word_attention(IMAGES[0], "An ox?", "ox")


def test_a_model_without_a_language_model_has_no_words(tmp_path):
    other = flax_vlm.load(write_folder(tmp_path, "siglip")[0])
    with pytest.raises(ValueError, match="needs a language model that sees, this is a SigLIP"):
        other.word_attention(IMAGES[0], "An ox?", "ox")
