# SPDX-License-Identifier: Apache-2.0
"""Our table of chat templates against the jinja templates of the checkpoints, by transformers."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flax_vlm.data.chat_templates import TEMPLATES, render
from flax_vlm.data.hf_tokenizers import TextRecipe
from flax_vlm.data.jinja_writer import jinja_source
from flax_vlm.data.text import byte_level

USER = [
    {"role": "user", "content": "<image>\nHow many things?  "},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "Where?"},
]
ANSWER = {"role": "assistant", "content": "on the left, naïve 日本"}
SYSTEM = {"role": "system", "content": "Be brief."}
JINJA = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == "
        "'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content']"
        " | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = "
        "messages[0]['content'] %}{% else %}{% set turns = messages %}{% set system = false %}"
        "{% endif %}{% for message in turns %}{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
        "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
}


def stripped(turns):
    # chatml's own template keeps white space around a content, ours strips it everywhere
    return [{**turn, "content": turn["content"].strip()} for turn in turns]


# Gemma's template refuses a system message, and so does ours
CASES = [(name, system) for name in JINJA for system in (False, True)]
CASES.remove(("gemma", True))


@pytest.mark.parametrize(("template", "system"), CASES)
def test_texts_and_prompts_are_those_of_the_checkpoints_own_template(template, system):
    inner = byte_level()._chat
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    turns = [SYSTEM, *USER] if system else USER
    given = stripped(turns) if template == "chatml" else turns
    given = {"chat_template": JINJA[template], "conversation": given, "tokenize": False}
    prompt = theirs.apply_chat_template(**given, add_generation_prompt=True)
    ends = {"bos": "<s>", "eos": "</s>"}
    assert render(turns, template, prompt=True, **ends).text == prompt
    given["conversation"] = [*given["conversation"], ANSWER]
    whole = theirs.apply_chat_template(**given)
    assert render([*turns, ANSWER], template, **ends).text == whole


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_written_template_gives_transformers_the_token_ids_that_we_train_on(
    template, system, tmp_path
):
    t = TEMPLATES[template]
    if system and t.system is None and t.first_user is None:
        pytest.raises(ValueError, render, [SYSTEM, *USER], template)
        return
    ours = byte_level(bos=True, special=("<image>", "<|im_start|>", "<|im_end|>"))
    TextRecipe(ours, 64, uses_mask=True, chat=True).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(jinja_source(template))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turns = [SYSTEM, *USER] if system else USER
    for given, prompt in ((turns, True), ([*turns, ANSWER], False)):
        ends = {name: ours.special(name) for name in ("bos", "eos")}
        ids, _ = ours.encode_chat(render(given, template, prompt=prompt, **ends).text)
        found = theirs.apply_chat_template(given, add_generation_prompt=prompt, return_dict=True)
        assert found["input_ids"] == ids
        # as processors take contents
        parts = [{**turn, "content": in_parts(turn["content"])} for turn in given]
        found = theirs.apply_chat_template(parts, add_generation_prompt=prompt, return_dict=True)
        assert found["input_ids"] == ids


def in_parts(content):
    before, marker, after = content.rpartition("<image>\n")
    return [{"type": "image"}] * bool(marker) + [{"type": "text", "text": before + after}]
