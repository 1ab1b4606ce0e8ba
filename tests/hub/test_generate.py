# SPDX-License-Identifier: Apache-2.0
"""`generate` of loaded models: folders of LLaVA and of language models; no torch."""

import numpy as np
import pytest

import flax_vlm
from flax_vlm.build import build
from flax_vlm.convert.saving import save_pretrained
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.data.text import byte_level
from flax_vlm.hub.answering import conversation, image_lists
from flax_vlm.models import MODELS
from flax_vlm.trees import map_with_path
from tests.data.test_jinja_templates import CHATML
from tests.hub.folders import random_params

TOKENIZER = byte_level(bos=True, special=("<image>", "<|im_start|>", "<|im_end|>"), multiple=8)
DECODER = {
    "vocab_size": TOKENIZER.vocab_size,
    "width": 32,
    "depth": 2,
    "mlp_dim": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "length": 400,
}
LLAVA = {
    "name": "llava",
    "image": {
        "name": "vit",
        "width": 24,
        "depth": 2,
        "mlp_dim": 48,
        "num_heads": 3,
        "image_size": 28,
        "patch_size": 14,
        "pre_norm": True,
        "patch_bias": False,
        "activation": "quick_gelu",
        "norm_eps": 1e-5,
        "head_bias": False,
    },
    "connector": {"name": "mlp"},
    "language_model": DECODER,
    "image_token_id": TOKENIZER.id_of("<image>"),
    "feature_layer": 1,
}
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, shape, dtype=np.uint8) for shape in [(40, 30, 3), (28, 28, 3)]]


