"""Alignment and BOS with tokenizers and templates of real families, against the tokenizers themselves."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import families
from densereward.capture import Span
from densereward.errors import InvalidRequest
from densereward.methods.base import Credit, Params
from densereward.scoring.placement import Slots, place, slots_of
from densereward.tokenization.align import Aligned, Aligner
from densereward_client.wire import Sample

LOSSLESS = ["llama", "deepseek", "llama3"]
REWRITING = ["qwen", "bert", "mon"]
FAMILIES = [*LOSSLESS, *REWRITING]
READERS = families.ReadOnce(FAMILIES, lambda family: Aligner(families.load(family), 4096, 200_000))

TEXTS = [
    "",
    "Thank you, that was a wonderful evening.",
    "Schöne Grüße aus Zürich: 10 Äpfel, süß & saftig",
    "東京は今日も晴れです。",
    "👩‍👩‍👧 and 😀👍🏽",
    "e\u0301\u0300 cafe\u0301 nai\u0308ve",
    "def add(a, b):\n\treturn a + b\n\n\n\tpass",
    "  two blanks before, three behind   ",
    "\n\t \u200b ﬁne ½",
]
text = (
    st.lists(
        st.sampled_from([*TEXTS, " ", "\n", "\t", "a", "ß", "京", "👩‍👩‍👧", "\u0301"]) | st.text(max_size=3), max_size=6
    )
    .map("".join)
    .filter(lambda written: not {"▁", "\ufffd"} & {*written})
)

SYSTEM = {"role": "system", "content": "Be kind, and be brief."}
QUESTION = {"role": "user", "content": "Why is the sky blue?"}
FIRST_TURN = [QUESTION, {"role": "assistant", "content": "Air scatters blue light most."}]
DIALOGUES = {
    "a question": [QUESTION],
    "two turns": [*FIRST_TURN, {"role": "user", "content": "Und am Abend?"}],
    "three turns": [*FIRST_TURN, *FIRST_TURN, {"role": "user", "content": "夕方は? 👩‍👩‍👧"}],
}
DIALOGUES |= {f"{name} with a system message": [SYSTEM, *turns] for name, turns in DIALOGUES.items()}
ANSWERS = [
    "It scatters more.",
    "Über den Weg des Lichts.",
    "東京では赤いです。",
    "👩‍👩‍👧 cafe\u0301!",
    "def sky():\n\treturn 'blue'\n\n\n# done",
]


def ids_of(family: str, written: str, *, special: bool = False) -> list[int]:
    ids: list[int] = families.load(family)(written, add_special_tokens=special).input_ids
    return ids


def slots(aligned: Aligned) -> Slots:
    return slots_of(aligned.sample, len(aligned.response_ids))


def align(family: str, **sample: Any) -> Aligned:
    return READERS[family].align(Sample(**sample))


def spans_of(family: str, written: str) -> list[Span]:
    vocabulary = READERS[family].vocabulary
    return vocabulary.spans_in_text(written, vocabulary.encode(written))


@cache
def templated(name: str) -> tuple[Any, Aligner]:
    template = families.TEMPLATES[name]
    tokenizer = families.load(template.family, template.text)
    return tokenizer, Aligner(tokenizer, 4096, 200_000)


def dialogues(name: str) -> list[list[dict[str, str]]]:
    systems = families.TEMPLATES[name].systems
    return [messages for messages in DIALOGUES.values() if systems or messages[0] is not SYSTEM]


@pytest.mark.parametrize("family", LOSSLESS)
@settings(max_examples=60)
@given(written=text)
def test_spans_end_where_the_text_ends_that_the_tokenizer_decodes_so_far(family: str, written: str) -> None:
    tokenizer, ids, spans = families.load(family), ids_of(family, written), spans_of(family, written)
    assert len(spans) == len(ids)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans)][: len(spans)]
    assert [stop for _, stop in spans][-1:] == [len(written.encode())][: len(spans)]
    for read, (_, stop) in enumerate(spans, 1):
        decoded = tokenizer.decode(ids[:read], clean_up_tokenization_spaces=False)
        if written.startswith(decoded):  # and not in the middle of a character
            assert stop == len(decoded.encode())


@pytest.mark.parametrize("family", REWRITING)
@settings(max_examples=60)
@given(written=text)
def test_spans_of_a_tokenizer_that_rewrites_the_text_lie_in_it_in_order_where_its_offsets_say(
    family: str, written: str
) -> None:
    backend, spans = families.load(family).backend_tokenizer, spans_of(family, written)
    offsets = backend.encode(written, add_special_tokens=False).offsets
    assert len(spans) == len(offsets)
    reached = 0
    for start, stop in spans:
        assert reached <= start <= stop <= len(written.encode())
        reached = stop
    for i, (start, stop) in enumerate(offsets):
        alone = all(stop <= first or last <= start for first, last in offsets[:i] + offsets[i + 1 :])
        if alone and start < stop:
            assert spans[i] == (len(written[:start].encode()), len(written[:stop].encode()))


@pytest.mark.parametrize("family", ["qwen", "mon"])
@pytest.mark.parametrize("written", TEXTS)
def test_what_such_a_tokenizer_leaves_as_it_is_has_spans_over_every_byte(family: str, written: str) -> None:
    written = families.load(family).backend_tokenizer.normalizer.normalize_str(written)
    spans = spans_of(family, written)
    assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), len(written.encode())]


@pytest.mark.parametrize("family", ["llama", "mon"])
def test_the_blank_that_is_written_before_a_text_takes_no_byte_of_it(family: str) -> None:
    assert families.load(family).convert_ids_to_tokens(ids_of(family, "京")[:1]) == ["▁"]
    assert spans_of(family, "京")[0] == (0, 0)
    assert spans_of(family, "京")[-1][1] == 3


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60)
@given(prompt=text, response=text)
def test_prompt_and_response_are_the_ids_of_one_text_wherever_no_token_crosses(
    family: str, prompt: str, response: str
) -> None:
    assume(prompt or response)
    aligned = align(family, prompt=prompt, response=response)
    ids = list(aligned.sequence.token_ids)
    if aligned.warnings:
        assert [each.split(":")[0] for each in aligned.warnings] == ["split_boundary"]
        reader = READERS[family]
        apart = [*reader.vocabulary.prefix_ids, *ids_of(family, prompt), *ids_of(family, response)]
        assert ids == [*apart, *reader.vocabulary.suffix_ids]
    else:
        assert ids == ids_of(family, prompt + response, special=True)
    assert aligned.spans is not None
    assert len(aligned.spans) == aligned.sequence.response_length
    assert all(first[1] <= second[0] for first, second in pairwise([(0, 0), *aligned.spans]))
    if family in LOSSLESS and response:
        assert aligned.spans[-1][1] == len(response.encode())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("", "Sure."), ("Why?", ""), ("Why?", " Because."), ("Why? ", "Because."), ("[INST] Why? [/INST] ", "So.")],
)
def test_a_blank_between_prompt_and_response_splits_no_token(family: str, prompt: str, response: str) -> None:
    aligned = align(family, prompt=prompt, response=response)
    assert not aligned.warnings
    assert list(aligned.sequence.token_ids) == ids_of(family, prompt + response, special=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_cut_in_two_is_never_read_over_the_boundary(family: str) -> None:
    assert len(ids_of(family, "the")) == 1
    aligned = align(family, prompt="Why t", response="he sky?")
    assert aligned.warnings[0].startswith("split_boundary:")
    assert list(aligned.sequence.response_ids) == ids_of(family, "he sky?")


@pytest.mark.parametrize(
    ("family", "prefix", "suffix"),
    [
        ("llama", ["<s>"], []),
        ("deepseek", [], []),
        ("llama3", ["<|begin_of_text|>"], []),
        ("qwen", [], []),
        ("bert", ["[CLS]"], ["[SEP]"]),
        ("mon", [], ["</s>"]),
    ],
)
def test_a_prompt_as_text_gets_what_the_tokenizer_itself_adds_and_once(
    family: str, prefix: list[str], suffix: list[str]
) -> None:
    tokens = [*prefix, *families.load(family).tokenize("Why? Because."), *suffix]
    for written in ("Why?", "".join(prefix) + "Why?"):
        aligned = align(family, prompt=written, response=" Because.")
        assert families.load(family).convert_ids_to_tokens(aligned.sequence.token_ids) == tokens
        assert not aligned.warnings


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_scored_as_they_stand(family: str) -> None:
    prompt, response = ids_of(family, "Why?"), ids_of(family, "So it is.")
    aligned = align(family, prompt_token_ids=prompt, response_token_ids=response, finished=False)
    assert list(aligned.sequence.token_ids) == [*prompt, *response]
    framed = ids_of(family, "Why?", special=True)
    aligned = align(family, prompt_token_ids=framed, response_token_ids=response, finished=False)
    assert list(aligned.sequence.token_ids) == [*framed, *response]


@pytest.mark.parametrize("family", LOSSLESS)
@pytest.mark.parametrize("written", TEXTS)
def test_spans_of_ids_are_those_of_the_text_they_write(family: str, written: str) -> None:
    aligned = align(family, prompt_token_ids=[5], response_token_ids=ids_of(family, written))
    blank = len(READERS[family].vocabulary.bytes_of(ids_of(family, written))) - len(written.encode())
    assert aligned.spans is not None
    shifted = [(max(start - blank, 0), max(stop - blank, 0)) for start, stop in aligned.spans]
    assert shifted == spans_of(family, written)


def test_wordpieces_do_not_tell_what_text_they_were_read_from() -> None:
    assert align("bert", prompt_token_ids=[5], response_token_ids=ids_of("bert", "So it is.")).spans is None


@pytest.mark.parametrize(("family", "end"), [("bert", "[SEP]"), ("mon", "</s>")])
def test_what_the_tokenizer_adds_behind_closes_a_finished_response_once(family: str, end: str) -> None:
    tokenizer, response = families.load(family), ids_of(family, "So it is.")
    closed = [*response, tokenizer.convert_tokens_to_ids(end)]
    assert READERS[family].closing_ids == closed[-1:]
    for given_ids, finished, scored in ((response, True, closed), (closed, True, closed), (response, False, response)):
        aligned = align(family, prompt_token_ids=[], response_token_ids=given_ids, finished=finished)
        assert list(aligned.sequence.token_ids) == scored
        assert aligned.sequence.scored_position == len(scored) - 1
        assert slots(aligned).count == len(given_ids)


@pytest.mark.parametrize("name", families.TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_dialogue_and_its_answer_are_the_ids_that_the_template_gives_for_both(name: str, answer: str) -> None:
    tokenizer, reader = templated(name)
    for messages in dialogues(name):
        whole = [*messages, {"role": "assistant", "content": answer}]
        expected = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        aligned = reader.align(Sample(messages=messages, response=answer))
        assert list(aligned.sequence.token_ids) == expected
        assert not aligned.warnings
        response = aligned.sequence.response_ids
        assert expected[aligned.sequence.response_stop :] == reader.closing_ids
        assert normalize("NFC", tokenizer.decode(response).strip()) == normalize("NFC", answer)


@pytest.mark.parametrize("name", families.TEMPLATES)
def test_a_prompt_is_the_generation_prompt_and_what_the_template_writes_before_an_answer(name: str) -> None:
    tokenizer, reader = templated(name)
    for messages in dialogues(name):
        generation = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert reader.template is not None
        assert reader.template.prompt(messages) == generation + families.TEMPLATES[name].gap


@pytest.mark.parametrize("name", families.TEMPLATES)
def test_a_rendered_prompt_as_text_is_read_as_its_messages_are(name: str) -> None:
    _, reader = templated(name)
    for messages in dialogues(name):
        assert reader.template is not None
        as_messages = reader.align(Sample(messages=messages, response="So it is."))
        as_text = reader.align(Sample(prompt=reader.template.prompt(messages), response="So it is."))
        assert list(as_text.sequence.token_ids) == list(as_messages.sequence.token_ids)
        assert not as_text.warnings  # nor of a BOS that is there twice


@pytest.mark.parametrize("name", families.TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_spans_of_an_answer_to_a_dialogue_lie_in_the_answer(name: str, answer: str) -> None:
    _, reader = templated(name)
    aligned = reader.align(Sample(messages=DIALOGUES["two turns"], response=answer))
    assert aligned.spans is not None
    assert aligned.spans[0][0] == 0
    assert aligned.spans[-1][1] == len(answer.encode())
    assert all(first[1] <= second[0] for first, second in pairwise(aligned.spans))


@pytest.mark.parametrize("name", families.TEMPLATES)
def test_an_instruction_is_read_as_a_part_of_the_first_message(name: str) -> None:
    tokenizer, reader = templated(name)
    sample = Sample(messages=[QUESTION], response="So it is.")
    told = reader.instructed(sample, reader.align(sample).sequence, "Be kind.")
    message = {"role": "user", "content": f"Be kind.\n\n{QUESTION['content']}"}
    whole = [message, {"role": "assistant", "content": "So it is."}]
    assert list(told.token_ids) == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)


@pytest.mark.parametrize("name", families.TEMPLATES)
def test_an_answer_that_a_template_would_have_stripped_is_told_of(name: str) -> None:
    _, reader = templated(name)
    for answer, told in (("So it is.", False), ("So it is.\n", families.TEMPLATES[name].strips)):
        warnings = reader.align(Sample(messages=[QUESTION], response=answer)).warnings
        assert any(each.startswith("unstripped_response:") for each in warnings) == told


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma", [SYSTEM, QUESTION], "System role not supported"),
        ("mistral", [SYSTEM, QUESTION], "Conversation roles must alternate"),
        ("mistral", [QUESTION, QUESTION], "Conversation roles must alternate"),
        ("llama 2", [SYSTEM, QUESTION, QUESTION], "Roles must alternate"),
    ],
)
def test_a_dialogue_that_a_template_does_not_take_is_refused_with_its_reason(
    name: str, messages: list[dict[str, str]], reason: str
) -> None:
    _, reader = templated(name)
    with pytest.raises(InvalidRequest, match=reason) as refused:
        reader.align(Sample(messages=messages, response="So it is."))
    assert refused.value.error_code == "template_error"


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("trainer", FAMILIES)
@settings(max_examples=10)
@given(written=text, data=st.data())
def test_rewards_keep_their_sum_on_the_tokens_of_every_other_tokenizer(
    model: str, trainer: str, written: str, data: st.DataObject
) -> None:
    targets = spans_of(trainer, written)
    assume(targets)
    aligned = align(model, prompt="Why?\n", response=written, response_spans=targets)
    count = aligned.sequence.response_length
    assume(count)
    values = np.array(data.draw(st.lists(st.floats(-9, 9), min_size=count, max_size=count)))
    placed = place(
        Credit(values),
        float(values.sum()),
        Params(),
        slots(aligned),
        aligned.spans,
    )
    assert len(placed.rewards) == len(targets)
    assert placed.rewards.sum(dtype=np.float64) == pytest.approx(values.sum(), abs=1e-4)


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("trainer", FAMILIES)
@pytest.mark.parametrize("written", ["Grüße, 東京 😀!", "def add(a, b):\n\treturn a + b"])
def test_a_token_gives_its_reward_to_the_trainers_tokens_that_it_shares_bytes_with(
    model: str, trainer: str, written: str
) -> None:
    targets = spans_of(trainer, written)
    aligned = align(model, prompt="Why?\n", response=written, response_spans=targets)
    assert aligned.spans is not None
    for token, (start, stop) in enumerate(aligned.spans):
        values = np.zeros(len(aligned.spans))
        values[token] = 1.0
        placed = place(Credit(values), 1.0, Params(), slots(aligned), aligned.spans)
        shared = [max(min(stop, last) - max(start, first), 0) for first, last in targets]
        if sum(shared):
            np.testing.assert_allclose(placed.rewards, np.array(shared) / sum(shared), rtol=1e-6)
