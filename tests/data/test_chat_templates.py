# SPDX-License-Identifier: Apache-2.0
"""Conversations as text: known strings, and spans that hold the answers with their ends."""

import pytest

from flax_vlm.data.chat_templates import TEMPLATES, render

TWO = [
    {"role": "user", "content": "<image>\nHow many?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "on the left"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
ENDS = {"bos": "<s>", "eos": "</s>"}
WRITTEN = {
    "plain": "<image>two\non the left\n",
    "vicuna_v1": (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nHow many? ASSISTANT: two</s>USER: Where? ASSISTANT: on the left</s>"
    ),
    "llama2": (
        "<s>[INST] <image>\nHow many? [/INST] two </s><s>[INST] Where? [/INST] on the left </s>"
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nHow many?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\non the left<|eot_id|>"
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nHow many?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\non the left<|im_end|>\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\n<image>\nHow many?<end_of_turn>\n"
        "<start_of_turn>model\ntwo<end_of_turn>\n<start_of_turn>user\nWhere?<end_of_turn>\n"
        "<start_of_turn>model\non the left<end_of_turn>\n"
    ),
    "short": "Q: <image>\nHow many? A: two</s>Q: Where? A: on the left</s>",
}
END = {"plain": "\n", "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_is_written_as_its_model_was_trained(template):
    assert render(TWO, template, **ENDS).text == WRITTEN[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_spans_hold_the_answers_and_their_end_tokens_and_nothing_else(template):
    rendered = render(TWO, template, **ENDS)
    said = [rendered.text[a:b] for a, b in rendered.spans]
    end = END.get(template, "</s>")
    assert [text.removesuffix(end).strip() for text in said] == ["two", "on the left"]
    assert all(text.endswith(end) for text in said)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_ends_where_the_answer_begins(template):
    whole, prompt = render(TWO, template, **ENDS), render(TWO, template, **ENDS, prompt=True)
    assert prompt.text == whole.text[: whole.spans[-1][0]]
    assert prompt.spans == whole.spans[:-1]
    assert render(TWO[:3], template, **ENDS, prompt=True) == prompt


def test_a_system_message_goes_where_the_template_has_it():
    assert render([SYSTEM, *TWO], "llama2", **ENDS).text.startswith(
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nHow many? [/INST] two </s>"
    )
    assert render([SYSTEM, *TWO], "chatml").text.startswith("<|im_start|>system\nBe brief.<")
    assert render([SYSTEM, *TWO], "vicuna_v1").text.startswith("Be brief. USER: <image>")
    with pytest.raises(ValueError, match="this chat template has no system message"):
        render([SYSTEM, *TWO], "gemma", **ENDS)


def test_what_a_person_writes_is_no_template():
    turns = [{"role": "user", "content": "{eos} {} {bos}"}, {"role": "assistant", "content": "{}"}]
    assert render(turns, "short", **ENDS).text == "Q: {eos} {} {bos} A: {}</s>"
    system = {"role": "system", "content": "Answer as {} or {system}."}
    assert render([system, *turns], "llama2", **ENDS).text == (
        "<s>[INST] <<SYS>>\nAnswer as {} or {system}.\n<</SYS>>\n\n{eos} {} {bos} [/INST] {} </s>"
    )


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TWO[:1], "must have a turn of the assistant to learn, got .'user'."),
        ([], "user and assistant must take turns"),
        (TWO[1:], "user and assistant must take turns, the user first"),
        ([TWO[0], TWO[0], TWO[1]], "user and assistant must take turns"),
        ([{"role": "robot", "content": "beep"}], "user and assistant must take turns"),
    ],
)
def test_turns_that_cannot_be_learnt_are_refused(turns, message):
    with pytest.raises(ValueError, match=message):
        render(turns, "short")


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown chat template 'vicuna', choose one of .*chatml"):
        render(TWO, "vicuna")
