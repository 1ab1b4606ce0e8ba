# SPDX-License-Identifier: Apache-2.0
"""Rows of conversations: which tokens are supervised, where images go, what is refused."""

import numpy as np
import pytest

from flax_vlm.batch import HOST_KEYS, check_batch
from flax_vlm.data.chat_templates import TEMPLATES
from flax_vlm.data.conversations import ConversationPreprocess, answer_of_tokens, fit
from flax_vlm.data.decode import REASONS
from flax_vlm.data.images import Resize
from flax_vlm.data.pipeline import Dataset
from flax_vlm.data.sources import MemorySource
from flax_vlm.data.text import byte_level, train_bpe

SPECIAL = ("<image>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
WORDS = ["How many circles are there?", "two on the left", "Where is the small one?", "naïve 日本"]
TOKENIZERS = {
    "byte": byte_level(special=SPECIAL, bos=True),
    "bpe": train_bpe(WORDS * 3, vocab_size=400, special=SPECIAL, bos=True),
}
RNG = np.random.default_rng(0)
RED = np.full((5, 7, 3), (200, 10, 10), np.uint8)
BLUE = np.full((6, 6, 3), (10, 10, 200), np.uint8)


def say(*contents, images=(), **meta):
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]
    return {"images": list(images), "conversation": turns, "meta": meta}


ONE = say("<image>\nHow many circles?", "two", "Where?", "on the left, naïve 日本", images=[RED])


def preprocess(tokenizer="bpe", **fields):
    given = dict(template="short", tokens_per_image=4, num_images=2, text_length=96) | fields
    return ConversationPreprocess(
        image_ops=(Resize(8),), image_size=(8, 8), tokenizer=TOKENIZERS[tokenizer], **given
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_supervised_tokens_are_the_answers_and_their_ends(tokenizer, template):
    made = preprocess(tokenizer, template=template, text_length=600)
    row = made(ONE, RNG)
    ids = row["text"][row["loss_mask"]]
    written = made.tokenizer._chat.decode(ids.tolist(), skip_special_tokens=False)
    expected = "".join(made.rendered(ONE).text[a:b] for a, b in made.rendered(ONE).spans)
    assert written == expected and "two" in written
    assert row["text_mask"][row["loss_mask"]].all()


def test_every_image_becomes_its_number_of_placeholders_where_its_marker_stands():
    made = preprocess(template="vicuna_v1", text_length=300)
    two = say("<image> or <image>?", "the first", images=[RED, BLUE])
    ids = made(two, RNG)["text"].tolist()
    marker = made.tokenizer.id_of("<image>")
    places = [n for n, index in enumerate(ids) if index == marker]
    assert len(places) == 8 and places[3] - places[0] == 3 and places[4] > places[3] + 1
    images = made(two, RNG)["images"]
    assert images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(images[:, 0, 0], [(200, 10, 10), (10, 10, 200)])


def test_samples_with_and_without_images_share_a_batch_of_the_contract():
    examples = [ONE, say("Are you there?", "yes"), say("<image>", "a", images=[BLUE])]
    dataset = Dataset(source=MemorySource(examples), preprocess=preprocess())
    with dataset.ordered(batch_size=4) as batches:
        batch = next(batches)
    assert check_batch({k: v for k, v in batch.items() if k not in HOST_KEYS}) == 4
    np.testing.assert_array_equal(batch["example_mask"], [True, True, True, False])
    assert not batch["images"][1].any() and batch["images"][2, 0].any()


def test_a_prompt_is_padded_on_the_left_and_ends_where_the_answer_begins():
    row, prompt = preprocess()(ONE, RNG), preprocess(prompts=True)(ONE, RNG)
    assert "loss_mask" not in prompt and prompt["text_mask"][-1] and not prompt["text_mask"][0]
    asked = prompt["text"][prompt["text_mask"]]
    np.testing.assert_array_equal(asked, row["text"][: len(asked)])
    last = np.flatnonzero(row["loss_mask"])
    begins = last[np.flatnonzero(np.diff(last) > 1)[-1] + 1]
    assert len(asked) == begins


def test_blind_rows_have_the_same_text_without_images():
    row = preprocess(blind=True)(ONE, RNG)
    marker = preprocess().tokenizer.id_of("<image>")
    seen = preprocess()(ONE, RNG)
    assert "images" not in row and marker not in row["text"]
    assert row["loss_mask"].sum() == seen["loss_mask"].sum()


def test_an_answer_that_does_not_fit_whole_is_not_learnt_and_the_cut_is_counted():
    whole = preprocess()(ONE, RNG)
    first = np.flatnonzero(np.diff(np.flatnonzero(whole["loss_mask"])) > 1)[0] + 1
    length = int(whole["text_mask"].sum()) - 1
    row = preprocess(text_length=length)(ONE, RNG)
    assert row["text_truncated"] and row["example_mask"] and row["loss_mask"].sum() == first
    assert not whole["text_truncated"]
    lost = preprocess(text_length=10)(ONE, RNG)
    assert not lost["example_mask"] and REASONS[lost["broken"]] == "text_too_long"


def test_fit_keeps_answers_that_end_inside():
    assert fit([5, 6, 7, 8], [0, 1, 1, 2], 3) == ([5, 6, 7], [0, 1, 1])
    assert fit([5, 6, 7, 8], [0, 1, 1, 1], 3) == ([5, 6, 7], [0, 0, 0])


def test_an_image_that_cannot_be_read_masks_its_row(tmp_path):
    row = preprocess()(say("<image>", "a", images=[tmp_path / "none.png"]), RNG)
    assert not row["example_mask"] and REASONS[row["broken"]] == "unreadable"
    assert row["text_mask"].any() and not row["loss_mask"].any()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (say("<image>", "a", id=17), "conversation 17 must have one <image> per image .* got 1 m"),
        (say("Hello", "a", images=[RED]), "begins 'Hello' must have one .* 0 markers and 1 images"),
        (say(*["<image><image><image>", "a"], images=[RED] * 3), "at most 2 images, got 3"),
        (say("<image>", images=[RED], id="x"), "conversation 'x': .* turn of the assistant"),
    ],
)
def test_conversations_that_are_wrong_are_named(example, message):
    with pytest.raises(ValueError, match=message):
        preprocess()(example, RNG)


def test_a_prompt_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="the prompt must fit into 10 tokens, got"):
        preprocess(prompts=True, text_length=10)(ONE, RNG)


def test_a_token_across_the_border_of_an_answer_is_an_error_that_names_it():
    rendered = preprocess().rendered(ONE)
    start = rendered.spans[0][0]
    with pytest.raises(ValueError, match="it: tokens must not lie across the border of an answer"):
        answer_of_tokens(rendered, [(start - 1, start + 1)], "it")
    with pytest.raises(ValueError, match="it: answer 1 has no token of its own"):
        answer_of_tokens(rendered, [(0, 1)], "it")


def test_a_tokenizer_without_the_marker_is_refused():
    with pytest.raises(ValueError, match="the tokenizer must have the token '<image>'"):
        ConversationPreprocess((), (8, 8), byte_level(), 64, "short", 4)
