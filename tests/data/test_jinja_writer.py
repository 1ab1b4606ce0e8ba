# SPDX-License-Identifier: Apache-2.0
"""Our templates as Jinja texts write what `render` writes; transformers: tests/parity."""

import pytest

from flax_vlm.data.chat_templates import TEMPLATES, render
from flax_vlm.data.jinja_templates import JinjaTemplate
from flax_vlm.data.jinja_writer import jinja_source

TURNS = [
    {"role": "user", "content": "  <image>\nHow <image> many {system} {bos}? "},
    {"role": "assistant", "content": 'two "x" \\n naïve'},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "left "},
]
SYSTEM = {"role": "system", "content": " Be brief. "}
ENDS = {"bos": "<s>", "eos": "</s>"}
HAS_SYSTEM = [k for k, t in TEMPLATES.items() if t.system or t.first_user]


def written(name):
    return JinjaTemplate(jinja_source(name), name)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_written_template_gives_the_text_of_ours(name, prompt):
    ours = render(TURNS, name, prompt=prompt, **ENDS)
    assert written(name).render(TURNS, prompt=prompt, **ENDS).text == ours.text
    if name in HAS_SYSTEM:
        ours = render([SYSTEM, *TURNS], name, prompt=prompt, **ENDS)
        assert written(name).render([SYSTEM, *TURNS], prompt=prompt, **ENDS) == ours


@pytest.mark.parametrize("name", [k for k in TEMPLATES if k not in HAS_SYSTEM])
def test_a_system_message_without_a_place_is_refused_by_both(name):
    for template in (TEMPLATES[name], None):
        with pytest.raises(ValueError, match="this chat template has no system message"):
            if template is None:
                written(name).render([SYSTEM, *TURNS])
            else:
                render([SYSTEM, *TURNS], template)


def test_turns_that_do_not_alternate_are_refused_by_the_template_itself():
    with pytest.raises(ValueError, match="user and assistant must take turns"):
        written("short")._text([TURNS[0], TURNS[2]], "", "")


def test_parts_are_written_with_images_in_front_as_a_question_is():
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": " What?"}]
    text = written("short")._text([{"role": "user", "content": parts}], "", "")
    assert text == "Q: <image>\n<image>\n What? "


def test_the_template_of_a_checkpoint_is_written_as_it_is():
    assert jinja_source(JinjaTemplate("{{ messages }}")) == "{{ messages }}"
