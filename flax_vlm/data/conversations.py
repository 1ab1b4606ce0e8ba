# SPDX-License-Identifier: Apache-2.0
r"""Conversations with images to rows of a batch: the one place where they become tokens.

    content     <image>\nHow many? | two
    text        Q: <image>\nHow many? A: two<eos>
    tokens      Q : <i> <i> <i> <i> \n How many ? A : two <eos>     one <i> per visual token
    loss_mask   . .  .   .   .   .   .  .   .   . . .  1    1

The whole text is cut into tokens once, and a token is supervised if its characters lie in an
answer. A token that lies half in one cannot be: that is an error that names the example, never a
loss of zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_vlm.data.chat_templates import IMAGE_MARKER, Rendered, expand_markers, render
from flax_vlm.data.decode import REASONS, BrokenImage
from flax_vlm.data.images import ImageOp, read_image
from flax_vlm.data.jinja_templates import JinjaTemplate
from flax_vlm.data.text import Tokenizer
from flax_vlm.data.tiles import Layout, Size, row_places

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ConversationPreprocess:
    """Makes rows of examples {"images": [...], "conversation": [...]}; any number of images up to
    `num_images`, none included.

    Attributes:
        image_ops: called in order on [H, W, 3] uint8; the result must have `image_size`.
        image_size: (height, width) of the rows' images.
        tokenizer: knows the token "<image>".
        text_length: L, visual tokens included.
        template: a key of chat_templates.TEMPLATES, or a checkpoint's own.
        tokens_per_image: visual tokens of an image.
        num_images: I; with a layout, tiles of all pictures of a row.
        layout: pictures are cut into tiles, instead of `image_ops`; rows then say which visual
            token a marker stands for. None makes one image of each.
        prompts: rows are prompts, padded on the left, that end where the last answer begins.
        blind: images and their markers are left out.
        background: RGB in 0..255, seen through transparent pixels.
    """

    image_ops: Sequence[ImageOp]
    image_size: tuple[int, int]
    tokenizer: Tokenizer
    text_length: int
    template: str | JinjaTemplate
    tokens_per_image: int
    num_images: int = 1
    prompts: bool = False
    blind: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    layout: Layout | None = None

    def __post_init__(self):
        if not self.blind and self.tokenizer.id_of(IMAGE_MARKER) is None:
            raise ValueError(
                f"the tokenizer must have the token {IMAGE_MARKER!r}, it has not; add it to "
                f"data.text.special"
            )

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> Row:
        """Returns the row of an example.

        Args:
            example: "images", "conversation" and what else there is.
            rng: all randomness of the image operations.

        Returns:
            "images" [I, H, W, 3] uint8, not where the rows are blind; "text" [L] int32; "text_mask"
            [L] bool; "visual_index" and "visual_weight" of a layout; "loss_mask" [L] bool, not for
            prompts; "example_mask" [] bool, False if an
            image is broken or no answer fits; "broken" [] int8, a position in REASONS;
            "text_truncated" [] bool, answers at the end were cut off.

        Raises:
            ValueError: if markers and images differ in number, an answer lies across tokens, a
                prompt is too long, or the image operations end with another size.
        """
        try:
            pictures, reason = self._pictures(example)
        except BrokenImage as error:
            return self._empty(error.reason)
        sizes = [picture.shape[:2] for picture in pictures]
        ids, supervised = self.tokens(example, sizes)
        images = self._images(pictures, rng, _name(example))
        if self.prompts:
            row = self._prompt_row(ids, images, reason, example)
            return self._with_places(row, sizes)
        kept, supervised = fit(ids, supervised, self.text_length)
        if not any(supervised):
            return self._empty("text_too_long")
        row = self._row(kept, supervised, images, reason, len(kept) < len(ids))
        return self._with_places(row, sizes)

    def padding(self) -> Row:
        """Returns a row that is no example."""
        return self._empty("ok")

    def tokens(
        self, example: Mapping[str, Any], sizes: Sequence[Size] | None = None
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of an example, placeholders expanded, and for each the number of the
        answer that it belongs to, counted from 1, or 0.

        Args:
            example: see `__call__`.
            sizes: of its pictures; None reads them where a layout asks for them.
        """
        rendered, each = self.rendered(example), self.tokens_per_image
        if self.layout is not None and not self.blind:
            if sizes is None:
                sizes = [picture.shape[:2] for picture in self._pictures(example)[0]]
            texts, each = [self.layout.text(size, len(sizes) == 1) for size in sizes], 1
            rendered = expand_markers(rendered, texts)
        ids, offsets = self.tokenizer.encode_chat(rendered.text)
        answers = answer_of_tokens(rendered, offsets, _name(example))
        marker = self.tokenizer.id_of(IMAGE_MARKER)
        counts = [each if index == marker else 1 for index in ids]
        return np.repeat(ids, counts).tolist(), np.repeat(answers, counts).tolist()

    def rendered(self, example: Mapping[str, Any]) -> Rendered:
        """Returns the text of an example, one marker per image.

        Raises:
            ValueError: naming the example.
        """
        conversation = example["conversation"]
        if self.blind:
            conversation = [
                {**turn, "content": turn["content"].replace(IMAGE_MARKER, "")}
                for turn in conversation
            ]
        else:
            markers = sum(turn["content"].count(IMAGE_MARKER) for turn in conversation)
            images = len(example["images"])
            most = self.num_images if self.layout is None else images
            if markers != images or images > most:
                raise ValueError(
                    f"{_name(example)} must have one {IMAGE_MARKER} per image and at most "
                    f"{most} images, got {markers} markers and {images} images"
                )
        tokens = {name: self.tokenizer.special(name) for name in ("bos", "eos")}
        try:
            if isinstance(self.template, JinjaTemplate):
                return self.template.render(conversation, prompt=self.prompts, **tokens)
            return render(conversation, self.template, prompt=self.prompts, **tokens)
        except ValueError as error:
            raise ValueError(f"{_name(example)}: {error}") from error

    def _pictures(self, example: Mapping[str, Any]) -> tuple[list[np.ndarray], str]:
        """Returns the pictures as they are, and a reason if one was mended."""
        pictures, reasons = [], ["ok"]
        for source in () if self.blind else example["images"]:
            picture, reason = read_image(source, background=tuple(self.background))
            pictures.append(picture)
            reasons.append(reason)
        return pictures, next((r for r in reasons if r != "ok"), "ok")

    def _images(
        self, pictures: Sequence[np.ndarray], rng: np.random.Generator, name: str
    ) -> np.ndarray:
        """Returns [I, H, W, 3] uint8."""
        made = [self._made(picture, rng, len(pictures) == 1) for picture in pictures]
        found = np.concatenate([*made, np.zeros((0, *self.image_size, 3), np.uint8)])
        if len(found) > self.num_images:
            raise ValueError(
                f"{name} has pictures of {len(found)} tiles, and rows have room for "
                f"{self.num_images}; raise data.chat.num_images"
            )
        images = np.zeros((self.num_images, *self.image_size, 3), np.uint8)
        images[: len(found)] = found
        return images

    def _made(self, picture: np.ndarray, rng: np.random.Generator, alone: bool) -> np.ndarray:
        if self.layout is not None:
            return self.layout.tiles(picture, alone)
        for op in self.image_ops:
            picture = op(picture, rng)
        if picture.shape != (*self.image_size, 3):
            raise ValueError(
                f"the image operations must end with {(*self.image_size, 3)}, got "
                f"{picture.shape}; end them with a resize or a crop to image_size"
            )
        return picture[None]

    def _with_places(self, row: Row, sizes: Sequence[Size]) -> Row:
        """Returns the row with "visual_index" [L] of a layout, or [L, J] and "visual_weight"."""
        if self.layout is None or self.blind:
            return row
        number = self.layout.num_places
        index = np.zeros((self.text_length, number), np.int32)
        weight = np.zeros((self.text_length, number), np.float32)
        here = np.flatnonzero(row["text"] == self.tokenizer.id_of(IMAGE_MARKER))
        if len(here):
            found = row_places(self.layout, sizes, self.num_images, self.tokens_per_image)
            index[here], weight[here] = (x[: len(here)] for x in found)  # the text may be cut
        if number == 1:
            return row | {"visual_index": index[:, 0]}
        return row | {"visual_index": index, "visual_weight": weight}

    def _prompt_row(
        self, ids: list[int], images: np.ndarray, reason: str, example: Mapping[str, Any]
    ) -> Row:
        if len(ids) > self.text_length:
            raise ValueError(
                f"{_name(example)}: the prompt must fit into {self.text_length} tokens, got "
                f"{len(ids)}; raise data.text.length"
            )
        row = self._row(ids, [0] * len(ids), images, reason, False)
        del row["loss_mask"]
        shift = self.text_length - len(ids)
        return row | {key: np.roll(row[key], shift) for key in ("text", "text_mask")}

    def _row(
        self,
        ids: Sequence[int],
        supervised: Sequence[int],
        images: np.ndarray,
        reason: str,
        truncated: bool,
    ) -> Row:
        text = np.full(self.text_length, self.tokenizer.pad_id, np.int32)
        text_mask, loss_mask = np.zeros((2, self.text_length), bool)
        text[: len(ids)], text_mask[: len(ids)] = ids, True
        loss_mask[: len(ids)] = np.array(supervised) > 0
        row = {"text": text, "text_mask": text_mask, "loss_mask": loss_mask}
        if not self.blind:
            row["images"] = images
        return row | {
            "example_mask": np.bool_(True),
            "broken": np.int8(REASONS.index(reason)),
            "text_truncated": np.bool_(truncated),
        }

    def _empty(self, reason: str) -> Row:
        images = np.zeros((self.num_images, *self.image_size, 3), np.uint8)
        # one token is there all the same: attention over nothing would be NaN
        row = self._row([self.tokenizer.eos_id], [0], images, reason, False)
        if self.prompts:
            del row["loss_mask"]
        return self._with_places(row | {"example_mask": np.bool_(False)}, ())


