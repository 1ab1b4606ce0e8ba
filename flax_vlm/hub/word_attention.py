# SPDX-License-Identifier: Apache-2.0
r"""Which patches of an image a word looked at: what `LoadedModel.word_attention` does.

    Q: <image>\nHow many? A: two<eos>
    |  |------------|         |           the row of the token before "two", its columns of <image>

A word of the prompt looks when it is read: the rows of its own tokens. A word of the answer was
chosen one token earlier, from what the token before it saw: those rows are taken. Rows of a word of
several tokens are averaged.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from flax import linen as nn

from flax_vlm.data.chat_templates import IMAGE_MARKER, Rendered
from flax_vlm.data.conversations import ConversationPreprocess
from flax_vlm.data.jinja_templates import JinjaTemplate
from flax_vlm.data.text import Tokenizer
from flax_vlm.hub import answering
from flax_vlm.models.llava import Llava
from flax_vlm.nn.connectors import LinearConnector, MlpConnector

_TOKEN_PER_PATCH = (LinearConnector, MlpConnector)


def check_patches(model: nn.Module) -> None:
    """Raises ValueError if a model's visual tokens are not the patches of one image."""
    if not isinstance(model, Llava):
        raise ValueError(
            f"word_attention needs a language model that sees, this is a {type(model).__name__}"
        )
    merged = None
    if not isinstance(model.connector, _TOKEN_PER_PATCH):
        merged = type(model.connector).__name__
    elif model.compression is not None:
        merged = type(model.compression).__name__
    elif model.newline:
        merged = "tiles with newlines"
    if merged is not None:
        raise ValueError(
            f"word_attention needs one visual token per patch (a linear or mlp connector, no "
            f"compression, one tile), got {merged}: its tokens lie at no place of the image"
        )


def word_batch(
    tokenizer: Tokenizer,
    prompt: answering.Prompt,
    answer: str | None,
    *,
    template: str | JinjaTemplate,
    tokens_per_image: int,
    word: str,
) -> tuple[dict[str, np.ndarray], list[int], list[int]]:
    """Returns ({"text", "text_mask"} [1, L], rows of the word, columns of the image).

    Args:
        tokenizer: of the model.
        prompt: see answering.conversation; has one image.
        answer: what the model said; None leaves the prompt alone.
        template: a key of chat_templates.TEMPLATES, or a checkpoint's own.
        tokens_per_image: P.
        word: is looked for in prompt and answer; the last one counts.

    Raises:
        ValueError: if the word is not there, or stands in front of the image.
    """
    turns = answering.conversation(prompt, 1)
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    writer = ConversationPreprocess(
        image_ops=(),
        image_size=(1, 1),
        tokenizer=tokenizer,
        text_length=0,
        template=template,
        tokens_per_image=tokens_per_image,
        prompts=answer is None,
    )
    rendered = writer.rendered({"images": [None], "conversation": turns})
    ids, offsets = tokenizer.encode_chat(rendered.text)
    marker = tokenizer.id_of(IMAGE_MARKER)
    counts = [tokens_per_image if index == marker else 1 for index in ids]
    at = np.cumsum([0, *counts])  # of every token in the expanded text
    first = at[ids.index(marker)]
    rows = [int(at[n + 1] - 1 - chosen) for n, chosen in _tokens_of(rendered, offsets, word)]
    if min(rows) < first + tokens_per_image - 1:
        raise ValueError(
            f"{word!r} must stand behind the image, a token sees only what comes before it; put "
            f"{IMAGE_MARKER} in front of it"
        )
    text = np.repeat(ids, counts)
    length = len(text) + -len(text) % answering.MULTIPLE
    padded = np.pad(text, (0, length - len(text)), constant_values=tokenizer.pad_id)
    batch = {
        "text": padded[None].astype(np.int32),
        "text_mask": np.arange(length)[None] < len(text),
    }
    return batch, rows, list(range(first, first + tokens_per_image))


def _tokens_of(rendered: Rendered, offsets: Any, word: str) -> list[tuple[int, bool]]:
    """Returns (number of the token, is it of an answer?) of the last place of a word."""
    # the marker is one token, its letters are no word
    text = rendered.text.replace(IMAGE_MARKER, " " * len(IMAGE_MARKER))
    found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    if not word.strip() or not found:
        raise ValueError(f"the word must be one of the text {rendered.text!r}, got {word!r}")
    start, stop = found[-1]
    answered = any(a <= start < b for a, b in rendered.spans)
    return [(n, answered) for n, (a, b) in enumerate(offsets) if a < stop and b > start]
