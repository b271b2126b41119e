"""The chat template, cut where the answer goes."""

from __future__ import annotations

import pytest

import tiny
from densereward.errors import InvalidRequest, ModelError
from densereward.tokenization.chat_template import ChatTemplate

QUESTION = [{"role": "user", "content": "Why?"}]


def template(text: str) -> ChatTemplate:
    return ChatTemplate(tiny.make_tokenizer(template=text))


def test_the_prompt_ends_where_the_answer_begins_and_the_rest_closes_it() -> None:
    chat = template(tiny.CHATML)
    assert chat.prompt(QUESTION) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.closing == "<|im_end|>\n"


def test_what_the_template_writes_before_an_answer_belongs_to_the_prompt() -> None:
    thinking = tiny.CHATML.replace("{{ message['content'] }}", "<think></think>{{ message['content'] }}")
    assert template(thinking).prompt(QUESTION).endswith("assistant\n<think></think>")


def test_a_dialogue_of_several_turns_is_rendered_whole() -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "Because."}, {"role": "user", "content": "Really?"}]
    assert template(tiny.CHATML).prompt(turns).count("<|im_end|>") == 3


def test_a_template_that_strips_white_space_is_noticed() -> None:
    assert not template(tiny.CHATML).strips
    assert template(tiny.CHATML.replace("message['content']", "message['content'] | trim")).strips
    assert template(tiny.CHATML.replace("message['content']", "' ' + message['content'] | trim + ' '")).strips


def test_a_template_that_refuses_a_dialogue_says_why() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.CHATML
    with pytest.raises(InvalidRequest, match="no system turn"):
        template(strict).prompt([{"role": "system", "content": "Be kind."}, *QUESTION])


def test_a_template_that_breaks_on_a_dialogue_says_so() -> None:
    breaks = "{% if messages | length > 2 %}{{ messages[0]['parts'].size() }}{% endif %}" + tiny.CHATML
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        template(breaks).prompt([*QUESTION, {"role": "assistant", "content": "So."}, *QUESTION])


def test_a_template_that_leaves_the_answer_out_is_refused() -> None:
    with pytest.raises(ModelError, match="leaves out the assistant's answer"):
        template("{{ messages[0]['content'] }}")


def test_a_template_that_closes_answers_in_two_ways_is_refused_where_it_does() -> None:
    moody = tiny.CHATML + "{% if messages | length > 2 %}!{% endif %}"
    turns = [*QUESTION, {"role": "assistant", "content": "So."}, *QUESTION]
    with pytest.raises(InvalidRequest, match="closes an answer with"):
        template(moody).prompt(turns)
