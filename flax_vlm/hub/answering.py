# SPDX-License-Identifier: Apache-2.0
r"""Prompts and images to text: what `LoadedModel.generate` does.

"What is this?" + image -> [{"role": "user", "content": "<image>\\nWhat is this?"}]
-> left-padded tokens, in the chat template of the model -> answer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_vlm.data.chat_templates import IMAGE_MARKER
from flax_vlm.data.conversations import ConversationPreprocess
from flax_vlm.data.hf_images import ImageRecipe
from flax_vlm.data.images import BrokenImage, read_image
from flax_vlm.data.jinja_templates import JinjaTemplate
from flax_vlm.data.tiles import Layout
from flax_vlm.hub.processor import Processor

GIVEN = ("text", "text_mask", "images", "visual_index", "visual_weight")  # to the model
MULTIPLE = 64  # lengths of prompts are rounded up to it: they share compiled programs
# tokens that end an answer besides the tokenizer's own end token, where the vocabulary has them
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<end_of_utterance>")
Prompt = str | Sequence[Mapping[str, str]]


def conversation(prompt: Prompt, images: int) -> list[dict[str, str]]:
    """Returns a prompt as turns that hold one marker per image.

    Args:
        prompt: a question, or the turns so far, the last one of the user. Without a marker, images
            stand in front of the first turn of the user.
        images: how many images belong to it.
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [dict(turn) for turn in given]
    if images and not any(IMAGE_MARKER in turn["content"] for turn in turns):
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is not None:
            first["content"] = f"{IMAGE_MARKER}\n" * images + first["content"]
    return turns


def image_lists(images: Sequence[Any] | None, prompts: int) -> list[list[Any]]:
    """Returns the images of every prompt: `images` has one image, a list of them or None each.

    Raises:
        ValueError: if their number is another.
    """
    if images is None:
        return [[] for _ in range(prompts)]
    if len(images) != prompts:
        raise ValueError(
            f"images must have one entry per prompt (an image, a list of them, or None), got "
            f"{len(images)} for {prompts} prompts"
        )
    return [
        [] if entry is None else list(entry) if isinstance(entry, list | tuple) else [entry]
        for entry in images
    ]


def prompt_batch(
    processor: Processor,
    images: Sequence[Any] | None,
    prompts: Sequence[Prompt],
    *,
    template: str | JinjaTemplate,
    tokens_per_image: int,
) -> dict[str, np.ndarray]:
    """Returns the batch that the prediction "generate" takes.

    Args:
        processor: with a tokenizer, and an image recipe where the model sees.
        images: see `image_lists`.
        prompts: see `conversation`.
        template: a key of chat_templates.TEMPLATES, or a checkpoint's own.
        tokens_per_image: visual tokens of an image; 0 for a model of text alone.

    Raises:
        ValueError: if the model takes no images and there are some, one cannot be read, or markers
            and images differ in number; names the prompt.
    """
    lists = [_pictures(row, n) for n, row in enumerate(image_lists(images, len(prompts)))]
    count = max(map(len, lists), default=0)
    if count and not tokens_per_image:
        raise ValueError(f"this model reads text alone, got images for {len(prompts)} prompts")
    examples = [
        {"images": some, "conversation": conversation(prompt, len(some)), "meta": {"id": n}}
        for n, (prompt, some) in enumerate(zip(prompts, lists, strict=True))
    ]
    preprocess = conversation_preprocess(processor, template, tokens_per_image, lists)
    longest = max(len(preprocess.tokens(example)[0]) for example in examples)
    preprocess = dataclasses.replace(preprocess, text_length=longest + -longest % MULTIPLE)
    rng = np.random.default_rng(0)  # operations of evaluation draw nothing from it
    rows = [preprocess(example, rng) for example in examples]
    keys = [key for key in GIVEN if key in rows[0] and (count or key != "images")]
    return {key: np.stack([row[key] for row in rows]) for key in keys}


def _pictures(images: Sequence[Any], prompt: int) -> list[np.ndarray]:
    try:
        return [read_image(image)[0] for image in images]
    except BrokenImage as error:
        raise ValueError(f"an image of prompt {prompt} could not be read: {error}") from error


def conversation_preprocess(
    processor: Processor,
    template: str | JinjaTemplate,
    tokens_per_image: int,
    images: Sequence[Sequence[np.ndarray]],
) -> ConversationPreprocess:
    """Returns what makes prompts of conversations; its text_length is 0.

    Args:
        processor: see `prompt_batch`.
        template: see `prompt_batch`.
        tokens_per_image: see `prompt_batch`.
        images: of every prompt, [h, w, 3] uint8; rows have room for those of each of them.
    """
    recipe, count = processor.image_recipe, max(map(len, images), default=0)
    seen: dict[str, Any] = {"image_ops": (), "image_size": (1, 1), "num_images": count}
    if count:
        seen["image_size"] = recipe.image_size
    if count and isinstance(recipe, ImageRecipe):
        seen["image_ops"] = recipe.build_ops()
    elif count:
        seen |= {"layout": recipe, "num_images": max(_num_tiles(recipe, row) for row in images)}
    return ConversationPreprocess(
        **seen,
        tokenizer=processor.tokenizer,
        text_length=0,
        template=template,
        tokens_per_image=tokens_per_image,
        prompts=True,
        blind=not tokens_per_image,
    )


def _num_tiles(layout: Layout, images: Sequence[np.ndarray]) -> int:
    return sum(layout.num_tiles(image.shape[:2], len(images) == 1) for image in images)


def answered_batch(
    processor: Processor,
    image: Any,
    prompt: Prompt,
    answer: str,
    *,
    template: str | JinjaTemplate,
    tokens_per_image: int,
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Returns (a batch of one row: the prompt with its answer; positions of the answer's tokens).

    Args:
        processor: see `prompt_batch`.
        image: that the prompt is about.
        prompt: see `conversation`.
        answer: what is answered.
        template: see `prompt_batch`.
        tokens_per_image: see `prompt_batch`.
    """
    images = _pictures([image], 0)
    preprocess = dataclasses.replace(
        conversation_preprocess(processor, template, tokens_per_image, [images]), prompts=False
    )
    turns = [*conversation(prompt, 1), {"role": "assistant", "content": answer}]
    example = {"images": images, "conversation": turns, "meta": {"id": 0}}
    ids, answers = preprocess.tokens(example)
    row = dataclasses.replace(preprocess, text_length=len(ids))(example, np.random.default_rng(0))
    last = max(answers)
    batch = {key: row[key][None] for key in GIVEN if key in row}
    return batch, [n for n, answer in enumerate(answers) if answer == last]


def stop_ids(processor: Processor) -> tuple[int, ...]:
    """Returns the ids of the tokens that end an answer."""
    tokenizer = processor.tokenizer
    found = [tokenizer.id_of(token) for token in TURN_ENDS]
    return (tokenizer.eos_id, *(index for index in found if index is not None))


def text_of(processor: Processor, tokens: np.ndarray, stops: Sequence[int]) -> str:
    """Returns the text in front of the first stop token."""
    ends = np.flatnonzero(np.isin(tokens, stops))
    return processor.tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens).strip()
