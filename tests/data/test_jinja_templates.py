# SPDX-License-Identifier: Apache-2.0
"""Templates of checkpoints: the same texts and spans as ours, and what they may not do."""

import json

import pytest

from flax_vlm.data.chat_templates import TEMPLATES, render
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.data.jinja_templates import JinjaTemplate, load_template
from flax_vlm.data.text import byte_level

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as the hub's LLaVA 1.5 has it
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for content in message['content'] if content['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }} "
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TURNS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "on the left"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", [TURNS, [SYSTEM, *TURNS]], ids=["plain", "system"])
def test_a_template_of_a_checkpoint_gives_the_text_and_spans_of_ours(turns, prompt):
    assert JinjaTemplate(CHATML).render(turns, prompt=prompt) == render(
        turns, "chatml", prompt=prompt
    )


def test_contents_in_parts_are_given_in_parts():
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A"}]
    rendered = JinjaTemplate(LLAVA).render(turns)
    assert rendered.text == "USER: <image>\nWhat? ASSISTANT: A "
    assert [rendered.text[a:b] for a, b in rendered.spans] == [" A"]
    asked = JinjaTemplate(LLAVA).render(turns, prompt=True)
    assert asked.text == "USER: <image>\nWhat? ASSISTANT:" and asked.spans == ()


def test_the_tokenizers_own_tokens_are_given():
    template = JinjaTemplate("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    assert template.render(TURNS[:1], bos="<s>", eos="</s>", prompt=True).text == "<s>How many?</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    drops = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}"
    with pytest.raises(ValueError, match="x must not change earlier turns when one is added"):
        JinjaTemplate(drops + "{% endif %}{% endfor %}", "x").render(TURNS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system here') }}", "x: no system here"),
        ("{% for %}", "x: "),
        (
            "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
            "x: .*unsafe",
        ),
        ("{{ messages.append(1) }}", "x: .*unsafe"),
    ],
)
def test_a_template_that_refuses_is_broken_or_reaches_out_of_the_sandbox_is_an_error(
    source, message
):
    with pytest.raises(ValueError, match=message):
        JinjaTemplate(source, "x").render(TURNS[:1], prompt=True)


def test_turns_are_checked_before_a_template_sees_them():
    with pytest.raises(ValueError, match="must take turns"):
        JinjaTemplate(CHATML).render(TURNS[1:])


def test_the_first_file_with_a_template_is_read(tmp_path):
    assert load_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert load_template(tmp_path) is None
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_template(tmp_path).source == "D"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert load_template(tmp_path).source == "J"
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_template(tmp_path).source == CHATML
    assert "chat_template.jinja" in load_template(tmp_path).name
    assert "checkpoint" not in TEMPLATES


@pytest.mark.parametrize("sees", [False, True])
def test_a_language_model_alone_writes_its_begin_token_itself(sees, tmp_path):
    trained = byte_level(bos=True)
    TextRecipe(trained, 64, uses_mask=True).save(tmp_path)  # puts <bos> in front
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {}} if sees else {}))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_template(tmp_path).source == "{{ bos_token }}" * sees + CHATML
    for written in ("<bos>", "{{ bos_token }}"):
        (tmp_path / "chat_template.jinja").write_text(written + CHATML)
        assert load_template(tmp_path).source == written + CHATML, "not twice"
