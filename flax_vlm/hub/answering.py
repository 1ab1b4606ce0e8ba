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
from flax_vlm.data.jinja_templates import JinjaTemplate
from flax_vlm.hub.processor import Processor

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
    lists = image_lists(images, len(prompts))
    count = max(map(len, lists), default=0)
    if count and not tokens_per_image:
        raise ValueError(f"this model reads text alone, got images for {len(prompts)} prompts")
    examples = [
        {"images": some, "conversation": conversation(prompt, len(some)), "meta": {"id": n}}
        for n, (prompt, some) in enumerate(zip(prompts, lists, strict=True))
    ]
    preprocess = conversation_preprocess(processor, template, tokens_per_image, count)
    longest = max(len(preprocess.tokens(example)[0]) for example in examples)
    preprocess = dataclasses.replace(preprocess, text_length=longest + -longest % MULTIPLE)
    rng = np.random.default_rng(0)  # operations of evaluation draw nothing from it
    rows = [preprocess(example, rng) for example in examples]
    broken = [n for n, row in enumerate(rows) if not row["example_mask"]]
    if broken:
        raise ValueError(f"the images of the prompts {broken} could not be read")
    keys = ["text", "text_mask", *(["images"] if count else [])]
    return {key: np.stack([row[key] for row in rows]) for key in keys}


def conversation_preprocess(
    processor: Processor, template: str | JinjaTemplate, tokens_per_image: int, num_images: int
) -> ConversationPreprocess:
    """Returns what makes prompts of conversations; its text_length is 0.

    Args:
        processor: see `prompt_batch`.
        template: see `prompt_batch`.
        tokens_per_image: see `prompt_batch`.
        num_images: I.
    """
    recipe = processor.image_recipe
    seen = dict(image_ops=recipe.build_ops(), image_size=recipe.image_size) if num_images else {}
    return ConversationPreprocess(
        **{"image_ops": (), "image_size": (1, 1), **seen},
        tokenizer=processor.tokenizer,
        text_length=0,
        template=template,
        tokens_per_image=tokens_per_image,
        num_images=num_images,
        prompts=True,
        blind=not tokens_per_image,
    )


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
    preprocess = dataclasses.replace(
        conversation_preprocess(processor, template, tokens_per_image, 1), prompts=False
    )
    turns = [*conversation(prompt, 1), {"role": "assistant", "content": answer}]
    example = {"images": [image], "conversation": turns, "meta": {"id": 0}}
    ids, answers = preprocess.tokens(example)
    row = dataclasses.replace(preprocess, text_length=len(ids))(example, np.random.default_rng(0))
    if not row["example_mask"]:
        raise ValueError("the image could not be read")
    last = max(answers)
    batch = {key: row[key][None] for key in ("text", "text_mask", "images")}
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
