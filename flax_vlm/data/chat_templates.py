# SPDX-License-Identifier: Apache-2.0
r"""Conversations as one text, and which of its characters a model is trained to say.

    [{"role": "user", "content": "<image>\nHow many?"}, {"role": "assistant", "content": "two"}]

    vicuna_v1:  A chat between ... USER: <image>\nHow many? ASSISTANT: two</s>
    supervised:                                                       ^^^^^^^^

What is supervised is said in characters, by whoever writes the text; nothing is searched for and no
lengths of tokens are added up, which is where masks of other code go wrong (LLaVA issues 661, 1166:
"tokenization mismatch"). A prompt ends where the next answer begins. "{bos}" and "{eos}" stand for
the tokenizer's own tokens.

Sources: LLaVA 1.5, conversation.py (plain, vicuna_v1); the chat templates in the tokenizer configs
of Llama-2-7b-chat-hf, Meta-Llama-3-8B-Instruct, Qwen2-7B-Instruct, gemma-2-2b-it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flax_vlm.build import lookup

Conversation = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")
IMAGE_MARKER = "<image>"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How turns are written. "{}" is the content of a turn.

    Attributes:
        user: a turn of the user.
        assistant: what stands before an answer; a prompt for generation ends with it.
        answer: an answer, its end token included: all of it is supervised.
        after: what stands behind an answer, and is not.
        begin: the start of every text.
        system: a system message; None writes none, and an error if there is one.
        first_user: the first turn of the user where there is a system message, with "{system}";
            then `system` is not used.
        default_system: the system message of conversations without one; "" has none.
        images_only: of the user's turns nothing but image markers is kept.
    """

    user: str
    assistant: str
    answer: str
    after: str = ""
    begin: str = ""
    system: str | None = None
    first_user: str | None = None
    default_system: str = ""
    images_only: bool = False


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES: dict[str, ChatTemplate] = {
    # captions: the first stage of LLaVA
    "plain": ChatTemplate("{}", "", "{}\n", images_only=True),
    # the space belongs to the answer: tokenizers make one token of it and the first word
    "vicuna_v1": ChatTemplate(
        "USER: {} ",
        "ASSISTANT:",
        " {}{eos}",
        begin="{bos}",
        system="{} ",
        default_system=_VICUNA,
    ),
    "llama2": ChatTemplate(
        "{bos}[INST] {} [/INST]",
        "",
        " {} {eos}",
        first_user="{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{} [/INST]",
    ),
    "llama3": ChatTemplate(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>",
        begin="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    ),
    "chatml": ChatTemplate(
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "{}<|im_end|>",
        after="\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        default_system="You are a helpful assistant.",
    ),
    "gemma": ChatTemplate(
        "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n",
        "{}<end_of_turn>",
        after="\n",
        begin="{bos}",
    ),
    # few tokens, for models that learn to speak from nothing
    "short": ChatTemplate("Q: {} ", "A:", " {}{eos}"),
}


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: the whole.
        spans: (start, stop) of the characters of every answer and its end token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render(
    conversation: Conversation,
    template: str | ChatTemplate,
    *,
    bos: str = "",
    eos: str = "",
    prompt: bool = False,
) -> Rendered:
    """Returns the text of a conversation.

    Args:
        conversation: an optional system message, then user and assistant in turns.
        template: a key of TEMPLATES, or one.
        bos: how the tokenizer writes its begin token; "" if it has none.
        eos: likewise its end token.
        prompt: leave the last turn of the assistant out and end where it would begin.

    Raises:
        ValueError: if the template is unknown, roles do not take turns, or there is no turn of the
            assistant to be learnt.
    """
    t = lookup(TEMPLATES, template, "chat template") if isinstance(template, str) else template
    t = _filled(t, bos, eos)
    system, turns = _system(conversation, t)
    if prompt and turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    check_turns(turns, prompt)
    text, spans = t.begin, []
    if system and t.first_user is None:
        text += t.system.replace("{}", system)
    for n, turn in enumerate(turns):
        content = turn["content"].strip()
        if turn["role"] == "user":
            before, after = t.user.split("{}")
            if n == 0 and system and t.first_user is not None:
                before, after = t.first_user.split("{}")
                before = before.replace("{system}", system)
            kept = IMAGE_MARKER * content.count(IMAGE_MARKER) if t.images_only else content
            text += before + kept + after + t.assistant
        else:
            answer = t.answer.replace("{}", content)
            spans.append((len(text), len(text) + len(answer)))
            text += answer + t.after
    return Rendered(text, tuple(spans))


def expand_markers(rendered: Rendered, texts: Sequence[str]) -> Rendered:
    """Returns the text with something else in the place of every image marker.

    Args:
        rendered: with as many markers as there are texts, none of them in an answer.
        texts: what stands there instead, in their order.

    Raises:
        ValueError: if an answer holds a marker.
    """
    parts = rendered.text.split(IMAGE_MARKER)
    text, ends, spans = parts[0], [], rendered.spans
    for part, put in zip(parts[1:], texts, strict=True):
        ends.append(len(text))  # where the marker stood, in the text as it is now
        text += put + part
    for at, put in zip(ends, texts, strict=True):
        shift = len(put) - len(IMAGE_MARKER)
        if any(start <= at < stop for start, stop in spans):
            raise ValueError("an answer must not hold an image marker")
        spans = tuple((a + shift, b + shift) if a > at else (a, b) for a, b in spans)
    return Rendered(text, spans)


def _filled(template: ChatTemplate, bos: str, eos: str) -> ChatTemplate:
    """Returns the template with the tokenizer's own tokens in it."""
    fields = dataclasses.asdict(template)
    strings = {
        k: v.replace("{bos}", bos).replace("{eos}", eos)
        for k, v in fields.items()
        if isinstance(v, str)
    }
    return dataclasses.replace(template, **strings)


def _system(conversation: Conversation, t: ChatTemplate) -> tuple[str, Conversation]:
    """Returns the system message and the other turns."""
    turns = list(conversation)
    if not turns or turns[0]["role"] != "system":
        return t.default_system, turns
    if t.system is None and t.first_user is None:
        raise ValueError("this chat template has no system message, got one; put it into a turn")
    return turns[0]["content"].strip(), turns[1:]


def check_turns(turns: Conversation, prompt: bool) -> None:
    """Raises ValueError if turns cannot be trained on, or answered where they are a prompt."""
    roles = [turn["role"] for turn in turns]
    expected = ["user", "assistant"] * len(roles)
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(f"user and assistant must take turns, the user first, got {roles}")
    if prompt and roles[-1] != "user":
        raise ValueError(f"a prompt must end with a turn of the user, got {roles}")
    if not prompt and "assistant" not in roles:
        raise ValueError(f"a conversation must have a turn of the assistant to learn, got {roles}")