def write(folder, spec, model_type):
    # what stands far away must weigh as much as the last token, or all answers are alike
    params = map_with_path(
        lambda path, x: np.asarray(x) * (4 if "/attention/" in path else 1), random_params(spec)
    )
    save_pretrained(folder, spec, params, model_type=model_type)
    TextRecipe(TOKENIZER, length=400, uses_mask=True).save(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return flax_vlm.load(write(tmp_path_factory.mktemp("llava"), LLAVA, "llava"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    spec = {"name": "language_model", **DECODER}
    return flax_vlm.load(write(tmp_path_factory.mktemp("lm"), spec, "llama"))


def test_an_answer_is_the_most_probable_continuation_of_its_prompt(llava):
    written = llava.generate(IMAGES[:1], ["What?"], max_new_tokens=5, template="short")[0]
    pixels = llava.processor.images(IMAGES[:1])[:, None]
    ids, _ = TOKENIZER.encode_chat("Q: <image>\nWhat? A:")
    marker, tokens = TOKENIZER.id_of("<image>"), []
    ids = [i for index in ids for i in ([index] * 4 if index == marker else [index])]
    for _ in range(5):
        text = np.array([ids + tokens], np.int32)
        logits = llava.predict("logits", {"text": text, "images": pixels})
        tokens.append(int(logits[0, -1].argmax()))
    expected = TOKENIZER.decode(tokens).strip()
    assert written == expected and expected


def test_answers_do_not_depend_on_what_else_is_in_the_batch(llava):
    prompts = ["What?", "Is there <image> more here than before?", "And without a picture?"]
    images = [IMAGES[0], IMAGES[1], None]
    together = llava.generate(images, prompts, max_new_tokens=6)
    alone = [
        llava.generate([i], [p], max_new_tokens=6)[0] for i, p in zip(images, prompts, strict=True)
    ]
    assert together == alone and len(set(together)) == 3
    other = llava.generate([IMAGES[1]], prompts[:1], max_new_tokens=6)
    assert other != together[:1], "the image matters"


def test_a_conversation_goes_on(llava):
    turns = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Where?"},
    ]
    whole = llava.generate([IMAGES[0]], [turns], max_new_tokens=6)
    assert whole != llava.generate([IMAGES[0]], ["Where?"], max_new_tokens=6)


def test_the_checkpoints_own_template_comes_first(tmp_path):
    folder = write(tmp_path, {"name": "language_model", **DECODER}, "llama")
    (folder / "chat_template.jinja").write_text(CHATML)
    vlm = flax_vlm.load(folder)
    own = vlm.generate(None, ["Hello"], max_new_tokens=6)
    assert own == vlm.generate(None, ["Hello"], max_new_tokens=6, template="chatml")
    assert own != vlm.generate(None, ["Hello"], max_new_tokens=6, template="vicuna_v1")


def test_a_language_model_writes_without_images(text_model):
    assert len(text_model.generate(None, ["Hello", "a b c"], max_new_tokens=4)) == 2
    with pytest.raises(ValueError, match="this model reads text alone, got images"):
        text_model.generate([IMAGES[0]], ["What?"])
    with pytest.raises(ValueError, match="this model reads text alone, it takes no images"):
        text_model.processor.image_batch(IMAGES)


@pytest.mark.parametrize(
    ("images", "prompts", "options", "message"),
    [
        ([None], ["<image> what?"], {}, "conversation 0 must have one <image> per image"),
        ([IMAGES], ["<image> what?"], {}, "got 1 markers and 2 images"),
        ([IMAGES[0]], ["a", "b"], {}, "images must have one entry per prompt"),
        ([b"no image"], ["a"], {}, "an image of prompt 0 could not be read"),
        (None, ["a"], {"max_new_tokens": 390}, "must fit into the model's context of 400 tokens"),
        (None, ["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (None, ["a"], {"template": "nonsense"}, "unknown chat template 'nonsense'"),
        (None, [[{"role": "assistant", "content": "a"}]], {}, "must take turns|must end with"),
    ],
)
def test_what_cannot_be_answered_is_explained(llava, images, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        llava.generate(images, prompts, **options)


def test_an_image_encoder_cannot_generate(tmp_path):
    from tests.hub.folders import write_folder

    vlm = flax_vlm.load(write_folder(tmp_path, "vit")[0])
    with pytest.raises(ValueError, match="generate needs a language model, this is a ViTClass"):
        vlm.generate(None, ["a"])


def test_images_stand_in_front_where_no_marker_says_otherwise():
    assert conversation("What?", 2)[0]["content"] == "<image>\n<image>\nWhat?"
    assert conversation("A <image>?", 1)[0]["content"] == "A <image>?"
    assert image_lists([1, None, [2, 3]], 3) == [[1], [], [2, 3]]


def test_a_word_looks_where_the_token_before_it_does(llava):
    answer = "red ox"
    found = llava.word_attention(IMAGES[0], "What?", answer, template="short")
    assert [word for word, _ in found] == ["red", "ox"]
    text = llava.processor.tokenizer.encode_chat("Q: <image>\nWhat? A: red ox")[0]
    marker = LLAVA["image_token_id"]
    at = text.index(marker)
    text = np.array([*text[:at], *[marker] * 4, *text[at + 1 :]])[None]
    pixels = llava.processor.images(IMAGES[:1])[:, None]
    weights = llava.predict("text_attention", {"text": text, "images": pixels})[0]
    assert weights.shape == (text.shape[1],) * 2
    looks = weights[:, at : at + 4]  # a token per byte, a space belongs to the word behind it
    for (_, seen), first, last in ((found[0], -8, -4), (found[1], -4, -1)):
        expected = looks[first : last or None].mean(axis=0).reshape(2, 2)  # one token earlier
        np.testing.assert_allclose(seen, expected, atol=1e-6)
    maps = np.stack([seen for _, seen in found])
    assert np.ptp(maps) > 0.01 and (maps > 0).all()


def test_the_own_answer_is_looked_at_where_none_is_given(llava):
    answer = llava.generate(IMAGES[:1], ["What?"])[0]
    own, given = (llava.word_attention(IMAGES[0], "What?", a) for a in (None, answer))
    assert [token for token, _ in own] == [token for token, _ in given]


def test_latents_have_no_places_in_the_image(text_model):
    resampler = {"num_latents": 2, "depth": 1, "num_heads": 2, "head_dim": 8}
    spec = {**LLAVA, "connector": {"name": "resampler", "resampler": resampler}}
    model = build(MODELS, spec, "model")
    assert model.token_grid is None
    assert build(MODELS, LLAVA, "model").token_grid == (2, 2)
    shuffled = {**LLAVA, "connector": {"name": "pixel_shuffle"}}
    assert build(MODELS, shuffled, "model").token_grid == (1, 1)
    with pytest.raises(ValueError, match="visual tokens have places in the image"):
        text_model.word_attention(IMAGES[0], "What?")
