# SPDX-License-Identifier: Apache-2.0
"""From the `data` node of a config to a tokenizer and a Preprocess, for experiments and the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax_vlm.build import build, lookup
from flax_vlm.data.chat_templates import TEMPLATES
from flax_vlm.data.conversations import ConversationPreprocess
from flax_vlm.data.hf_tokenizers import load_chat_tokenizer, load_tokenizer
from flax_vlm.data.images import IMAGE_OPS, pair
from flax_vlm.data.jinja_templates import JinjaTemplate, load_template
from flax_vlm.data.packing import PackedPreprocess
from flax_vlm.data.pipeline import Preprocess
from flax_vlm.data.sources import Source
from flax_vlm.data.text import Tokenizer, byte_level, train_bpe
from flax_vlm.snapshots import find_folder

# Captions that a tokenizer is trained on, spread over the source.
_MAX_CAPTIONS = 20_000


def build_tokenizer(text: Mapping[str, Any], source: Callable[[], Source]) -> Tokenizer:
    """Returns the tokenizer of a config.

    Args:
        text: `data.text`: tokenizer "bpe" (trained on the captions), "byte", "file" (`path` of a
            tokenizer.json), "pretrained" (`path` of a checkpoint folder in the Hugging Face format,
            or a hub id; of captions) or "chat" (the same, of a language model); vocab_size, lower,
            bos, special.
        source: opens the source of captions; called only where one is trained.

    Raises:
        ValueError: for an unknown tokenizer; lists the choices.
    """

    def bpe(vocab_size: int, **settings: Any) -> Tokenizer:
        examples = source()
        stride = max(1, len(examples) // _MAX_CAPTIONS)
        texts = (_text_of(examples[i]) for i in range(0, len(examples), stride))
        return train_bpe(texts, vocab_size=vocab_size, multiple=8, **settings)

    def byte(vocab_size: int, **settings: Any) -> Tokenizer:
        return byte_level(multiple=8, **settings)

    def file(path: str) -> Tokenizer:
        return Tokenizer.load(path)

    def pretrained(path: str) -> Tokenizer:
        return load_tokenizer(find_folder(path)).tokenizer

    def chat(path: str) -> Tokenizer:
        return load_chat_tokenizer(find_folder(path)).tokenizer

    from_path = {"file": file, "pretrained": pretrained, "chat": chat}
    table = {"bpe": bpe, "byte": byte, **from_path}
    has_path = text["tokenizer"] in from_path
    keys = ("path",) if has_path else ("vocab_size", "lower", "bos", "special")
    spec = {"name": text["tokenizer"], **{key: text[key] for key in keys}}
    return build(table, spec, "data.text.tokenizer")


def _text_of(example: Mapping[str, Any]) -> str:
    if "packed" in example:
        raise ValueError(
            "rows were packed with a tokenizer, no other can be trained on them; set "
            "data.text.tokenizer to 'file' and data.text.path to the tokenizer.json at the index"
        )
    if "conversation" not in example:
        return example["caption"]
    return " ".join(turn["content"] for turn in example["conversation"])


def build_preprocess(
    spec: Mapping[str, Any], tokenizer: Tokenizer, *, train: bool, tokens_per_image: int = 0
) -> Preprocess | ConversationPreprocess | PackedPreprocess:
    """Returns what turns an example into a row.

    Args:
        spec: the `data` node: rows, image_size, train_ops, eval_ops, text.length; chat for
            conversations.
        tokenizer: of the texts.
        train: with the operations of training (`train_ops`), or of evaluation (`eval_ops`);
            conversations then end where the last answer begins.
        tokens_per_image: visual tokens of an image, where a language model sees them.

    Raises:
        ValueError: if there are no such rows; lists the choices.
    """
    ops = spec["train_ops" if train else "eval_ops"]
    given = {
        "image_ops": tuple(build(IMAGE_OPS, op, "image op") for op in ops),
        "image_size": pair(spec["image_size"]),
        "tokenizer": tokenizer,
        "text_length": spec["text"]["length"],
    }
    make = lookup(ROWS, spec["rows"], "data.rows")
    if make is not Preprocess:
        chat = {**spec["chat"], "template": chat_template(spec["chat"]["template"], spec["text"])}
        given |= {"tokens_per_image": tokens_per_image, "prompts": not train, **chat}
    return make(**given)


def chat_template(name: str, text: Mapping[str, Any]) -> str | JinjaTemplate:
    """Returns the template of a config.

    Args:
        name: a key of chat_templates.TEMPLATES, or "checkpoint".
        text: `data.text`, whose `path` is the checkpoint then.

    Raises:
        ValueError: if the checkpoint has no template.
    """
    if name != "checkpoint":
        return name
    folder = find_folder(text["path"])
    found = load_template(folder)
    if found is None:
        raise ValueError(
            f"{folder} has no chat template of its own; set data.chat.template to one of "
            f"{sorted(TEMPLATES)}"
        )
    return found


def _packed(*, prompts: bool, **given: Any) -> ConversationPreprocess | PackedPreprocess:
    """Returns what makes packed rows; questions of an evaluation are not packed."""
    inner = ConversationPreprocess(prompts=prompts, **given)
    return inner if prompts else PackedPreprocess(inner)


ROWS: dict[str, Callable[..., Any]] = {
    "captions": Preprocess,
    "conversations": ConversationPreprocess,
    "packed": _packed,
}
