"""What is scored beside a sample, and that it stays within what the queue holds."""

from __future__ import annotations

import pytest

import tiny
from densereward.capture import PrefixScores
from densereward.errors import TooLarge
from densereward.scoring.auxiliary import check_auxiliary
from densereward.scoring.preparation import PreparedSample, prepare_sample
from densereward.tokenization.align import Aligner
from densereward_client.wire import Sample

ALIGNER = Aligner(tiny.make_tokenizer(), 256, 320)
SAMPLE = Sample(prompt_token_ids=[5, 6], response_token_ids=[7, 8, 9])
CLOSED = frozenset([PrefixScores("closed")])
TOKENS = 4 * (2 + 2) + 1 + 2 + 3  # of four prefixes: a prompt and closing tokens each, and what they hold


def prepared(*, reencodes: bool, limit: int) -> PreparedSample:
    return prepare_sample(SAMPLE, [], CLOSED, ALIGNER, truncate=False, reencodes=reencodes, limit=limit)


def test_closed_prefixes_become_sequences_of_their_own_where_the_engine_needs_that() -> None:
    within = prepared(reencodes=False, limit=0)
    assert not within.auxiliary
    assert within.sequence.needs == CLOSED
    split = prepared(reencodes=True, limit=TOKENS)
    assert [each.response_length for each in split.prefixes] == [0, 1, 2, 3]
    assert not split.sequence.needs


def test_prefixes_that_no_queue_could_hold_are_not_even_made() -> None:
    with pytest.raises(TooLarge, match=f"{TOKENS} tokens, and the queue holds {TOKENS - 1}"):
        prepared(reencodes=True, limit=TOKENS - 1)


def test_variants_of_a_request_must_fit_into_the_queue_together() -> None:
    check_auxiliary(2, 100, 100)
    with pytest.raises(TooLarge, match="beside the first 2 samples holds 101 tokens and the queue 100"):
        check_auxiliary(2, 101, 100)
