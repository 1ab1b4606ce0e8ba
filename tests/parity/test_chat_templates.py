# SPDX-License-Identifier: Apache-2.0
"""Our table of chat templates against the jinja templates of the checkpoints, by transformers."""

import json

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from flax_vlm.data.chat_templates import TEMPLATES, render
from flax_vlm.data.conversations import ConversationPreprocess
from flax_vlm.data.hf_tokenizers import TextRecipe, load_chat_tokenizer
from flax_vlm.data.jinja_templates import load_template
from flax_vlm.data.jinja_writer import jinja_source
from flax_vlm.data.text import byte_level
from tests.data.test_jinja_templates import LLAVA

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


@pytest.mark.parametrize("begins", ["tokenizer", "template", "neither"])
def test_prompts_of_a_llava_begin_as_its_processor_has_them(begins, tmp_path):
    inner = Tokenizer.from_str(byte_level(bos=True, special=("<image>",)).to_json())
    inner.no_padding()
    inner.post_processor = None
    if begins != "neither":
        inner.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    inner.save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {}}))
    source = "{{ bos_token }}" * (begins == "template") + LLAVA
    (tmp_path / "chat_template.jinja").write_text(source)
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(),
        AutoTokenizer.from_pretrained(tmp_path),
        patch_size=112,
        vision_feature_select_strategy="full",
        chat_template=source,
    )
    image = Image.new("RGB", (8, 8))
    turn = {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}],
    }
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
    [wanted] = theirs.apply_chat_template([[turn]], **options)["input_ids"]
    ours = ConversationPreprocess(
        (), (8, 8), load_chat_tokenizer(tmp_path).tokenizer, 0, load_template(tmp_path), 4,
        prompts=True,
    )  # fmt: skip
    example = {"images": [image], "conversation": [{"role": "user", "content": "<image>\nWhat?"}]}
    assert ours.tokens(example)[0] == list(wanted)
    assert (wanted[0] == 2) == (begins != "neither")
