"""Where tokens stand in the packed row, on literal ids."""

from __future__ import annotations

import torch

from densereward.capture import AttentionRow, PrefixScores, ScoringInput
from densereward.engines.torch.chunks import Chunk, chunks_of, expand
from densereward.engines.torch.kv_cache import KVCache
from densereward.engines.torch.packed_batch import PackedBatch
from densereward.engines.torch.packing import pack

CPU = torch.device("cpu")
CLOSING = (2, 3)


def packed(*batch: ScoringInput) -> PackedBatch:
    return pack([Chunk.after(expand(sequence), None) for sequence in batch], CPU, layers=4)


def row(batch: PackedBatch) -> tuple[list[int], list[int]]:
    return batch.token_ids[0].tolist(), batch.position_ids[0].tolist()


def test_sequences_stand_side_by_side_with_positions_of_their_own() -> None:
    batch = packed(ScoringInput([10, 11, 12], 1, 2, 2), ScoringInput([20, 21], 1, 1, 1))
    assert row(batch) == ([10, 11, 12, 20, 21], [0, 1, 2, 0, 1])
    assert batch.segments == [range(3), range(3, 5)]
    assert batch.read_at.tolist() == [2, 4]
    assert batch.groups == []


def test_a_shared_prompt_comes_once_and_first_and_its_responses_side_by_side() -> None:
    batch = packed(
        ScoringInput([7, 8, 10], 2, 1, 2), ScoringInput([9, 20], 1, 1, 1), ScoringInput([7, 8, 30, 31], 2, 2, 3)
    )
    assert row(batch) == ([7, 8, 10, 30, 31, 9, 20], [0, 1, 2, 2, 3, 0, 1])
    assert batch.groups == [(range(2), range(2, 5))]
    assert batch.read_at.tolist() == [2, 6, 4]


def test_only_whole_prompts_are_shared() -> None:
    batch = packed(ScoringInput([7, 8, 10], 2, 1, 2), ScoringInput([7, 8, 10], 1, 2, 2))
    assert batch.groups == []
    assert batch.token_ids.shape == (1, 6)


def test_the_head_is_read_at_the_score_then_before_and_after_each_response_token() -> None:
    sequence = ScoringInput([7, 8, 10, 11, 2, 3], 2, 2, 5, CLOSING, frozenset([PrefixScores("open")]))
    assert packed(sequence).read_at.tolist() == [5, 1, 2, 3]


def test_every_prefix_is_closed_at_the_positions_it_would_have() -> None:
    sequence = ScoringInput([7, 10, 11], 1, 2, 2, CLOSING, frozenset([PrefixScores("closed")]))
    batch = packed(sequence)
    assert row(batch) == ([7, 10, 11, 2, 3, 2, 3, 2, 3], [0, 1, 2, 1, 2, 2, 3, 3, 4])
    assert batch.read_at.tolist() == [2, 4, 6, 8]


def test_a_prefix_that_ends_with_a_closing_token_is_read_where_the_rest_ends() -> None:
    sequence = ScoringInput([7, 10, 2, 3], 1, 3, 3, CLOSING, frozenset([PrefixScores("closed")]))
    batch = packed(sequence)
    assert row(batch)[0] == [7, 10, 2, 3, 2, 3, 2, 3, 3, 2, 2, 3]
    # After `2` only `3` is missing; after `2 3` nothing is, and the score is the response token's own.
    assert batch.read_at.tolist() == [3, 5, 7, 8, 3]


def test_rows_are_laid_out_from_each_sequences_first_token_to_its_scored_one() -> None:
    needs = frozenset([AttentionRow(-1), AttentionRow(0)])
    one = frozenset([AttentionRow(3)])
    batch = packed(
        ScoringInput([7, 8, 10], 2, 1, 2, needs=needs),
        ScoringInput([9], 0, 1, 0),
        ScoringInput([7, 8, 20, 21], 2, 2, 3, needs=one),
    )
    assert {need.layer for need in batch.row_needs} == {0, 3}
    assert batch.row_chunks == [0, 2]
    assert batch.scored.tolist() == [2, 4]
    assert batch.row_keys.tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert batch.row_owner.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_only_the_prefixes_that_are_needed_are_closed() -> None:
    sequence = ScoringInput([7, 10, 11, 12, 2, 3], 1, 3, 5, CLOSING, frozenset([PrefixScores("closed")]), [2, 3])
    batch = packed(sequence)
    assert row(batch) == ([7, 10, 11, 12, 2, 3, 2, 3, 2, 3, 2, 3], [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 4, 5])
    assert batch.read_at.tolist() == [5, 7, 9, 11]


def cache_of(length: int) -> KVCache:
    cache = KVCache()
    cache.extend(0, torch.zeros(1, length, 2), torch.zeros(1, length, 2))
    return cache


def test_cached_keys_have_places_behind_the_row_and_their_tokens_do_not_run() -> None:
    cache = cache_of(2)
    after = [expand(ScoringInput([7, 8, 9, *response], 3, 1, 3)) for response in ([10], [11])]
    alone = expand(ScoringInput([20, 21], 1, 1, 1, needs=frozenset([AttentionRow(0)])))
    batch = pack([Chunk.after(after[0], cache), Chunk.after(alone, None), Chunk.after(after[1], cache)], CPU, layers=4)
    assert row(batch) == ([9, 10, 9, 11, 20, 21], [2, 3, 2, 3, 0, 1])
    assert batch.groups == [(range(6, 8), range(4))]
    assert batch.key_positions.tolist() == [2, 3, 2, 3, 0, 1, 0, 1]
    assert batch.read_at.tolist() == [1, 5, 3]


def test_a_prompt_is_cached_up_to_its_last_token_at_which_the_head_is_read() -> None:
    cache = KVCache()
    expanded = expand(ScoringInput([7, 8, 9, 10], 3, 1, 3))
    batch = pack([Chunk.after(expanded, None)], CPU, layers=4, new_caches={(7, 8, 9): cache})
    assert batch.to_cache == [(range(2), cache)]


def test_a_long_sequence_is_cut_into_equal_chunks_and_its_blocks_are_not_cut() -> None:
    needs = frozenset([PrefixScores("closed")])
    expanded = expand(ScoringInput([7, 8, 9, 10, 11, 12, 2, 3], 3, 3, 7, CLOSING, needs))
    chunks = [(chunk.start, chunk.stop, chunk.blocks) for chunk in chunks_of(expanded, 5)]
    assert chunks == [(0, 4, range(0)), (4, 8, range(0)), (8, 12, range(2)), (12, 16, range(2, 4))]