def _name(example: Mapping[str, Any]) -> str:
    """Returns how an example is called in messages."""
    given = example.get("meta", {}).get("id")
    first = str(example["conversation"][0]["content"])[:60] if example["conversation"] else ""
    return (
        f"conversation {given!r}"
        if given is not None
        else f"the conversation that begins {first!r}"
    )


def answer_of_tokens(
    rendered: Rendered, offsets: Sequence[tuple[int, int]], name: str = "the conversation"
) -> list[int]:
    """Returns for every token the number of the answer that holds it, counted from 1, or 0.

    Args:
        rendered: the text.
        offsets: (start, stop) of the characters of every token.
        name: of the conversation, for messages.

    Raises:
        ValueError: if a token lies across the border of an answer, or an answer has no token.
    """
    answers = [0] * len(offsets)
    for number, (start, stop) in enumerate(rendered.spans, 1):
        for n, (a, b) in enumerate(offsets):
            if a >= start and b <= stop and a < b:
                answers[n] = number
            elif a < start < b or a < stop < b:
                raise ValueError(
                    f"{name}: tokens must not lie across the border of an answer, but "
                    f"{rendered.text[a:b]!r} does, in {rendered.text[start - 10 : stop + 10]!r}; "
                    f"choose a chat template that fits the tokenizer"
                )
        if number not in answers:
            raise ValueError(f"{name}: answer {number} has no token of its own")
    return answers


def fit(ids: list[int], supervised: list[int], length: int) -> tuple[list[int], list[int]]:
    """Returns the tokens that fit and which of them are supervised; an answer that does not fit
    whole is not, because its end would never be learnt.

    Args:
        ids: of the conversation.
        supervised: number of the answer of every token, or 0.
        length: L.
    """
    if len(ids) <= length:
        return ids, supervised
    cut = set(supervised[length:])
    return ids[:length], [0 if number in cut else number for number in supervised[:length]]
