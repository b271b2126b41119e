"""From a sample to ids: where the response lies, which tokens close it, where the score is read."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

import tiny
from densereward.align import Aligned, Aligner
from densereward.capture import PrefixScores
from densereward.errors import InvalidRequest, ModelError, TooLong
from densereward_client.wire import Message, Sample

BOS, START, END = 0, 1, 2
NEWLINE = 201
TOKENIZER = tiny.make_tokenizer()


def aligner(*, max_length: int = 256, **tokenizer: Any) -> Aligner:
    return Aligner(tiny.make_tokenizer(**tokenizer), max_length, 320)


def align(reader: Aligner | None = None, **sample: Any) -> Aligned:
    return (reader or aligner()).align(Sample(**sample))


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def test_a_finished_response_gets_the_templates_closing_tokens_and_the_last_is_scored() -> None:
    aligned = align(prompt_token_ids=[5, 6], response_token_ids=[7, 8, 9])
    assert list(aligned.sequence.token_ids) == [5, 6, 7, 8, 9, END, NEWLINE]
    assert (aligned.sequence.prompt_length, aligned.sequence.response_length) == (2, 3)
    assert aligned.sequence.scored_position == 6


def test_a_response_cut_by_length_gets_none_and_is_scored_at_its_last_token() -> None:
    aligned = align(prompt_token_ids=[5, 6], response_token_ids=[7, 8, 9], finished=False)
    assert list(aligned.sequence.token_ids) == [5, 6, 7, 8, 9]
    assert aligned.sequence.scored_position == 4


@pytest.mark.parametrize(
    ("response", "appended"),
    [
        ([7, END], [NEWLINE]),
        ([7, END, NEWLINE], []),
        ([7, NEWLINE], [END, NEWLINE]),
        ([END], [NEWLINE]),
        ([7, END, END], [NEWLINE]),
    ],
)
def test_closing_tokens_that_are_there_keep_their_slots_and_are_not_given_twice(
    response: list[int], appended: list[int]
) -> None:
    aligned = align(prompt_token_ids=[5], response_token_ids=response)
    assert list(aligned.sequence.token_ids) == [5, *response, *appended]
    assert aligned.slots.count == aligned.sequence.response_length == len(response)


def test_pad_is_eos_here_and_a_response_of_such_tokens_is_still_read_at_its_end() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == END
    aligned = align(prompt_token_ids=[5], response_token_ids=[END, END, END], finished=False)
    assert aligned.sequence.scored_position == 3


def test_a_closing_token_written_as_text_is_recognised() -> None:
    aligned = align(prompt="", response="Thank you<|im_end|>")
    assert list(aligned.sequence.token_ids) == [*ids_of("Thank you"), END, NEWLINE]


def test_messages_are_rendered_up_to_the_answer() -> None:
    aligned = align(messages=[{"role": "user", "content": "Why?"}], response="So.")
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    assert list(aligned.sequence.token_ids) == ids_of(rendered)
    assert aligned.sequence.response_length == len(ids_of("So."))


def test_without_a_template_the_tokenizers_own_end_closes_a_response_and_messages_are_refused() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.make_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", END)]
    )
    reader = Aligner(tokenizer, 256, 320)
    assert reader.closing_ids == [END]
    assert list(align(reader, prompt_token_ids=[5], response_token_ids=[7]).sequence.token_ids) == [5, 7, END]
    with pytest.raises(InvalidRequest, match="no chat template"):
        align(reader, messages=[{"role": "user", "content": ""}], response="a")


@pytest.mark.parametrize("text", ["", "Why?"])
def test_bos_is_added_once_to_a_prompt_as_text(text: str) -> None:
    reader = aligner(adds_bos=True)
    for prompt in (text, f"<|bos|>{text}"):
        aligned = align(reader, prompt=prompt, response="So.")
        assert list(aligned.sequence.token_ids[:2]).count(BOS) == 1
        assert aligned.sequence.token_ids[0] == BOS
        assert aligned.sequence.prompt_length == 1 + len(ids_of(text))
        assert not aligned.warnings


def test_bos_is_added_neither_to_ids_nor_to_messages() -> None:
    reader = aligner(adds_bos=True)
    assert align(reader, prompt_token_ids=[5], response_token_ids=[7]).sequence.token_ids[0] == 5
    assert align(reader, messages=[{"role": "user", "content": ""}], response="a").sequence.token_ids[0] == START


def test_a_template_that_writes_bos_is_not_given_another() -> None:
    reader = aligner(adds_bos=True, template="<|bos|>" + tiny.CHATML)
    aligned = align(reader, messages=[{"role": "user", "content": ""}], response="a")
    assert list(aligned.sequence.token_ids[:2]) == [BOS, START]
    assert reader.closing_ids == [END, NEWLINE]


def test_a_doubled_bos_is_reported() -> None:
    aligned = align(aligner(adds_bos=True), prompt_token_ids=[BOS, BOS, 5], response_token_ids=[7])
    assert aligned.warnings[0].startswith("doubled_bos:")


def test_prompt_and_response_are_read_as_one_text_and_cut_between_tokens() -> None:
    aligned = align(prompt="Thank you", response=" very much")
    assert list(aligned.sequence.token_ids) == [*ids_of("Thank you very much"), END, NEWLINE]
    assert aligned.spans == [
        (start, stop)
        for start, stop in _byte_spans(" very much", list(aligned.sequence.token_ids)[len(ids_of("Thank you")) : -2])
    ]


def test_a_token_over_the_boundary_is_never_given_to_either_side() -> None:
    assert ids_of("The") != [*ids_of("T"), *ids_of("he")]
    aligned = align(prompt="T", response="he")
    assert list(aligned.sequence.token_ids) == [*ids_of("T"), *ids_of("he"), END, NEWLINE]
    assert aligned.sequence.prompt_length == len(ids_of("T"))
    assert aligned.warnings[0].startswith("split_boundary:")


@pytest.mark.parametrize("prompt", ["Thank ", "Thank  "])
def test_a_blank_that_ends_the_prompt_is_read_with_the_word_behind_it_and_has_no_bytes(prompt: str) -> None:
    aligned = align(prompt=prompt, response="the")
    assert list(aligned.sequence.token_ids) == [*ids_of(f"{prompt}the"), END, NEWLINE]
    assert list(aligned.sequence.response_ids) == ids_of(" the")
    assert aligned.spans is not None
    assert (aligned.spans[0][0], aligned.spans[-1][1]) == (0, 3)
    assert not aligned.warnings


def test_a_prompt_of_one_blank_stays_a_prompt() -> None:
    aligned = align(prompt=" ", response="the")
    assert aligned.sequence.prompt_length == len(ids_of(" "))
    assert aligned.warnings[0].startswith("split_boundary:")


def test_a_response_that_the_template_would_have_stripped_is_scored_as_it_stands_with_a_warning() -> None:
    reader = aligner(template=tiny.CHATML.replace("message['content']", "message['content'] | trim"))
    messages = [{"role": "user", "content": "Why?"}]
    assert align(reader, messages=messages, response=" So.").warnings[0].startswith("unstripped_response:")
    assert not align(reader, messages=messages, response="So.").warnings


def test_spans_count_bytes_and_not_characters() -> None:
    aligned = align(prompt="é😀", response="é😀")
    assert aligned.spans is not None
    assert aligned.spans[0][0] == 0
    assert aligned.spans[-1][1] == len("é😀".encode())


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        ({"prompt_token_ids": [5], "response_token_ids": [320]}, "id_out_of_vocabulary"),
        ({"prompt_token_ids": [-1], "response_token_ids": [5]}, "id_out_of_vocabulary"),
        ({"prompt_token_ids": [5] * 300, "response_token_ids": [5]}, "too_long"),
        ({"prompt_token_ids": [5], "response_token_ids": [5, 6], "response_mask": [1]}, "length_mismatch"),
        ({"prompt_token_ids": [5], "response_token_ids": [5, 6], "weights": [1.0]}, "length_mismatch"),
        ({"prompt_token_ids": [5], "response_token_ids": [5, 6], "token_entropies": [1.0]}, "length_mismatch"),
        ({"prompt_token_ids": [5], "response_token_ids": [5, 6], "response_mask": [0, 0]}, "empty_mask"),
        ({"prompt": "", "response": "ab", "response_spans": [(0, 1), (0, 2)]}, "invalid_spans"),
        ({"prompt": "", "response": "ab", "response_spans": [(0, 3)]}, "invalid_spans"),
        ({"prompt": "", "response": "ab", "response_spans": [(1, 0)]}, "invalid_spans"),
        ({"prompt": "", "response": "ab", "response_spans": []}, "invalid_spans"),
        ({"prompt": "", "response": "ab", "response_spans": [(0, 2)], "response_mask": [1, 1]}, "length_mismatch"),
        ({"prompt": "", "response": "", "finished": False}, "empty_sample"),
    ],
)
def test_a_sample_that_cannot_be_served_is_refused_with_its_code(sample: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        align(**sample)
    assert refused.value.error_code == code
    assert refused.value.status == 422


def test_a_prompt_that_is_too_long_loses_its_beginning_where_that_is_asked_for() -> None:
    reader = Aligner(tiny.make_tokenizer(), max_length=10, vocabulary_size=320)
    sample = Sample(prompt_token_ids=list(range(20, 28)), response_token_ids=[7, 8, 9])
    aligned = reader.align(sample, truncate=True)
    assert list(aligned.sequence.token_ids) == [23, 24, 25, 26, 27, 7, 8, 9, END, NEWLINE]
    assert (aligned.dropped, aligned.sequence.prompt_length, aligned.sequence.response_length) == (3, 5, 3)
    assert aligned.warnings == ["truncated: the prompt lost its first 3 tokens"]
    with_bos = Sample(prompt_token_ids=[BOS, *range(20, 27)], response_token_ids=[7, 8, 9])
    kept = reader.align(with_bos, truncate=True)
    assert list(kept.sequence.token_ids)[:3] == [BOS, 23, 24]
    assert kept.warnings == ["truncated: the prompt lost its first 3 tokens after the BOS"]
    short = reader.align(Sample(prompt_token_ids=[5], response_token_ids=[7]), truncate=True)
    assert (short.dropped, short.warnings) == (0, [])


@pytest.mark.parametrize("prompt", [[], [5], [BOS, 5]])
def test_a_response_that_is_too_long_is_refused_whatever_its_prompt_could_lose(prompt: list[int]) -> None:
    reader = Aligner(tiny.make_tokenizer(), max_length=10, vocabulary_size=320)
    with pytest.raises(TooLong):
        reader.align(Sample(prompt_token_ids=prompt, response_token_ids=[7] * 9), truncate=True)


def test_the_longest_sequence_that_fits_is_served_closing_tokens_included() -> None:
    reader = aligner(max_length=10)
    assert len(align(reader, prompt_token_ids=[5] * 4, response_token_ids=[6] * 4).sequence.token_ids) == 10
    with pytest.raises(TooLong, match="11 tokens with the closing ones, and the model reads 10"):
        align(reader, prompt_token_ids=[5] * 5, response_token_ids=[6] * 4)


def test_a_closed_prefix_must_fit_too() -> None:
    reader = aligner(max_length=10)
    sample = Sample(prompt_token_ids=[5] * 4, response_token_ids=[6] * 6, finished=False)
    assert reader.align(sample, frozenset([PrefixScores("open")])).sequence.longest == 10
    with pytest.raises(TooLong, match="12 tokens"):
        reader.align(sample, frozenset([PrefixScores("closed")]))


def test_a_crossing_that_offsets_hide_is_found_by_the_prompts_own_ids() -> None:
    from tokenizers import normalizers
    from tokenizers.processors import ByteLevel

    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    aligned = align(Aligner(tokenizer, 256, 320), prompt="e", response="\u0301 a")
    assert aligned.warnings[0].startswith("split_boundary:")
    assert aligned.sequence.prompt_length == len(ids_of("e"))


def test_closing_tokens_that_the_model_does_not_have_are_another_models() -> None:
    with pytest.raises(ModelError, match="another model's tokenizer"):
        Aligner(tiny.make_tokenizer(), 256, 200)


def test_an_empty_response_may_bring_empty_spans() -> None:
    assert align(prompt="Why?", response="", response_spans=[]).slots.count == 0


def test_an_empty_response_may_bring_an_empty_mask() -> None:
    assert align(prompt="Why?", response="", response_mask=[]).slots.count == 0


def _byte_spans(text: str, token_ids: list[int]) -> list[tuple[int, int]]:
    spans, reached = [], 0
    for piece in TOKENIZER.convert_ids_to_tokens(token_ids):
        spans.append((reached, reached + len(piece)))
        reached += len(piece)
    assert reached == len(text.encode())
    return spans


@pytest.mark.parametrize(
    ("special", "reason"),
    [({"gate": "<|im_end|>"}, "weighs its objectives"), ({"score_token": 7}, "written behind a response")],
)
def test_a_whole_text_is_refused_where_the_place_of_the_response_matters(special: dict[str, Any], reason: str) -> None:
    reader = Aligner(tiny.make_tokenizer(), 256, 320, **special)
    for whole in ("Thank you", [5, 6], [Message(role="user", content="Why?")]):
        with pytest.raises(InvalidRequest, match=reason):
            reader.whole(whole, special_tokens=True)


def test_what_a_tokenizer_writes_round_a_text_is_written_once() -> None:
    tokenizer = tiny.make_tokenizer(adds_bos=True, template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", BOS), ("<|im_end|>", END)]
    )
    reader = Aligner(tokenizer, 256, 320)
    for text in ("Thank you", "<|bos|>Thank you", "Thank you<|im_end|>", "<|bos|>Thank you<|im_end|>"):
        assert reader.whole(text, special_tokens=True).response_token_ids == [BOS, *ids_of("Thank you"), END]
        assert reader.whole(text, special_tokens=False).response_token_ids == ids_of(text)


def test_a_whole_dialogue_needs_a_template_and_its_refusal_names_the_other_way() -> None:
    with pytest.raises(InvalidRequest, match="no chat template: give `input`"):
        aligner(template=None).whole([Message(role="user", content="Why?")], special_tokens=False)
