# SPDX-License-Identifier: Apache-2.0
"""Our chat templates as Jinja texts, for folders that transformers loads.

    render(conversation, template).text == the Jinja text, rendered by transformers

What holds for one holds for the other: contents are stripped, user and assistant take turns, a
system message that the template has no place for is an error. The begin and end tokens are written
out, so the tokenizer of such a folder puts nothing around a text.

Contents are texts with "<image>" in them, or the parts that transformers takes, [{"type": "image"},
{"type": "text", "text": ...}]: there an image is its marker and a newline, as in answering.py.
"""

from __future__ import annotations

import json
import re

from flax_vlm.data.chat_templates import IMAGE_MARKER, TEMPLATES, ChatTemplate
from flax_vlm.data.jinja_templates import WRITTEN_HERE, JinjaTemplate

_CONTENT = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content | trim -}}
  {%- else -%}
    {%- set found = namespace(text="") -%}
    {%- for part in content -%}
      {%- set image = MARKER if part["type"] == "image" else "" -%}
      {%- set found.text = found.text ~ image ~ part.get("text", "") -%}
    {%- endfor -%}
    {{- found.text | trim -}}
  {%- endif -%}
{%- endmacro -%}
"""
_TURNS = """\
{%- set system, turns = DEFAULT, messages -%}
{%- if messages and messages[0]["role"] == "system" -%}
  GIVEN
{%- endif -%}
BEGIN
{%- for turn in turns -%}
  {%- if turn["role"] != ["user", "assistant"][loop.index0 % 2] -%}
    {{- raise_exception("user and assistant must take turns, the user first") -}}
  {%- endif -%}
  {%- set content = text_of(turn["content"]) -%}
  {%- if turn["role"] == "user" -%}
    USER
  {%- else -%}
    ANSWER
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT{%- endif -%}
"""
_SYSTEM = '{%- set system, turns = text_of(messages[0]["content"]), messages[1:] -%}'
_NO_SYSTEM = '{{- raise_exception("this chat template has no system message") -}}'
_PLACES = {"{}": "content", "{system}": "system", "{bos}": "bos_token", "{eos}": "eos_token"}


def jinja_source(template: str | ChatTemplate | JinjaTemplate) -> str:
    """Returns the Jinja text of a template; of a checkpoint's own its source.

    Raises:
        KeyError: if it is a name that is not in TEMPLATES.
    """
    if isinstance(template, JinjaTemplate):
        return template.source
    t = TEMPLATES[template] if isinstance(template, str) else template
    begin, user = _pieces(t.begin), _pieces(t.user)
    if t.images_only:
        marker = json.dumps(IMAGE_MARKER)
        user = f"{{%- set content = {marker} * content.count({marker}) -%}}{user}"
    if t.first_user is not None:
        first = _pieces(t.first_user)
        user = f"{{%- if loop.first and system -%}}{first}{{%- else -%}}{user}{{%- endif -%}}"
    elif t.system is not None:
        system = _pieces(t.system.replace("{}", "{system}"))
        begin += f"{{%- if system -%}}{system}{{%- endif -%}}"
    has_system = t.system is not None or t.first_user is not None
    parts = {
        "DEFAULT": json.dumps(t.default_system),
        "GIVEN": _SYSTEM if has_system else _NO_SYSTEM,
        "BEGIN": begin,
        "USER": user,
        "ANSWER": _pieces(t.assistant + t.answer + t.after),
        "ASSISTANT": _pieces(t.assistant),
        "MARKER": json.dumps(f"{IMAGE_MARKER}\n"),
    }
    filled = re.compile(r"\b(" + "|".join(parts) + r")\b")
    return WRITTEN_HERE + filled.sub(lambda found: parts[found.group()], _CONTENT + _TURNS)


def _pieces(form: str) -> str:
    """Returns Jinja that prints a form: its literal texts and what stands in its places."""
    pieces = re.split("(" + "|".join(map(re.escape, _PLACES)) + ")", form)
    printed = (_PLACES.get(piece) or json.dumps(piece) for piece in pieces if piece)
    return "".join(f"{{{{- {value} -}}}}" for value in printed)
