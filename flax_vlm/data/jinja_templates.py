# SPDX-License-Identifier: Apache-2.0
"""The chat template that a checkpoint brings along: a Jinja template, as transformers has them.

Such a template says nothing of what is supervised. An answer is what is added to the text when its
turn is: the text up to the turn, ended where an answer begins, must be how the text with the turn
begins. A template that writes earlier turns anew (some drop the reasoning of old answers) cannot be
trained with, which is an error.

A template is a program of somebody else: it runs in Jinja's sandbox, which keeps it from everything
but the conversation. Source: transformers, utils/chat_template_utils.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import pathlib
import re
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flax_vlm.data.chat_templates import IMAGE_MARKER, Conversation, Rendered, check_turns
from flax_vlm.data.hf_files import read_json
from flax_vlm.data.hf_tokenizers import begin_token

# files that hold one, the first that is there: (name, its key; None is the whole file)
FILES = (
    ("chat_template.jinja", None),
    ("chat_template.json", "chat_template"),
    ("processor_config.json", "chat_template"),
    ("tokenizer_config.json", "chat_template"),
)
# how those that we write begin (jinja_writer.py): they take contents as texts, too
WRITTEN_HERE = "{#- flax_vlm: contents are texts with image markers, or parts -#}\n"
# templates that read contents in parts: [{"type": "image"}, {"type": "text", "text": ...}]
_IN_PARTS = re.compile(r"\[['\"]type['\"]\]|\.type\b")


@dataclasses.dataclass(frozen=True)
class JinjaTemplate:
    """A chat template of a checkpoint.

    Attributes:
        source: the template.
        name: where it is from, for messages.
    """

    source: str
    name: str = "the chat template"

    def render(
        self, conversation: Conversation, *, bos: str = "", eos: str = "", prompt: bool = False
    ) -> Rendered:
        """Returns the text of a conversation; arguments as in chat_templates.render.

        Raises:
            ValueError: if the template refuses the conversation or cannot be read, or earlier turns
                change when later ones are added.
        """
        turns = list(conversation)
        if prompt and turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        system = int(bool(turns) and turns[0]["role"] == "system")
        check_turns(turns[system:], prompt)
        text = self._text(turns, bos, eos, add_generation_prompt=prompt)
        spans = []
        for n, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._text(turns[:n], bos, eos, add_generation_prompt=True)
            answered = self._text(turns[: n + 1], bos, eos).rstrip()
            self._check_begins(answered, before)
            self._check_begins(text, answered)
            spans.append((len(before), len(answered)))
        return Rendered(text, tuple(spans))

    def _check_begins(self, text: str, start: str) -> None:
        if not text.startswith(start):
            raise ValueError(
                f"{self.name} must not change earlier turns when one is added, but it turns "
                f"{start[-60:]!r} into {text[: len(start)][-60:]!r}; choose another template"
            )

    def _text(self, turns: Conversation, bos: str, eos: str, **options: Any) -> str:
        given = turns
        if _IN_PARTS.search(self.source) and not self.source.startswith(WRITTEN_HERE):
            given = [{**turn, "content": _parts(turn["content"])} for turn in turns]
        tokens = {"bos_token": bos, "eos_token": eos}
        try:
            return _compiled(self.source).render(
                messages=given, **{"add_generation_prompt": False, **tokens, **options}
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.name}: {error}") from error


def _parts(content: str) -> list[dict[str, str]]:
    """Returns a content cut at its image markers."""
    parts: list[dict[str, str]] = []
    for n, text in enumerate(content.split(IMAGE_MARKER)):
        if n:
            parts.append({"type": "image"})
        if text.strip("\n"):
            parts.append({"type": "text", "text": text.strip("\n")})
    return parts


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def load_template(folder: pathlib.Path) -> JinjaTemplate | None:
    """Returns the template of a checkpoint folder, None if it has none.

    The processor of a model that sees leaves the begin token to the tokenizer (LLaVA 1.5's template
    has none): then it is written in front here, where the tokenizer adds nothing.

    Raises:
        ValueError: if a file cannot be read.
    """
    for file, key in FILES:
        if not (folder / file).is_file():
            continue
        source = (folder / file).read_text("utf-8") if key is None else read_json(folder, file)
        source = source if key is None else source.get(key)
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if source:
            begin = begin_token(folder) if _sees(folder) else None
            if begin is not None and begin not in source and "bos_token" not in source:
                source = "{{ bos_token }}" + source
            return JinjaTemplate(source, f"the chat template in {folder / file}")
    return None


def _sees(folder: pathlib.Path) -> bool:
    return bool({"vision_config", "mm_vision_tower"} & read_json(folder, "config.json").keys())
